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

from dp_curriculum.commands.arguments import CommandParser, add_filter_argument, add_thread_argument, model_folder
from dp_curriculum.commands.evaluate_reference import (
    HELD_OUT,
    Reference,
    find_reference,
    load_reference,
    load_training,
)
from dp_curriculum.commands.sample import load_pipeline, settle_threads
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.images import PrivateImages
from dp_curriculum.evaluation.classifiers import CLASSIFIERS
from dp_curriculum.evaluation.evaluation import MIN_IMAGES, Evaluation, evaluate_images, evaluate_leakage
from dp_curriculum.evaluation.evaluation_report import StagePoint, format_value, save_nearest_neighbors, save_report
from dp_curriculum.evaluation.inception import check_inception
from dp_curriculum.evaluation.sampling import sample_images, train_judge
from dp_curriculum.lessons.planned import LessonGroup, group_name, mechanisms_of, plan_lessons
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.privacy.accounting import compute_epsilon
from dp_curriculum.privacy.mechanism import DP_SGD
from dp_curriculum.privacy.verification import events_of_report
from dp_curriculum.runs.run_contents import load_unet, taught_weights
from dp_curriculum.runs.run_folder import RunFolder
from dp_curriculum.runtime.processes import process_state


_MOST_OF_A_LESSON = 2000  # images


def main(args: Sequence[str]) -> int:
    """Measures utility, fidelity and, with --leakage, leakage of a model's images, and writes a report."""
    given = vars(_parser().parse_args(args))
    model = given.pop("model")
    folder = _report_folder(given["output_dir"], RunFolder(Path(model)))
    replaces = (folder / "evaluation.json").exists()
    evaluation = evaluate(model, **given)
    if evaluation is None:  # another process computes the numbers
        return 0
    for metric in evaluation.metrics:
        print(f"{metric.name:<24} {format_value(metric):<20} {metric.meaning} ({metric.data}; {metric.privacy})")
    print(f"report in {folder}{', in place of an earlier one' if replaces else ''}")
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
    filter_by_classifier: bool = False,
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
        filter_by_classifier (`bool`, *optional*, defaults to `False`): Draw images again that a classifier, trained
            on other generated images, puts into another class, as `synthesize` does.
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
        report_html=report_html, filter_by_classifier=filter_by_classifier, output_dir=output_dir,
    )  # fmt: skip
    run = _local_run(given.model)
    folder = _check(given, run)
    state = process_state()
    pipeline = load_pipeline(given.model, state)
    settle_threads(pipeline, cpu_threads, num_images)
    pipeline.set_progress_bar_config(disable=True)  # `sample_images` has its own bar
    found = find_reference(given, run, pipeline)
    reference = load_reference(given, run, found, pipeline)
    if reference.num_classes == 1 and (given.each_stage or given.filter_by_classifier):
        raise ValueError(
            "Refusing to train classifiers for a model of one class: there are no classes to compare. Leave out "
            "--each_stage and --filter_by_classifier."
        )
    images, labels = _sample(given, pipeline, given.num_images)
    lessons = list(_sample_lessons(given, run, pipeline)) if given.each_stage and run else []
    if not state.is_main_process:  # it has sampled its share; the numbers are computed once
        return None
    evaluation = _measure(given, pipeline, found, reference, images, labels)
    if given.leakage and run is not None:
        evaluation = _attack(evaluation, run, pipeline, reference, folder)
    stages: list[StagePoint] = []
    if given.each_stage and run is not None:
        stages = list(_stage_points(run, lessons, pipeline, reference, found.name, evaluation))
    statement = "No privacy report." if pipeline.privacy is None else pipeline.privacy["statement"]
    save_report(
        folder,
        evaluation,
        reference,
        title=f"Evaluation of {Path(given.model).resolve().name}",
        epsilon=statement,
        reference_is_private=found.was_trained_on,
        reference_is_public=found.is_public,
        filter_by_classifier=given.filter_by_classifier,
        stages=stages,
        as_html=given.report_html,
    )
    return evaluation


def _sample(
    given: argparse.Namespace, pipeline: DPCurriculumPipeline, num_images: int
) -> tuple[torch.Tensor, torch.Tensor]:
    judge = train_judge(pipeline) if given.filter_by_classifier else None
    return sample_images(pipeline, num_images, judge=judge)


def _measure(
    given: argparse.Namespace,
    pipeline: DPCurriculumPipeline,
    found: Reference,
    reference: PrivateImages,
    images: torch.Tensor,
    labels: torch.Tensor,
) -> Evaluation:
    return evaluate_images(
        images,
        labels,
        reference,
        reference_name=found.name,
        reference_is_private=found.was_trained_on,
        reference_is_public=found.is_public,
        classifiers=given.classifiers,
        num_seeds=given.num_seeds,
        inception_weights=given.inception_weights,
        device=_device_of_networks(pipeline),
    )


def _attack(
    evaluation: Evaluation, run: RunFolder, pipeline: DPCurriculumPipeline, reference: PrivateImages, folder: Path
) -> Evaluation:
    """The evaluation with the attacks on the training images, of which it leaves a sheet in the folder."""
    training = load_training(run, pipeline)
    attacks = evaluate_leakage(pipeline, evaluation.images, training, reference)
    save_nearest_neighbors(folder / "PRIVATE_nearest_training_images.png", evaluation.images, training)
    return dataclasses.replace(evaluation, metrics=(*evaluation.metrics, *attacks))


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
    add_filter_argument(parser)
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


def _sample_lessons(
    given: argparse.Namespace, run: RunFolder, pipeline: DPCurriculumPipeline
) -> Iterator[tuple[LessonGroup, torch.Tensor, torch.Tensor]]:
    """The lessons that were taught together, and images and labels of what they left."""
    unet = pipeline.unet
    for group in plan_lessons(CurriculumConfig.from_yaml(run.config, finished=True)):
        weights = taught_weights(run, group)
        if not weights.is_dir():  # the run was stopped before the end of this lesson
            break
        pipeline.unet = load_unet(weights).to(unet.device)
        yield group, *_sample(given, pipeline, min(given.num_images, _MOST_OF_A_LESSON))
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
