"""`dp-curriculum evaluate`."""

from __future__ import annotations

import argparse
import dataclasses
import functools
import importlib.util
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from dp_curriculum.commands.arguments import CommandParser, add_thread_argument, model_folder
from dp_curriculum.commands.sample import load_pipeline, settle_threads
from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.data.places import dataset_place, share_images
from dp_curriculum.data.reading import load_images
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


def main(args: Sequence[str]) -> int:
    """Measures utility, fidelity and, with --leakage, leakage of a model's images, and writes a report."""
    given = _parser().parse_args(args)
    run = _local_run(given.model)
    folder = _check(given, run)
    state = process_state()
    pipeline = load_pipeline(given.model, state)
    settle_threads(pipeline, given.cpu_threads)
    pipeline.set_progress_bar_config(disable=True)  # `sample_images` has its own bar
    trained = _training_data(run, pipeline)
    data = _reference_data(run, given, pipeline)
    is_private = trained is not None and share_images(trained, dataclasses.replace(data, dataset_split=given.split))
    if given.leakage and is_private:
        raise ValueError(
            f"Refusing to measure --leakage on --split={given.split}: it may hold training images. Name another split."
        )
    reference = load_images(data, given.split)
    _check_classes(pipeline, reference)
    if reference.num_classes == 1 and (given.each_stage or given.inception_weights is None):
        raise ValueError(
            "Refusing to train classifiers for a model of one class: there are no classes to compare. Give "
            "--inception_weights, and leave out --each_stage."
        )
    name = f"{Path(data.train_data_dir or data.dataset_name).name} ({given.split})"
    options = {"reference_name": name, "reference_is_private": is_private, "classifiers": given.classifiers}
    images, labels = sample_images(pipeline, given.num_images)
    lessons = list(_sample_lessons(run, pipeline, min(given.num_images, 2000))) if given.each_stage and run else []
    if not state.is_main_process:  # it has sampled its share; the numbers are computed once
        return 0
    evaluation = evaluate_images(
        images,
        labels,
        reference,
        num_seeds=given.num_seeds,
        inception_weights=given.inception_weights,
        device=_device_of_networks(pipeline),
        **options,
    )
    if given.leakage and trained is not None:
        training = load_images(_in_shape(trained, pipeline), trained.dataset_split)
        leakage = evaluate_leakage(pipeline, images, training, reference)
        evaluation = dataclasses.replace(evaluation, metrics=(*evaluation.metrics, *leakage))
        save_nearest_neighbors(folder / "PRIVATE_nearest_training_images.png", images, training)
    stages = (
        list(_stage_points(run, lessons, pipeline, reference, name, evaluation)) if given.each_stage and run else []
    )
    statement = "No privacy report." if pipeline.privacy is None else pipeline.privacy["statement"]
    save_report(
        folder,
        evaluation,
        reference,
        title=f"Evaluation of {Path(given.model).resolve().name}",
        epsilon=statement,
        reference_is_private=is_private,
        stages=stages,
        as_html=given.report_html,
    )
    for metric in evaluation.metrics:
        print(f"{metric.name:<24} {format_value(metric):<20} {metric.data}; {metric.privacy}")
    print(f"report in {folder}")
    return 0


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
    parser.add_argument("--split", default="test", help="Split of the reference. Choose one that was not trained on.")
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
        return Path(given.output_dir) if given.output_dir is not None else run.root / "run" / "evaluation"
    for option in ("reference_dataset", "output_dir"):
        if getattr(given, option) is None:
            raise ValueError(f"Expected --{option} to be given: the model comes without the run that made it.")
    for option in ("leakage", "each_stage"):
        if getattr(given, option):
            raise ValueError(f"Expected --{option} to come with the folder of a local run: {given.model} is none.")
    return Path(given.output_dir)


def _training_data(run: RunFolder | None, pipeline: DPCurriculumPipeline) -> DataConfig | None:
    """Place of the training images; for a model without its run, as far as its report states it."""
    if run is not None:
        return CurriculumConfig.from_yaml(run.config, finished=True).data
    name = ((pipeline.privacy or {}).get("protected_dataset") or {}).get("name")
    return None if name is None else DataConfig(dataset_name=name)


def _reference_data(run: RunFolder | None, given: argparse.Namespace, pipeline: DPCurriculumPipeline) -> DataConfig:
    """Place of the reference: the run's own dataset, as it was read for training, or another one."""
    data = None if run is None else CurriculumConfig.from_yaml(run.config, finished=True).data
    if given.reference_dataset is not None:
        other = DataConfig(dataset_name=given.reference_dataset)
        if data is None or dataset_place(other) != dataset_place(data):
            data = other
    assert data is not None, "_check asks for --reference_dataset where there is no run"
    columns = {name: getattr(given, name) for name in ("image_column", "label_column", "num_classes")}
    data = dataclasses.replace(data, **{name: value for name, value in columns.items() if value is not None})
    return _in_shape(data, pipeline)


def _in_shape(data: DataConfig, pipeline: DPCurriculumPipeline) -> DataConfig:
    shape = pipeline.unet.config
    return dataclasses.replace(data, resolution=shape.sample_size, num_channels=shape.in_channels)


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
