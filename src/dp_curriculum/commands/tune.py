"""`dp-curriculum tune`."""

from __future__ import annotations

from collections.abc import Sequence

from dp_curriculum.commands.arguments import config_parser, parse_config
from dp_curriculum.commands.plan import public_shape, settled_autoencoder
from dp_curriculum.commands.tuning_arguments import add_tuning_arguments, tuning_options
from dp_curriculum.data.places import settle_channels
from dp_curriculum.data.sources import open_images
from dp_curriculum.lessons.public_images import check_not_private
from dp_curriculum.runtime.processes import check_launch, process_state
from dp_curriculum.training.tuning import tune
from dp_curriculum.training.tuning_plan import format_tuning, plan_tuning


def main(args: Sequence[str]) -> int:
    """Tries settings in private, and keeps the best training under one budget for all of it."""
    parser = config_parser("tune", main.__doc__)
    parser.add_argument("--output_dir", required=True, help="A new or empty folder for the training that is kept.")
    add_tuning_arguments(parser)
    check_launch()
    given, config = parse_config(parser, args)
    if process_state().num_processes > 1:
        raise ValueError("Expected tune to run in one process: start it without a launcher.")
    options = tuning_options(given)
    if options is None:
        raise ValueError("Expected --vary to be given, for example --vary dp_learning_rate=0.001,0.003.")
    check_not_private(config)
    config, _ = settled_autoencoder(config, has_weights=True)
    source = open_images(config.data)
    config = settle_channels(config, source.num_channels)
    size, num_classes = public_shape(config, source)
    plan = plan_tuning(config, options, dataset_size=size, num_classes=num_classes)
    print(format_tuning(config, plan), flush=True)
    report = tune(config, plan, output_dir=given.output_dir)
    print(f"kept in {given.output_dir}\n{report.statement()}")
    return 0
