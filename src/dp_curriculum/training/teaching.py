"""The easy stage: a lesson is charged, released, kept, and the network is pretrained on it."""

from __future__ import annotations

import functools
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from dp_curriculum.closed_form_prior import ClosedFormPrior, released_components
from dp_curriculum.diffusion.autoencoder import LatentSpace
from dp_curriculum.diffusion.sheets import save_sheet
from dp_curriculum.lessons.lesson import Lesson, hold_out
from dp_curriculum.lessons.matching import match_moments
from dp_curriculum.lessons.moment_images import check_released
from dp_curriculum.lessons.planned import LessonGroup, PlannedLesson, group_name, plan_lessons
from dp_curriculum.lessons.pretraining import Draw, mixed, pretrain
from dp_curriculum.runs.run_contents import load_unet, taught_weights
from dp_curriculum.runtime.checkpointing import appearing
from dp_curriculum.runtime.hashing import hash_file, hash_folder
from dp_curriculum.runtime.processes import from_main, jointly
from dp_curriculum.training.run import Run, broadcast_tensors, broadcast_weights


_SHEET_COLUMNS = 8
_PHOTOS = "are_photos"  # name of a tensor beside images that a prior will draw


def lesson_stage(run: Run, group: LessonGroup) -> None:
    """Easy: releases lessons once, keeps them for a resumed run, and pretrains on them, which spends nothing."""
    if run.config.has_prior and group[0].number == 1:
        run.prior = _released_prior(run, group[0])
    weights = taught_weights(run.folder, group)
    if from_main(run.accelerator, weights.is_dir):
        for lesson in group:
            if lesson.lesson.draws_pixels and run.config.matches_public_images:
                _prepared(run, lesson.lesson, {})  # the photos of the prior, which follow from public images again
        if run.is_main:
            run.unet.load_state_dict(load_unet(weights).state_dict())
        broadcast_weights(run.unet, run.accelerator)
        return
    taught = []
    for lesson in group:
        draws = _draws_of(run, lesson)
        if run.stop.agreed():  # what was released is kept; the rest of this stage is post-processing
            return
        if not run.is_prior(lesson):
            taught.append(draws)
    if taught:
        _pretrain(run, group, taught)
    is_taught = not run.stop.requested  # a lesson that was stopped is taught anew when the run is resumed
    run.save_samples(run.unet.eval(), run.folder.sheets / f"after-{group_name(group)}.png")
    if run.is_main and is_taught:
        with appearing(weights) as temporary:
            run.unet.save_pretrained(temporary)
            run.record(weights, hash_folder(temporary))


def _released_prior(run: Run, planned: PlannedLesson) -> ClosedFormPrior:
    """The closed form of the released moments, in place of their teaching: the same on all processes."""
    released = _released(run, planned)
    check_released(released)
    moments = (released["means"], released["factors"], released["variances"])
    components = released_components(released) if run.config.lessons.moment_components > 1 else None
    prior = ClosedFormPrior.from_moments(*moments, components)
    return prior.to(run.accelerator.device)


def _pretrain(run: Run, group: LessonGroup, lessons: Sequence[tuple[Draw, Draw]]) -> None:
    """Trains the network on the images of some lessons of a group, as if they were all of it."""
    draws, checks = zip(*lessons)
    steps, name = run.config.pretraining.pretrain_steps, group_name(group)
    first_step = (group[0].number - 1) * steps
    taught = [lesson for other in plan_lessons(run.config) for lesson in other if not run.is_prior(lesson)]
    is_only_lesson = len(taught) == len(lessons)
    embeddings = run.unet.class_embedding.weight.detach().clone()
    with run.stop.finishing("the step", 0.0):  # of plain training: it takes a moment beside the saving
        pretrain(
            run.unet,
            mixed(draws),
            run.config,
            check_draw=mixed(checks),
            prior=run.prior,
            schedule=run.schedule,
            generator=run.generator,
            num_steps=len(lessons) * steps,
            num_processes=run.accelerator.num_processes,
            description=f"lesson {name}, spends nothing",
            on_step=lambda step, loss: run.accelerator.log({f"{name}/loss": loss}, step=first_step + step),
            should_stop=run.stop.agreed,
            disable_progress_bar=not run.is_main,
        )
    if is_only_lesson:
        _follow_no_class(run.unet.class_embedding.weight.data, embeddings, has_random_classes=run.start is None)


def _follow_no_class(embeddings: torch.Tensor, before: torch.Tensor, *, has_random_classes: bool) -> None:
    """
    Classes that the network has never been taught leave the lessons as "no class", the last row of the embedding.

    With the random embeddings of a new network, which it never met, it draws noise; those that began as "no class"
    would stay what that was before. Where another lesson is taught, it learns classes sooner from random embeddings
    than from equal ones. In place.
    """
    untaught = (embeddings == before).all(dim=1)
    if not has_random_classes:  # of a model to start from: its own classes are kept
        untaught &= (before == before[-1]).all(dim=1)
    if not untaught[-1]:
        embeddings[untaught] = embeddings[-1].clone()


def _draws_of(run: Run, planned: PlannedLesson) -> tuple[Draw, Draw]:
    """Images that a lesson is taught and checked with, released if that has not been done yet."""
    with run.stop.finishing(f"the query of lesson {planned.stage}", None):
        released = _released(run, planned)
    prepared = _prepared(run, planned.lesson, released)
    resolution = run.config.input_shape[1]

    def draw(
        tensors: Mapping[str, torch.Tensor], count: int, generator: torch.Generator
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return planned.lesson.draw(tensors, count, resolution, generator)

    if run.is_main and prepared:
        sheet, shown = run.folder.lesson_sheet(planned.stage), functools.partial(draw, prepared)
        run.stop.unless_stopped(lambda: _save_lesson_sheet(sheet, released, shown, run))
    has_checks = bool(prepared) and run.config.pretraining.pretrain_patience is not None
    taught, checked = hold_out(prepared) if has_checks else (prepared, prepared)
    return functools.partial(draw, taught), functools.partial(draw, checked)


def _released(run: Run, planned: PlannedLesson) -> Mapping[str, torch.Tensor]:
    """The released tensors of a lesson: charged, drawn by the main process, saved; or those of an earlier try."""
    path = run.folder.released(planned.number, planned.stage)
    if not from_main(run.accelerator, path.exists):
        for mechanism in planned.mechanisms:
            run.reserve(mechanism, mechanism.event.num_steps)
        if run.is_main:  # what was charged is what the query draws with
            tensors = planned.lesson.release(
                run.private, run.config, planned.mechanisms, run.plan.dataset_size, run.secret
            )
            _save_tensors(run, tensors, path)
    return broadcast_tensors(load_file(path) if run.is_main else None, run.accelerator)


def _prepared(run: Run, lesson: Lesson, released: Mapping[str, torch.Tensor]) -> Mapping[str, torch.Tensor]:
    """
    Tensors that a lesson draws from, on the device: made of the released tensors by the main process. There are none
    where a stop request cut that short.
    """
    device = run.accelerator.device
    released = {name: tensor.to(device) for name, tensor in released.items()}

    def prepare() -> Mapping[str, torch.Tensor]:
        tensors = lesson.prepare(released, run.config, run.private.class_names, run.generator)
        if not lesson.draws_pixels:
            return tensors
        return _matched(tensors if run.latents is None else _encoded(tensors, run.latents), run)

    found = jointly(run.accelerator, lambda: (run.stop.unless_stopped(prepare) or {}) if run.is_main else None)
    prepared = {name: tensor.to(device) for name, tensor in broadcast_tensors(found, run.accelerator).items()}
    if _PHOTOS in prepared and run.prior is not None:
        run.prior = run.prior.with_photos(prepared["images"], prepared["labels"])
    return prepared


def _encoded(tensors: Mapping[str, torch.Tensor], space: LatentSpace) -> Mapping[str, torch.Tensor]:
    """Images of a lesson as latents, without those whose latents are no numbers: all of it is public."""
    latents, is_finite = space.encode(tensors["images"])
    if not is_finite.any():
        raise ValueError("Refusing to teach public images whose latents are all not finite: name another autoencoder.")
    return {
        **tensors,
        "images": latents[is_finite],
        "labels": tensors["labels"][is_finite.to(tensors["labels"].device)],
    }


def _matched(tensors: Mapping[str, torch.Tensor], run: Run) -> Mapping[str, torch.Tensor]:
    """Public images without a class as images of each class, with its released moments, where that is asked for."""
    without_class = bool((tensors["labels"] == run.private.num_classes).all())
    if run.prior is None or not run.config.matches_public_images or not without_class:
        return tensors
    images, labels = match_moments(tensors["images"], run.prior)
    return {"images": images, "labels": labels, _PHOTOS: torch.ones(1)}


def _save_lesson_sheet(path: Path, released: Mapping[str, torch.Tensor], draw: Draw, run: Run) -> None:
    """Sheet of what a lesson teaches: the released images if they are few, else some draws, one row per class."""
    num_classes = run.private.num_classes
    if "images" in released and len(released["images"]) <= _SHEET_COLUMNS * num_classes:
        images, labels, columns = (
            released["images"],
            released["labels"],
            max(10, len(released["images"]) // num_classes),
        )
    else:
        images, labels = draw_for_sheet(draw, num_classes, torch.Generator(run.accelerator.device).manual_seed(0))
        columns = _SHEET_COLUMNS
    save_sheet(run.pictures(images[labels.argsort(stable=True)]), path, columns=columns)


def draw_for_sheet(draw: Draw, num_classes: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """A few images of each of the first ten classes that occur; one class where a public dataset has others."""
    kept: dict[int, list[torch.Tensor]] = {}
    for _ in range(math.ceil(num_classes / 10)):
        images, labels = draw(80 * _SHEET_COLUMNS, generator)
        for label in labels.unique().tolist():
            rows = images[labels == label][:_SHEET_COLUMNS].clone()
            kept[label] = [*kept.get(label, []), *rows][:_SHEET_COLUMNS]
        kept = {label: kept[label] for label in sorted(kept)[:10]}
    shown = [(label, image) for label, images_of_class in kept.items() for image in images_of_class]
    return torch.stack([image for _, image in shown]), torch.tensor([label for label, _ in shown])


def _save_tensors(run: Run, tensors: Mapping[str, torch.Tensor], path: Path) -> None:
    """Their hash is in the ledger before the file has its name: a crash leaves a hash without a file, at worst."""
    with appearing(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary)
        run.record(path, hash_file(temporary))
