"""`dp-curriculum evaluate`."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path

from accelerate import PartialState
from diffusers import UNet2DModel

from dp_curriculum.accounting import compute_epsilon
from dp_curriculum.commands.arguments import CommandParser, model_folder
from dp_curriculum.commands.sample import load_pipeline
from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data import PrivateImages, load_images
from dp_curriculum.evaluation import Evaluation, evaluate_images, evaluate_leakage, sample_images
from dp_curriculum.evaluation_report import StagePoint, format_value, save_nearest_neighbors, save_report
from dp_curriculum.lessons import find_lesson
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.run_folder import RunFolder


def main(args: Sequence[str]) -> int:
    """Measures utility, fidelity and, where asked, leakage of a model's images, and writes a report."""
    parser = CommandParser("evaluate", main.__doc__)
    parser.add_argument("model", help="Folder of a run, or a Hub id.")
    parser.add_argument("--reference_dataset", help="Real images to compare with; the run's own dataset if unset.")
    parser.add_argument("--split", default="test", help="Split of the reference; not the one that was trained on.")
    parser.add_argument("--num_images", type=int, default=5000, help="Images to generate.")
    parser.add_argument("--classifiers", nargs="+", default=["logistic", "cnn"], help="logistic, mlp, cnn, resnet.")
    parser.add_argument("--num_seeds", type=int, default=1, help="Trainings of each classifier.")
    parser.add_argument("--inception_weights", help="File of Inception's weights, for FID, KID and Inception Score.")
    parser.add_argument("--leakage", action="store_true", help="Also attack the model; reads the training images.")
    parser.add_argument("--stages", action="store_true", help="Also evaluate what each lesson left.")
    parser.add_argument("--report_html", action="store_true", help="Also write one self-contained page.")
    parser.add_argument("--output_dir", help="Folder of the report; run/evaluation of a local run if unset.")
    given = parser.parse_args(args)
    pipeline = load_pipeline(given.model).to(PartialState().device)
    pipeline.set_progress_bar_config(disable=True)  # `sample_images` has a bar of its own
    data = _reference_config(given.model, given.reference_dataset, pipeline)
    reference = load_images(data, given.split)
    is_private = _is_training_split(given.model, data, given.split)
    name = f"{Path(data.train_data_dir or data.dataset_name).name} ({given.split})"
    options = {"reference_name": name, "reference_is_private": is_private, "classifiers": given.classifiers}
    images, labels = sample_images(pipeline, given.num_images)
    evaluation = evaluate_images(
        images, labels, reference, num_seeds=given.num_seeds, inception_weights=given.inception_weights, **options
    )
    folder = _report_folder(given.model, given.output_dir)
    if given.leakage:
        training = load_images(data, data.dataset_split)
        leakage = evaluate_leakage(pipeline, images, training, reference)
        evaluation = dataclasses.replace(evaluation, metrics=(*evaluation.metrics, *leakage))
        save_nearest_neighbors(folder / "PRIVATE_nearest_training_images.png", images, training)
    stages = list(_stage_points(given.model, pipeline, reference, name, evaluation)) if given.stages else []
    statement = "No privacy report." if pipeline.privacy is None else pipeline.privacy["statement"]
    save_report(
        folder,
        evaluation,
        reference,
        title=f"Evaluation of {Path(given.model).name}",
        epsilon=statement,
        stages=stages,
        as_html=given.report_html,
    )
    for metric in evaluation.metrics:
        print(f"{metric.name:<24} {format_value(metric):<20} {metric.data}; {metric.privacy}")
    print(f"report in {folder}")
    return 0


def _reference_config(model: str, reference_dataset: str | None, pipeline: DPCurriculumPipeline) -> DataConfig:
    """Where the reference is; the shape is that of the model."""
    folder = model_folder(model)
    data = DataConfig()
    if folder is not None and RunFolder(folder).config.exists():
        data = CurriculumConfig.from_yaml(RunFolder(folder).config).data
    elif reference_dataset is None:
        raise ValueError("Expected --reference_dataset to be given: the model comes without the run that made it.")
    if reference_dataset is not None and reference_dataset != data.dataset_name:
        data = DataConfig(dataset_name=reference_dataset, num_classes=None)
    shape = pipeline.unet.config
    return dataclasses.replace(data, resolution=shape.sample_size, num_channels=shape.in_channels)


def _is_training_split(model: str, data: DataConfig, split: str) -> bool:
    folder = model_folder(model)
    if folder is None or not RunFolder(folder).config.exists():
        return False
    trained = CurriculumConfig.from_yaml(RunFolder(folder).config).data
    same = (trained.dataset_name, trained.train_data_dir) == (data.dataset_name, data.train_data_dir)
    return same and trained.dataset_split == split


def _report_folder(model: str, output_dir: str | None) -> Path:
    if output_dir is not None:
        return Path(output_dir)
    folder = model_folder(model)
    if folder is None:
        raise ValueError("Expected --output_dir to be given for a model of the Hub.")
    return RunFolder(folder).root / "run" / "evaluation"


def _stage_points(
    model: str, pipeline: DPCurriculumPipeline, reference: PrivateImages, name: str, final: Evaluation
) -> Iterator[StagePoint]:
    """What each lesson left, then the final model: accuracy of a CNN and distance, by epsilon spent."""
    folder = model_folder(model)
    if folder is None or not RunFolder(folder).ledger.exists():
        raise ValueError("Expected --stages to be used with the folder of a local run: the Hub has the end only.")
    run = RunFolder(folder)
    config = CurriculumConfig.from_yaml(run.config)
    unet, budget, spent = pipeline.unet, config.privacy, []
    for number, stage in enumerate(config.curriculum.lessons, start=1):
        pipeline.unet = UNet2DModel.from_pretrained(run.lesson(number, stage) / "unet").to(unet.device)
        images, labels = sample_images(pipeline, min(len(final.images), 2000))
        found = evaluate_images(images, labels, reference, reference_name=name, classifiers=("cnn",))
        spent += [planned.event for planned in find_lesson(stage).plan(config)]
        epsilon = compute_epsilon(spent, budget.target_delta, adjacency=budget.adjacency, group_size=budget.group_size)
        yield StagePoint(stage, epsilon, found.value("accuracy_cnn"), found.value("fd_classifier"))
    pipeline.unet = unet
    epsilon = float("inf") if pipeline.privacy is None else pipeline.privacy["epsilon"]
    if "cnn" in [metric.name.removeprefix("accuracy_") for metric in final.metrics]:
        yield StagePoint("dp_sgd", epsilon, final.value("accuracy_cnn"), final.value("fd_classifier"))
