"""`dp-curriculum plan`."""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from dp_curriculum.commands.arguments import config_parser, parse_config
from dp_curriculum.commands.tuning_arguments import add_tuning_arguments, tuning_options
from dp_curriculum.config import CurriculumConfig
from dp_curriculum.data.places import NUM_TRAIN_DIGITS, check_one_place, is_folder_name, settle_channels
from dp_curriculum.data.summary import describe_data
from dp_curriculum.diffusion.precision import launched_precision
from dp_curriculum.lessons.public_images import check_not_private
from dp_curriculum.privacy.accounting import compute_epsilon
from dp_curriculum.training.outlook import compare_budgets, describe_prospects, prospects
from dp_curriculum.training.plan import BudgetPlan, plan_budget
from dp_curriculum.training.tuning_plan import format_tuning, plan_tuning
from dp_curriculum.training.unit_comparison import compare_units


if TYPE_CHECKING:
    import torch

    from dp_curriculum.data.images import ImageSource
    from dp_curriculum.training.cost_estimate import CostEstimate
    from dp_curriculum.training.encoding import Encoder
    from dp_curriculum.training.starting import Start


def main(args: Sequence[str]) -> int:
    """Prints how the data is understood, mechanisms, noise, epsilon, time and memory. It reads no image."""
    given, config = _parsed(args)
    check_one_place(config.data)
    check_not_private(config)
    config, encoder = settled_autoencoder(config)
    config, start = _settled_start(config)
    source = _local_source(config)
    config = settle_channels(config, None if source is None else source.num_channels)
    size, num_classes = public_shape(config, source)
    if encoder is not None:
        encoder.check_channels(config)
        _print_lines([encoder.describe(config), *encoder.warnings])
    if start is not None:
        start.check_channels(config)
        _print_lines([start.describe(), *start.warnings])
    _print_lines(["Data: no private images"] if config.data.has_no_images else describe_data(config, source))
    if given.suggest is not None:
        config = _suggested(config, Path(given.suggest), dataset_size=size, num_classes=num_classes, hours=given.hours)
    plan = plan_budget(config, dataset_size=size, num_classes=num_classes)
    print(format_plan(config, plan))
    options = tuning_options(given)
    if options is not None:
        print(format_tuning(config, plan_tuning(config, options, dataset_size=size, num_classes=num_classes)))
    if given.no_estimate:
        _print_lines(describe_prospects(config, plan, prospects(config, plan, None)))
        _print_lines(compare_units(config, plan, None))
    else:
        # Imported only when needed, because diffusers and accelerate take seconds.
        from dp_curriculum.runtime.processes import process_state
        from dp_curriculum.training.cost_estimate import estimate_cost

        device = process_state().device
        config = config.replace(mixed_precision=launched_precision(config.runtime.mixed_precision))
        cost = estimate_cost(
            config, num_classes=num_classes, dataset_size=size, device=device, start=start, encoder=encoder
        )
        _print_lines(describe_prospects(config, plan, prospects(config, plan, cost.num_trained)))
        _print_lines(compare_budgets(config, plan, cost.num_trained))
        _print_lines(compare_units(config, plan, cost.num_trained))
        print(_format_estimate(cost, device, has_latents=encoder is not None))
    return 0


def _parsed(args: Sequence[str]) -> tuple[argparse.Namespace, CurriculumConfig]:
    """Arguments of the command, and the configuration that they make."""
    parser = config_parser("plan", main.__doc__)
    parser.add_argument(
        "--no_estimate",
        action="store_true",
        help="Leave out time, memory and other budgets, which need a short trial.",
    )
    parser.add_argument(
        "--suggest",
        nargs="?",
        const="suggested.yaml",
        metavar="FILE",
        help="Choose stages, network, steps, batch and sampler, and write the configuration to a new file.",
    )
    parser.add_argument("--hours", type=float, default=2.0, help="Time for the training that --suggest chooses for.")
    add_tuning_arguments(parser)
    names = {word.split("=")[0] for word in args}
    if "--suggest" in names:
        from dp_curriculum.training.suggestion import LEFT_OPEN, WITH_PUBLIC_IMAGES

        parser.set_defaults(**LEFT_OPEN)
        if "--pretrain_dataset_name" in names:
            parser.set_defaults(stages=WITH_PUBLIC_IMAGES)
    given, config = parse_config(parser, args)
    if given.suggest is not None and Path(given.suggest).exists():
        raise ValueError(f"Expected --suggest={given.suggest} to be a new file: it is there already; name another.")
    return given, config


def _suggested(
    config: CurriculumConfig, path: Path, *, dataset_size: int, num_classes: int, hours: float
) -> CurriculumConfig:
    """The configuration that suits the data, the budget and the time, written to a new file."""
    from dp_curriculum.runtime.processes import process_state
    from dp_curriculum.training.cost_estimate import estimate_cost
    from dp_curriculum.training.suggestion import suggest

    def measure(tried: CurriculumConfig) -> CostEstimate:
        device = process_state().device
        return estimate_cost(tried, num_classes=num_classes, dataset_size=dataset_size, device=device)

    found = suggest(config, dataset_size=dataset_size, num_classes=num_classes, hours=hours, measure=measure)
    _print_lines(found.describe())
    found.to_yaml(path)
    print(f"written to {path}: dp-curriculum train --config {path} --output_dir out")
    return found.config


def _settled_start(config: CurriculumConfig) -> tuple[CurriculumConfig, Start | None]:
    """The model to start from, of which a plan needs no weights. It is imported only when needed: it loads torch."""
    if config.start.pretrained_model_name_or_path is None:
        return config, None
    from dp_curriculum.training.starting import settle_start

    return settle_start(config, has_weights=False)


def settled_autoencoder(
    config: CurriculumConfig, *, has_weights: bool = False
) -> tuple[CurriculumConfig, Encoder | None]:
    """The autoencoder to encode with, of which a plan needs no weights. It is imported only when needed."""
    if not config.has_latents:
        return config, None
    from dp_curriculum.training.encoding import settle_autoencoder

    return settle_autoencoder(config, has_weights=has_weights)


def _print_lines(lines: Iterable[str]) -> None:
    for line in lines:
        print(line)


def _local_source(config: CurriculumConfig) -> ImageSource | None:
    """A dataset in a folder, opened for its metadata: no row is read. The Hub is not asked."""
    data = config.data
    if data.has_no_images:
        from dp_curriculum.lessons.public_images import public_source

        return public_source(config) if is_folder_name(str(config.public_images.pretrain_dataset_name)) else None
    if data.is_embedded or (data.train_data_dir is None and not is_folder_name(data.dataset_name)):
        return None
    from dp_curriculum.data.sources import open_images  # takes a second to import

    return open_images(data)


def public_shape(config: CurriculumConfig, source: ImageSource | None = None) -> tuple[int, int]:
    """
    Number of images, or of persons, that training assumes, and of classes, as far as they are known without a look at
    the data.

    Args:
        config ([`CurriculumConfig`]): The configuration.
        source ([`ImageSource`], *optional*): The opened dataset, which may name its classes.
    """
    if config.data.is_embedded:
        if config.data.num_classes not in (None, 10):
            raise ValueError(
                f"Expected --num_classes={config.data.num_classes} to be 10 for the digits: name your own images with "
                "--train_data_dir or --dataset_name, which a plan does not read."
            )
        return config.data.training_size(config.privacy.public_dataset_size or NUM_TRAIN_DIGITS), 10
    if config.privacy.public_dataset_size is None and not config.data.has_no_images:
        raise ValueError(
            f"Expected --public_dataset_size to be given: a plan is made before the {config.data.unit}s are counted."
        )
    num_classes = config.data.num_classes if source is None else len(source.class_names)
    if num_classes is None:
        raise ValueError("Expected --num_classes to be given: a plan is made before the dataset is opened.")
    return config.data.training_size(
        config.privacy.public_dataset_size or 1
    ), num_classes  # none are 1 that is not read


def format_plan(config: CurriculumConfig, plan: BudgetPlan) -> str:
    """The budget as a table: each mechanism, what it spends alone, and what is spent after it."""
    budget = config.privacy

    def epsilon(first: int, last: int) -> str:
        if budget.non_private:
            return "inf"
        events, delta = plan.events[first:last], budget.target_delta
        return f"{compute_epsilon(events, delta, adjacency=budget.adjacency, group_size=budget.group_size):.4f}"

    rows = [("stage", "sampling", "noise multiplier", "norm bound", "steps", "epsilon alone", "epsilon so far")]
    for index, mechanism in enumerate(plan.mechanisms):
        event = mechanism.event
        sampling = "all images" if event.sample_rate == 1 else f"Poisson {event.sample_rate:.6g}"
        numbers = (f"{event.noise_multiplier:.5g}", f"{mechanism.clip_norm:.5g}", f"{event.num_steps}")
        rows.append((mechanism.name, sampling, *numbers, epsilon(index, index + 1), epsilon(0, index + 1)))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    table = "\n".join("  ".join(cell.ljust(width) for cell, width in zip(row, widths)).rstrip() for row in rows)
    stages = ", ".join(config.curriculum.stages)
    left = "" if config.data.holdout is None else " to train on"
    target = "none" if budget.non_private else f"{budget.target_epsilon:g} at delta {budget.target_delta:g}"
    size = "no" if config.data.has_no_images else f"{plan.dataset_size:,}"
    return (
        f"{size} {plan.unit}s{left}, {plan.num_classes} classes; stages: {stages}\n"
        f"{table}\ntarget: epsilon {target}, {budget.adjacency}"
    )


def _format_estimate(cost: CostEstimate, device: torch.device, *, has_latents: bool = False) -> str:
    place = (
        f"cpu, {cost.num_threads} thread{'' if cost.num_threads == 1 else 's'}"
        if device.type == "cpu"
        else device.type
    )
    parameters = f"{cost.num_parameters:,} parameters"
    if cost.num_trained < cost.num_parameters:
        parameters += f", of which noisy steps train {cost.num_trained:,}"
    encoding = of_images = ""
    if has_latents:
        read, kept = (f"{size / 1e9:.2f} GB" for size in cost.dataset_bytes)
        encoding = f", encoding {_duration(cost.encoding_seconds)}"
        in_all = f": {cost.peak_bytes / 1e9:.2f} GB in all" if device.type == "cpu" else ""
        of_images = f"; the images take {read} until they are encoded, then {kept}{in_all}"
    matching = ""
    if cost.matching_seconds:
        matching = f"; beside that, {_duration(cost.matching_seconds)} per 10,000 public images"
    return (
        f"estimate on this machine ({place}): {parameters}; {_duration(cost.seconds)}: reading "
        f"{_duration(cost.reading_seconds)}{encoding}, queries {_duration(cost.query_seconds)}, pretraining "
        f"{_duration(cost.pretraining_seconds)}, DP-SGD {_duration(cost.dp_sgd_seconds)}, sample sheets "
        f"{_duration(cost.sheet_seconds)}; {cost.memory_bytes / 1e9:.2f} GB of tensors at the peak{of_images}"
        f"{matching}"
    )


def _duration(seconds: float) -> str:
    for unit, length in (("days", 86400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.1f} {unit}"
    return f"{seconds:.0f} seconds"
