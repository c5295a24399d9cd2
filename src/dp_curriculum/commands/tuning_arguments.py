"""Options of `tune`, which `plan` has too. Apart from the others, which need nothing of training."""

from __future__ import annotations

import argparse

from dp_curriculum.commands.arguments import CommandParser
from dp_curriculum.training.tuning_plan import TuningOptions, parse_settings


def add_tuning_arguments(parser: CommandParser) -> None:
    """Adds the options that [`tuning_options`] reads."""
    parser.add_argument(
        "--vary",
        nargs="+",
        metavar="NAME=V,V",
        help="Settings to try: all combinations of these values. Example: dp_learning_rate=0.001,0.003.",
    )
    parser.add_argument("--random_settings", type=int, help="Draw this many of the combinations. Default: all.")
    parser.add_argument(
        "--expected_tries", type=float, help="Tries on average. Their number is random. Default: one per setting."
    )
    parser.add_argument(
        "--score",
        default="held_out",
        help="held_out: a noisy count of held-out images that are classified right. synthetic: no private image.",
    )
    parser.add_argument(
        "--score_noise_multiplier",
        type=float,
        help="Noise of the count, in images. Default: a hundredth of the held-out images, and at least 10.",
    )
    parser.add_argument("--score_images", type=int, default=2000, help="Images that are generated for a score.")


def tuning_options(given: argparse.Namespace) -> TuningOptions | None:
    """The tuning that `--vary` and the options beside it ask for; `None` without it."""
    if given.vary is None:
        return None
    settings = parse_settings(given.vary, given.random_settings, given.seed)
    return TuningOptions(
        settings,
        expected_tries=len(settings) if given.expected_tries is None else given.expected_tries,
        score=given.score,
        score_noise_multiplier=given.score_noise_multiplier,
        num_images=given.score_images,
    )
