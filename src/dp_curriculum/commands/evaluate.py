"""`dp-curriculum evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from dp_curriculum.commands.arguments import CommandParser, add_thread_argument, model_folder
from dp_curriculum.commands.sample import load_pipeline, settle_threads
from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.holdout import held_out_part, training_part
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.places import dataset_place, is_folder_name, share_images
from dp_curriculum.data.reading import load_images, read_images
from dp_curriculum.data.sources import open_rows, reference_split
from dp_curriculum.evaluation.classifiers import CLASSIFIERS
from dp_curriculum.evaluation.evaluation import (
    MIN_IMAGES,
    Evaluation,
    evaluate_images,
    evaluate_leakage,
    sample_images,
)
from dp_curriculum.evaluation.evaluation_report import StagePoint, format_value, save_nearest_neighbors, save_report
from dp_curriculum.evaluation.inception import check_inception
from dp_curriculum.lessons.planned import LessonGroup, group_name, mechanisms_of, plan_lessons
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.accounting import compute_epsilon
from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.privacy.verification import events_of_report
from dp_curriculum.runs.run_contents import load_unet, taught_weights
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.processes import process_state
from dp_curriculum.sharing.hub import is_public_dataset


HELD_OUT = "holdout"  # the split of the images that a run held out


def main(args: Sequence[str]) -> int:
    """Measures utility, fidelity and, with --leakage, leakage of a model's images, and writes a report."""
    given = vars(_parser().parse_args(args))
    model = given.pop("model")
    evaluation = evaluate(model, **given)
    if evaluation is None:  # another process computes the numbers
        return 0
    for metric in evaluation.metrics:
        print(f"{metric.name:<24} {format_value(metric):<20} {metric.meaning} ({metric.data}; {metric.privacy})")
    print(f"report in {_report_folder(given['output_dir'], RunFolder(Path(model)))}")
    return 0


def evaluate(
    model: str | Path,
    *,
    reference_dataset: Any = None,
    split: str | None = None,
    image_column: str | None = None,
    label_column: str | None = None,
    num_classes: int | None = None,
    class_names: Sequence[str] = (),
    reference_is_public: bool = False,
    num_images: int = 5000,
    classifiers: Sequence[str] = ("logistic", "cnn"),
    num_seeds: int = 1,
    inception_weights: str | None = None,
    leakage: bool = False,
    each_stage: bool = False,
    report_html: bool = False,
    output_dir: str | Path | None = None,
    cpu_threads: int | None = None,
) -> Evaluation | None:
    r"""
    Compares generated images with real ones, and writes a report.

    Args:
        model (`str` or `Path`): Folder of a run, or a Hub id.
        reference_dataset (`str`, `datasets.Dataset` or `datasets.DatasetDict`, *optional*): Real images to compare
            with: a folder, a Hub id or a dataset in memory. The dataset of the run if unset.
        split (`str`, *optional*): Split of the reference. `"holdout"` takes the images that the run held out. If
            unset: those, or `"test"`, or the only split of a folder.
        image_column (`str`, *optional*): Column of the images.
        label_column (`str`, *optional*): Column of the classes.
        num_classes (`int`, *optional*): Number of classes, if the reference does not name them.
        class_names (`Sequence[str]`, *optional*): Names of the classes, if the reference does not name them.
        reference_is_public (`bool`, *optional*, defaults to `False`): Whether anybody may see the reference. The
            embedded digits are public, and so is what the Hub shows to anybody.
        num_images (`int`, *optional*, defaults to 5000): Images to generate.
        classifiers (`Sequence[str]`, *optional*): Classifiers to train on them: logistic, mlp, cnn, resnet.
        num_seeds (`int`, *optional*, defaults to 1): Trainings per classifier.
        inception_weights (`str`, *optional*): File with Inception's weights, for FID, KID and Inception Score.
        leakage (`bool`, *optional*, defaults to `False`): Also attack the model. This reads the training images.
        each_stage (`bool`, *optional*, defaults to `False`): Also evaluate the model after each lesson.
        report_html (`bool`, *optional*, defaults to `False`): Also write one self-contained HTML page.
        output_dir (`str` or `Path`, *optional*): Folder for the report; `run/evaluation` of a run if unset.
        cpu_threads (`int`, *optional*): Threads per process on the CPU; as many as pay if unset.

    Returns:
        [`Evaluation`]: All numbers; `None` on all but the main process.

    Privacy:
        Numbers and pictures of images that are not public are not covered by epsilon. The report marks them.

    Raises:
        ValueError: If an argument does not fit, or the reference cannot be opened, or has other classes.
    """
    given = argparse.Namespace(
        model=str(model), reference_dataset=reference_dataset, split=split, image_column=image_column,
        label_column=label_column, num_classes=num_classes, class_names=list(class_names),
        reference_is_public=reference_is_public, num_images=num_images, classifiers=list(classifiers),
        num_seeds=num_seeds, inception_weights=inception_weights, leakage=leakage, each_stage=each_stage,
        report_html=report_html, output_dir=output_dir,
    )  # fmt: skip
    run = _local_run(given.model)
    folder = _check(given, run)
    state = process_state()
    pipeline = load_pipeline(given.model, state)
    settle_threads(pipeline, cpu_threads, num_images)
    pipeline.set_progress_bar_config(disable=True)  # `sample_images` has its own bar
    trained = _training_data(run, pipeline)
    data = _reference_data(run, given, pipeline)
    found = _find_reference(given, run, trained, data)
    if given.leakage and found.was_trained_on:
        raise ValueError(
            f"Refusing to measure --leakage on --split={found.split}: it may hold training images. Name another split."
        )
    reference = _load_reference(given, run, found, data)
    _check_classes(pipeline, reference)
    if reference.num_classes == 1 and (given.each_stage or given.inception_weights is None):
        raise ValueError(
            "Refusing to train classifiers for a model of one class: there are no classes to compare. Give "
            "--inception_weights, and leave out --each_stage."
        )
    marks = {"reference_is_private": found.was_trained_on, "reference_is_public": found.is_public}
    options = {"reference_name": found.name, "classifiers": given.classifiers, **marks}
    images, labels = sample_images(pipeline, given.num_images)
    lessons = list(_sample_lessons(run, pipeline, min(given.num_images, 2000))) if given.each_stage and run else []
    if not state.is_main_process:  # it has sampled its share; the numbers are computed once
        return None
    evaluation = evaluate_images(
        images,
        labels,
        reference,
        num_seeds=given.num_seeds,
        inception_weights=given.inception_weights,
        device=_device_of_networks(pipeline),
        **options,
    )
    if given.leakage and trained is not None and run is not None:
        training = _load_training(run, _in_shape(trained, pipeline))
        attacks = evaluate_leakage(pipeline, images, training, reference)
        evaluation = dataclasses.replace(evaluation, metrics=(*evaluation.metrics, *attacks))
        save_nearest_neighbors(folder / "PRIVATE_nearest_training_images.png", images, training)
    stages = (
        list(_stage_points(run, lessons, pipeline, reference, found.name, evaluation))
        if given.each_stage and run
        else []
    )
    statement = "No privacy report." if pipeline.privacy is None else pipeline.privacy["statement"]
    save_report(
        folder,
        evaluation,
        reference,
        title=f"Evaluation of {Path(given.model).resolve().name}",
        epsilon=statement,
        stages=stages,
        as_html=given.report_html,
        **marks,
    )
    return evaluation


@dataclass(frozen=True)
class _Reference:
    """Facts about the real images: split, name in the report, and who may see them."""

    split: str
    name: str
    was_trained_on: bool
    is_public: bool


def _find_reference(
    given: argparse.Namespace, run: RunFolder | None, trained: DataConfig | None, data: DataConfig
) -> _Reference:
    in_memory = not (given.reference_dataset is None or isinstance(given.reference_dataset, str))
    own = given.reference_dataset is None or in_memory or (trained is not None and _same_place(trained, data))
    holds_out = run is not None and trained is not None and trained.holdout is not None
    if given.split is not None:
        split = given.split
    elif own:  # the only split of a training set is the one that was trained on
        split = HELD_OUT if holds_out and not in_memory else "test"
    else:
        split = reference_split(data)
    if split == HELD_OUT and not (holds_out and own):
        raise ValueError(
            f"Expected --split={HELD_OUT} to come with a run that held images out, and its own dataset: train with "
            "--holdout 0.1, or name another split."
        )
    if split == HELD_OUT:
        place = "dataset in memory" if in_memory else Path(dataset_place(data)).name
        return _Reference(split, f"{place} (held out of the training)", False, given.reference_is_public)
    compared = dataclasses.replace(data, dataset_split=split)
    name = "dataset in memory" if in_memory else Path(data.train_data_dir or data.dataset_name).name
    was_trained_on = trained is not None and not in_memory and share_images(trained, compared)
    is_public = given.reference_is_public or (not in_memory and _is_public(data))
    return _Reference(split, f"{name} ({split})", was_trained_on, is_public)


def _same_place(one: DataConfig, other: DataConfig) -> bool:
    return dataset_place(one) == dataset_place(other)


def _is_public(data: DataConfig) -> bool:
    """True if anybody may see the images. What is not known is taken to be private."""
    if data.is_embedded:
        return True
    if data.train_data_dir is not None or is_folder_name(data.dataset_name):
        return False
    return is_public_dataset(data.dataset_name)


def _load_reference(
    given: argparse.Namespace, run: RunFolder | None, found: _Reference, data: DataConfig
) -> PrivateImages:
    """The real images; the message of an error names the options of this command."""
    split = data.dataset_split if found.split == HELD_OUT else found.split
    if found.split != HELD_OUT and not given.leakage:  # then nothing asks whose images these are
        data = dataclasses.replace(data, person_column=None, person_from=None)
    try:
        if given.reference_dataset is None or isinstance(given.reference_dataset, str):
            reference = load_images(data, split)
        else:
            reference = read_images(open_rows(given.reference_dataset, data, split=split), data)
    except ValueError as error:
        message = str(error).replace("--dataset_split", "--split")
        if given.reference_dataset is not None:
            message = message.replace("--dataset_name", "--reference_dataset")
        elif given.split is None:
            message += (
                " The run held no images out: train with --holdout 0.1, or name other images with --reference_dataset."
            )
        raise ValueError(message) from None
    if found.split == HELD_OUT:
        assert run is not None, "_find_reference asks for a run that held images out"
        return held_out_part(reference, *_holdout(run))
    return reference


def _load_training(run: RunFolder, data: DataConfig) -> PrivateImages:
    training = load_images(data, data.dataset_split)
    return training if data.holdout is None else training_part(training, *_holdout(run))


def _holdout(run: RunFolder) -> tuple[bytes, float]:
    """Key and share of the images that a run held out."""
    share = CurriculumConfig.from_yaml(run.config, finished=True).data.holdout
    if share is None or not run.holdout_key.is_file():
        raise ValueError(
            f"Expected {run.holdout_key} to exist: without it, the images that were held out are not known. Restore "
            "the file."
        )
    return run.holdout_key.read_bytes(), share


def _device_of_networks(pipeline: DPCurriculumPipeline) -> torch.device:
    """Device on which classifiers are trained: that of the pipeline if it is CUDA, else the CPU."""
    return pipeline.device if pipeline.device.type == "cuda" else torch.device("cpu")


def _parser() -> CommandParser:
    parser = CommandParser("evaluate", main.__doc__)
    parser.add_argument("model", help="Folder of a run, or a Hub id.")
    parser.add_argument("--reference_dataset", help="Real images to compare with. Defaults to the dataset of the run.")
    parser.add_argument("--image_column", help="Column of the reference images. Found by its feature type if unset.")
    parser.add_argument("--label_column", help="Column of the reference classes. Found by its feature type if unset.")
    parser.add_argument(
        "--num_classes", type=int, help="Number of classes of the reference, if it does not name them."
    )
    parser.add_argument("--class_names", nargs="+", default=[], help="The same, with names in the order of indices.")
    parser.add_argument(
        "--split",
        help="Split of the reference. Choose one that was not trained on. Defaults to holdout, the images that the "
        "run held out, or else to test, or to the only split of a folder.",
    )
    parser.add_argument(
        "--reference_is_public",
        action="store_true",
        help="Anybody may see the reference, so that its pictures and numbers are not marked private.",
    )
    parser.add_argument("--num_images", type=int, default=5000, help="Images to generate.")
    parser.add_argument(
        "--classifiers",
        nargs="+",
        default=["logistic", "cnn"],
        help="Classifiers to train: logistic, mlp, cnn, resnet.",
    )
    parser.add_argument("--num_seeds", type=int, default=1, help="Trainings per classifier.")
    parser.add_argument("--inception_weights", help="File with Inception's weights, for FID, KID and Inception Score.")
    parser.add_argument(
        "--leakage", action="store_true", help="Also attack the model. This reads the training images."
    )
    parser.add_argument("--each_stage", action="store_true", help="Also evaluate the model after each lesson.")
    parser.add_argument(
        "--report_html", action="store_true", help="Also write the report as one self-contained HTML page."
    )
    parser.add_argument("--output_dir", help="Folder for the report. Defaults to run/evaluation of a local run.")
    add_thread_argument(parser)
    return parser


def _local_run(model: str) -> RunFolder | None:
    """The run that made a model; `None` where only the model is there, as on the Hub."""
    folder = model_folder(model)
    return RunFolder(folder) if folder is not None and RunFolder(folder).config.exists() else None


def _check(given: argparse.Namespace, run: RunFolder | None) -> Path:
    """Refuses what can be refused before images are sampled, which takes minutes; returns the folder of the report."""
    if given.num_images < MIN_IMAGES:
        raise ValueError(f"Expected --num_images={given.num_images} to be at least {MIN_IMAGES}.")
    if given.num_seeds < 1:
        raise ValueError(f"Expected --num_seeds={given.num_seeds} to be at least 1.")
    for name in given.classifiers:
        if name not in CLASSIFIERS:
            raise ValueError(f"Expected --classifiers={name} to be one of {', '.join(CLASSIFIERS)}.")
    if given.inception_weights is not None:
        check_inception(given.inception_weights)
    if importlib.util.find_spec("matplotlib") is None:
        raise ValueError("Expected matplotlib to be installed for the plots: pip install 'dp_curriculum[plots]'.")
    if run is not None:
        return _report_folder(given.output_dir, run)
    if given.split == HELD_OUT:
        raise ValueError(f"Expected --split={HELD_OUT} to come with the folder of a local run: {given.model} is none.")
    for option in ("reference_dataset", "output_dir"):
        if getattr(given, option) is None:
            raise ValueError(f"Expected --{option} to be given: the model comes without the run that made it.")
    for option in ("leakage", "each_stage"):
        if getattr(given, option):
            raise ValueError(f"Expected --{option} to come with the folder of a local run: {given.model} is none.")
    return Path(given.output_dir)


def _report_folder(output_dir: str | Path | None, run: RunFolder) -> Path:
    return Path(output_dir) if output_dir is not None else run.root / "run" / "evaluation"


def _training_data(run: RunFolder | None, pipeline: DPCurriculumPipeline) -> DataConfig | None:
    """Place of the training images; for a model without its run, as far as its report states it."""
    if run is not None:
        return CurriculumConfig.from_yaml(run.config, finished=True).data
    name = ((pipeline.privacy or {}).get("protected_dataset") or {}).get("name")
    return None if name is None else DataConfig(dataset_name=name)


def _reference_data(run: RunFolder | None, given: argparse.Namespace, pipeline: DPCurriculumPipeline) -> DataConfig:
    """Place of the reference: the run's own dataset, as it was read for training, or another one."""
    data = None if run is None else CurriculumConfig.from_yaml(run.config, finished=True).data
    if isinstance(given.reference_dataset, str):
        other = DataConfig(dataset_name=given.reference_dataset)
        if data is None:
            data = other
        elif dataset_place(other) != dataset_place(data):  # other images, brought to the same conventions
            data = dataclasses.replace(
                other, intensity_range=data.intensity_range, alpha_background=data.alpha_background
            )
    data = data or DataConfig()  # a dataset in memory: `_check` asks for one where there is no run
    columns = {name: getattr(given, name) for name in ("image_column", "label_column", "num_classes", "class_names")}
    data = dataclasses.replace(data, **{name: value for name, value in columns.items() if value not in (None, [])})
    return _in_shape(data, pipeline)


def _in_shape(data: DataConfig, pipeline: DPCurriculumPipeline) -> DataConfig:
    return dataclasses.replace(data, resolution=pipeline.image_size[0], num_channels=pipeline.num_channels)


def _check_classes(pipeline: DPCurriculumPipeline, reference: PrivateImages) -> None:
    """Refuses a reference whose class i is not the model's class i; what has no names is taken on trust."""
    ours = tuple(sorted(pipeline.labels, key=pipeline.labels.__getitem__))
    theirs = reference.class_names
    unnamed = tuple(str(index) for index in range(len(theirs)))
    same = len(theirs) == pipeline.num_classes and (theirs == ours or unnamed in (ours, theirs) or not ours)
    if not same:
        raise ValueError(
            f"Expected the reference to have the classes of the model, {pipeline.num_classes} ({_shorten(ours)}): it "
            f"has {len(theirs)} ({_shorten(theirs)}). Classes are the ClassLabel names of a column, in their order."
        )


def _shorten(names: tuple[str, ...]) -> str:
    return ", ".join(names[:10]) + (", ..." if len(names) > 10 else "")


def _sample_lessons(
    run: RunFolder, pipeline: DPCurriculumPipeline, num_images: int
) -> Iterator[tuple[LessonGroup, torch.Tensor, torch.Tensor]]:
    """The lessons that were taught together, and images and labels of what they left."""
    unet = pipeline.unet
    for group in plan_lessons(CurriculumConfig.from_yaml(run.config, finished=True)):
        weights = taught_weights(run, group)
        if not weights.is_dir():  # the run was stopped before the end of this lesson
            break
        pipeline.unet = load_unet(weights).to(unet.device)
        yield group, *sample_images(pipeline, num_images)
    pipeline.unet = unet


def _stage_points(
    run: RunFolder,
    left: Sequence[tuple[LessonGroup, torch.Tensor, torch.Tensor]],
    pipeline: DPCurriculumPipeline,
    reference: PrivateImages,
    name: str,
    final: Evaluation,
) -> Iterator[StagePoint]:
    """Points for the model after each lesson, then the final one: accuracy of a CNN and distance, by epsilon spent."""
    config = CurriculumConfig.from_yaml(run.config, finished=True)
    report, charged = pipeline.privacy or {}, set()
    rows = report.get("mechanisms", [])

    def epsilon(rows: Sequence[Mapping[str, Any]]) -> float:
        if report.get("epsilon") is None:  # a run without a guarantee has none for its lessons, either
            return float("inf")
        events, budget = events_of_report({"mechanisms": rows}), config.privacy
        return compute_epsilon(events, budget.target_delta, adjacency=budget.adjacency, group_size=budget.group_size)

    measure = functools.partial(
        evaluate_images,
        reference=reference,
        reference_name=name,
        classifiers=("cnn",),
        reference_network=final.reference_network,
        device=_device_of_networks(pipeline),
    )
    for group, images, labels in left:
        # As charged, not as planned: what was lost to an interruption was paid twice.
        charged |= {mechanism.name for mechanism in mechanisms_of([group])}
        spent = epsilon([row for row in rows if row["name"] in charged])
        yield _stage_point(group_name(group), spent, measure(images, labels))
    hard = any(row["name"] == DP_SGD for row in rows)
    if hard or len(left) < len(plan_lessons(config)):
        if "accuracy_cnn" not in [metric.name for metric in final.metrics]:
            final = measure(final.images, final.labels)
        yield _stage_point("dp_sgd" if hard else "stopped", epsilon(rows), final)


def _stage_point(stage: str, epsilon: float, found: Evaluation) -> StagePoint:
    return StagePoint(stage, epsilon, found.value("accuracy_cnn"), found.value("fd_classifier"))
