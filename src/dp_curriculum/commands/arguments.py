"""Command-line arguments: every field of the configuration is a flag, and a YAML file sets the defaults."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from dp_curriculum.config import CurriculumConfig
from dp_curriculum.config_history import check_flags
from dp_curriculum.data.places import DIGITS


# One excludes the other: the flag of one takes the place of the other in the file. With the value that is unset.
_RIVALS = (
    (("lesson_budget_share", None), ("lesson_noise_multiplier", None)),
    (("dataset_name", DIGITS), ("train_data_dir", None)),
)


class CommandParser(HfArgumentParser):
    """Reports a wrong flag as a `ValueError`, which ends in one line."""

    def __init__(self, command: str, description: str | None, sections: Iterable[Any] = ()) -> None:
        super().__init__(sections, prog=f"dp-curriculum {command}", description=description, allow_abbrev=False)
        self.command = command
        for action in self._actions:
            if action.choices is not None:  # shown, and checked by the configuration, which also says why
                action.metavar, action.choices = f"{{{','.join(map(str, action.choices))}}}", None

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        check_flags(self.command, sys.argv[1:] if args is None else args, self._option_string_actions)
        return super().parse_known_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        raise ValueError(f"{message[:1].upper()}{message[1:]}: see --help.")


def config_parser(command: str, description: str | None) -> CommandParser:
    """A parser with a flag for each field of each section, and `--config`."""
    parser = CommandParser(command, description, CurriculumConfig.sections().values())
    parser.add_argument("--config", help="YAML file of sections and fields, as in examples/configs.")
    return parser


def parse_config(parser: CommandParser, args: Sequence[str]) -> tuple[argparse.Namespace, CurriculumConfig]:
    """Parses a configuration: flags override the YAML file, and the file overrides the defaults."""
    config_defaults(parser, args)
    given = parser.parse_args(args)
    fields = {field: getattr(given, field) for section in CurriculumConfig().to_dict().values() for field in section}
    return given, CurriculumConfig().replace(**fields)


def config_defaults(parser: CommandParser, args: Sequence[str]) -> None:
    """Makes the fields of the YAML file that `--config` names the defaults of their flags."""
    first = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    first.add_argument("--config")
    path = first.parse_known_args(args)[0].config
    if path is not None:
        values = CurriculumConfig.from_yaml(path).to_dict()
        parser.set_defaults(**{name: value for section in values.values() for name, value in section.items()})
    for one, other in _RIVALS:
        for name, (rival, unset) in ((one[0], other), (other[0], one)):
            if _is_given(name, args) and not _is_given(rival, args):
                parser.set_defaults(**{rival: unset})


def _is_given(name: str, args: Sequence[str]) -> bool:
    return any(arg == f"--{name}" or arg.startswith(f"--{name}=") for arg in args)


def add_sampling_arguments(parser: CommandParser) -> None:
    """Adds the options that all commands that generate images have in common."""
    parser.add_argument("--num_inference_steps", type=int, help="Denoising steps. Defaults to the saved value.")
    parser.add_argument(
        "--guidance_scale", type=float, help="Scale of classifier-free guidance. Defaults to the saved value."
    )
    parser.add_argument("--s_churn", type=float, help="Noise added back while sampling. Defaults to the saved value.")
    parser.add_argument("--batch_size", type=int, default=64, help="Images computed at once.")
    parser.add_argument(
        "--seed", type=int, default=0, help="Seed. Image i is the same at any batch size, up to rounding."
    )
    add_thread_argument(parser)


def add_thread_argument(parser: CommandParser) -> None:
    """Adds `--cpu_threads`, as a configuration has it."""
    parser.add_argument(
        "--cpu_threads",
        type=int,
        help="Threads per process on a CPU. If unset: its cores, or fewer if those are faster.",
    )


def model_folder(model: str) -> Path | None:
    """The folder of a local model; `None` for a Hub id."""
    return Path(model) if Path(model).is_dir() else None
