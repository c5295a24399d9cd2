"""The `dp-curriculum` command. Every field of the configuration is a flag; exit status 2 is a usage error."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

import torch
from accelerate import PartialState
from transformers import HfArgumentParser

from dp_curriculum.accounting import PrivacyBudgetExceeded, compute_epsilon
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.cost_estimate import CostEstimate, estimate_cost
from dp_curriculum.curriculum import CurriculumResult, run_curriculum
from dp_curriculum.data import DIGITS, NUM_TRAIN_DIGITS
from dp_curriculum.ledger import LedgerLockedError, LedgerTamperedError
from dp_curriculum.per_image_gradients import PerImageGradientError
from dp_curriculum.pipeline_dp_curriculum import DPCurriculumPipeline
from dp_curriculum.plan import BudgetPlan, plan_budget
from dp_curriculum.sheets import save_sheet
from dp_curriculum.verification import Check, verify_report


USAGE_ERROR, BUDGET_ERROR, STORAGE_ERROR, INTERRUPTED = 2, 4, 5, 130


class _Parser(HfArgumentParser):
    """Reports a wrong flag in one line."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}: see --help.")


def _parser(command: str, description: str | None, sections: Iterable[Any] = ()) -> _Parser:
    return _Parser(sections, prog=f"dp-curriculum {command}", description=description, allow_abbrev=False)


def _parse_config(parser: _Parser, args: Sequence[str]) -> tuple[argparse.Namespace, CurriculumConfig]:
    """Flags over the YAML file over the defaults."""
    parser.add_argument("--config", help="YAML file of sections and fields, as in examples/configs.")
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(args)[0].config
    if path is not None:
        values = CurriculumConfig.from_yaml(path).to_dict()
        parser.set_defaults(**{name: value for section in values.values() for name, value in section.items()})
    given = parser.parse_args(args)
    fields = {field: getattr(given, field) for section in CurriculumConfig().to_dict().values() for field in section}
    return given, CurriculumConfig().replace(**fields)


# --- plan ----------------------------------------------------------------------------------------------------------


def plan(args: Sequence[str]) -> int:
    """Prints mechanisms, noise, epsilon, time and memory. It reads no data."""
    parser = _parser("plan", plan.__doc__, list(CurriculumConfig.sections().values()))
    parser.add_argument("--no_estimate", action="store_true", help="Leave out time and memory, which take a trial.")
    given, config = _parse_config(parser, args)
    size, num_classes = _public_shape(config)
    budget = plan_budget(config, dataset_size=size, num_classes=num_classes)
    print(format_plan(config, budget))
    if not given.no_estimate:
        device = PartialState().device
        print(_format_estimate(estimate_cost(config, num_classes=num_classes, device=device), device))
    return 0


def _public_shape(config: CurriculumConfig) -> tuple[int, int]:
    """Number of images and of classes, as far as they are known without reading the data."""
    if config.data.dataset_name == DIGITS and config.data.train_data_dir is None:
        return config.privacy.public_dataset_size or NUM_TRAIN_DIGITS, 10
    if config.privacy.public_dataset_size is None:
        raise ValueError("Expected --public_dataset_size to be given: a plan is made before the images are counted.")
    if config.data.num_classes is None:
        raise ValueError("Expected --num_classes to be given: a plan is made before the dataset is opened.")
    return config.privacy.public_dataset_size, config.data.num_classes


def format_plan(config: CurriculumConfig, plan: BudgetPlan) -> str:
    """The budget as a table: each mechanism, what it spends alone, and what is spent after it."""
    budget = config.privacy
    header = ("stage", "sampling", "noise multiplier", "norm bound", "steps", "epsilon alone", "epsilon so far")
    rows: list[tuple[str, ...]] = [header]

    def epsilon(count: int, first: int = 0) -> str:
        if budget.non_private:
            return "inf"
        events = plan.events[first:count]
        value = compute_epsilon(events, budget.target_delta, adjacency=budget.adjacency, group_size=budget.group_size)
        return f"{value:.4f}"

    for index, stage in enumerate(plan.stages):
        event = stage.event
        sampling = "all images" if event.sample_rate == 1 else f"Poisson {event.sample_rate:.6g}"
        numbers = (f"{event.noise_multiplier:.5g}", f"{stage.clip_norm:.5g}", f"{event.num_steps}")
        rows.append((stage.name, sampling, *numbers, epsilon(index + 1, index), epsilon(index + 1)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(header))]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    target = "none" if budget.non_private else f"{budget.target_epsilon:g} at delta {budget.target_delta:g}"
    return (
        f"{plan.dataset_size:,} images, {plan.num_classes} classes; stages: {', '.join(config.curriculum.stages)}\n"
        f"{table}\ntarget: epsilon {target}, {budget.adjacency}"
    )


def _format_estimate(cost: CostEstimate, device: torch.device) -> str:
    return (
        f"estimate on this machine ({device.type}): {cost.num_parameters:,} parameters; pretraining "
        f"{_duration(cost.pretraining_seconds)}, DP-SGD {_duration(cost.dp_sgd_seconds)}; "
        f"{cost.memory_bytes / 1e9:.2f} GB of tensors at the peak"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"


# --- train ---------------------------------------------------------------------------------------------------------


def train(args: Sequence[str]) -> int:
    """Trains from easy to hard under one budget, and writes pipeline, sample sheet, privacy report and card."""
    parser = _parser("train", train.__doc__, list(CurriculumConfig.sections().values()))
    parser.add_argument("--output_dir", required=True, help="A new or empty folder.")
    parser.add_argument("--resume", action="store_true", help="Go on with the run that is in --output_dir.")
    parser.add_argument("--overwrite_output_dir", action="store_true", help="Replace the run that is in --output_dir.")
    given, config = _parse_config(parser, args)
    result = run_curriculum(
        config, output_dir=given.output_dir, resume=given.resume, overwrite_output_dir=given.overwrite_output_dir
    )
    if PartialState().is_main_process:
        print(_format_result(result, Path(given.output_dir)))
    return 0 if result.finished else INTERRUPTED


def _format_result(result: CurriculumResult, output_dir: Path) -> str:
    ending = "finished" if result.finished else "interrupted: --resume goes on; what is there can be used"
    return (
        f"{ending}\n  pipeline      {output_dir}\n  sample sheet  {output_dir / 'samples.png'}\n"
        f"  card          {output_dir / 'README.md'}\n  privacy       {result.report.statement()}"
    )


# --- sample --------------------------------------------------------------------------------------------------------


def sample(args: Sequence[str]) -> int:
    """Generates images with a trained pipeline. It spends nothing, however many they are."""
    parser = _parser("sample", sample.__doc__)
    parser.add_argument("model", help="Folder of a run, or a Hub id.")
    parser.add_argument("--output_dir", required=True, help="Folder for the images.")
    parser.add_argument("--num_images", type=int, default=64, help="Number of images.")
    parser.add_argument("--class_label", nargs="+", help="Index or name of one or several classes; all in turn.")
    parser.add_argument("--num_inference_steps", type=int, help="Denoising steps; as saved if unset.")
    parser.add_argument("--guidance_scale", type=float, help="Classifier-free guidance; as saved if unset.")
    parser.add_argument("--s_churn", type=float, help="Noise put back while sampling; as saved if unset.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images computed at once.")
    parser.add_argument("--seed", type=int, default=0, help="Seed; image i is the same at any batch size.")
    given = parser.parse_args(args)
    if given.num_images < 1 or given.batch_size < 1:
        raise ValueError(
            f"Expected --num_images={given.num_images} and --batch_size={given.batch_size} to be positive."
        )
    pipeline = _load_pipeline(given.model).to(PartialState().device)
    labels = _class_labels(pipeline, given.class_label, given.num_images)
    folder = Path(given.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    for start in range(0, given.num_images, given.batch_size):
        indices = range(start, min(start + given.batch_size, given.num_images))
        images = pipeline(
            class_labels=[labels[index] for index in indices],
            generator=[torch.Generator().manual_seed(given.seed + index) for index in indices],
            num_inference_steps=given.num_inference_steps,
            guidance_scale=given.guidance_scale,
            s_churn=given.s_churn,
            output_type="pt",
        ).images
        for index, image in zip(indices, images):
            picture = pipeline.numpy_to_pil(image[None].cpu().permute(0, 2, 3, 1).numpy())[0]
            picture.save(folder / f"{index:06d}-class{labels[index]}.png")
        if start == 0:
            save_sheet(images[:64], folder / "sheet.png", columns=8)
    print(f"{given.num_images} images in {folder}")
    return 0


def _load_pipeline(model: str) -> DPCurriculumPipeline:
    if Path(model).is_dir() and not (Path(model) / "model_index.json").exists():
        raise ValueError(f"Expected {model} to be the folder of a pipeline: it holds no model_index.json.")
    try:
        return DPCurriculumPipeline.from_pretrained(model)
    except OSError as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"Expected {model} to be a folder or a Hub id of a pipeline: {reason}") from None


def _class_labels(pipeline: DPCurriculumPipeline, names: list[str] | None, count: int) -> list[int]:
    classes = list(range(pipeline.num_classes))
    if names is not None:
        # A name goes before an index: the classes of digits are named by digits.
        known = pipeline.labels
        classes = [known[name] if name in known else _index(name, pipeline) for name in names]
    return [classes[index % len(classes)] for index in range(count)]


def _index(name: str, pipeline: DPCurriculumPipeline) -> int:
    if not name.isdigit() or int(name) >= pipeline.num_classes:
        raise ValueError(
            f"Expected --class_label={name} to be an index from 0 to {pipeline.num_classes - 1}, or a name: "
            f"{', '.join(pipeline.labels)}."
        )
    return int(name)


# --- verify --------------------------------------------------------------------------------------------------------


def verify(args: Sequence[str]) -> int:
    """Computes epsilon again from the published mechanisms, and compares. Exit status 1 if a claim does not hold."""
    parser = _parser("verify", verify.__doc__)
    parser.add_argument("model", help="Folder of a run, or a privacy.json.")
    path = Path(parser.parse_args(args).model)
    path = path / "privacy.json" if path.is_dir() else path
    try:
        report = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"Expected {path} to be a readable privacy report: {type(error).__name__}.") from None
    checks = verify_report(report)
    print(_format_checks(checks))
    return 0 if all(check.holds for check in checks) else 1


def _format_checks(checks: list[Check]) -> str:
    return "\n".join(
        f"{'holds' if check.holds else 'FAILS'}  {check.name}: claimed {check.claimed}, computed {check.computed}"
        for check in checks
    )


# --- the command ---------------------------------------------------------------------------------------------------


COMMANDS: dict[str, Callable[[Sequence[str]], int]] = {
    "plan": plan,
    "train": train,
    "sample": sample,
    "verify": verify,
}


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a command and returns its exit status: 0, 1 (a claim fails), 2 (usage), 4 (budget), 5 (storage), 130."""
    argv = sys.argv[1:] if argv is None else list(argv)
    if not argv or argv[0] not in COMMANDS:
        print("usage: dp-curriculum COMMAND ..., where COMMAND --help tells more\n")
        for name, command in COMMANDS.items():
            print(f"  {name:<9} {command.__doc__}")
        return 0 if argv[:1] in ([], ["--help"], ["-h"]) else USAGE_ERROR
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    logging.getLogger("httpx").setLevel(logging.WARNING)
    return run_command(COMMANDS[argv[0]], argv[1:])


def run_command(command: Callable[[Sequence[str]], int], args: Sequence[str]) -> int:
    """Runs one command; errors of the user end in one line and the exit status that says whose they are."""
    try:
        return command(args)
    except PrivacyBudgetExceeded as error:
        return _fail(error, BUDGET_ERROR)
    except (LedgerLockedError, LedgerTamperedError) as error:
        return _fail(error, BUDGET_ERROR)
    except (ValueError, PerImageGradientError) as error:
        return _fail(error, USAGE_ERROR)
    except OSError as error:
        return _fail(error, STORAGE_ERROR)
    except KeyboardInterrupt:
        return _fail("interrupted", INTERRUPTED)


def _fail(error: BaseException | str, status: int) -> int:
    print(f"dp-curriculum: error: {error}", file=sys.stderr)
    return status


if __name__ == "__main__":
    sys.exit(main())
