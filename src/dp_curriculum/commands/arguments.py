"""Command-line arguments: every field of the configuration is a flag, and a YAML file sets the defaults."""

from __future__ import annotations

import argparse
import difflib
import os
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
    (("person_column", None), ("person_from", None)),
)


# What a file says of its own images, and not of the folder that takes their place. Whom the guarantee is for stays: to
# forget it in silence would weaken it, and a folder that does not name persons is refused.
_OF_THE_IMAGES = (
    *("dataset_config_name", "dataset_split", "image_column", "label_column", "image_root"),
    *("num_classes", "class_names", "public_dataset_size"),
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
        raise ValueError(f"{message[:1].upper()}{message[1:]}: {self._nearest(message)}see --help.")

    def _nearest(self, message: str) -> str:
        """The option that an unknown one was probably meant to be."""
        if not message.startswith("unrecognized arguments"):
            return ""
        words = [word.partition("=")[0] for word in message.split() if word.startswith("--")]
        near = [difflib.get_close_matches(word, self._option_string_actions, n=1, cutoff=0.8) for word in words]
        meant = [match for matches in near for match in matches]
        return f"did you mean {' and '.join(meant)}? Else " if meant else ""


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
        fields = {name: value for section in values.values() for name, value in section.items()}
        parser.set_defaults(**_of_the_same_images(fields, Path(path), args))
    for one, other in _RIVALS:
        for name, (rival, unset) in ((one[0], other), (other[0], one)):
            if _is_given(name, args) and not _is_given(rival, args):
                parser.set_defaults(**{rival: unset})


def _of_the_same_images(fields: dict[str, Any], path: Path, args: Sequence[str]) -> dict[str, Any]:
    """
    The fields of a file, without what it says of its own images where a folder is named in their place.

    Another `--dataset_name` is taken for a copy of the same images, and that is said.
    """
    names = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    names.add_argument("--train_data_dir")
    names.add_argument("--dataset_name")
    given = names.parse_known_args(args)[0]
    if given.train_data_dir is not None and not _is_same_folder(given.train_data_dir, fields["train_data_dir"]):
        unset = {name: value for section in CurriculumConfig().to_dict().values() for name, value in section.items()}
        return fields | {name: unset[name] for name in _OF_THE_IMAGES}
    is_other = given.dataset_name not in (None, fields["dataset_name"])
    size = None if _is_given("public_dataset_size", args) else fields["public_dataset_size"]
    if is_other and size is not None and os.environ.get("RANK", "0") == "0":
        print(
            f"{path.name} is for {size:,} images of {fields['dataset_name']}: --dataset_name={given.dataset_name} is "
            "taken for a copy of them. If it is not, give its --public_dataset_size and --num_classes.",
            file=sys.stderr,
        )
    return fields


def _is_same_folder(given: str, saved: str | None) -> bool:
    """True if a folder is that of a file, which a run saves with its whole path."""
    return saved is not None and Path(given).resolve() == Path(saved).resolve()


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


def add_filter_argument(parser: CommandParser) -> None:
    """Adds `--filter_by_classifier` to a command whose images are shared or measured."""
    parser.add_argument(
        "--filter_by_classifier",
        action="store_true",
        help="Draw images again that a classifier, trained on other generated images, puts into another class.",
    )


def add_dataset_ledger_argument(parser: CommandParser) -> None:
    """Adds `--dataset_ledger` to a command that shares what a run made."""
    parser.add_argument(
        "--dataset_ledger",
        help="The ledger that the run is charged to, which notes what is shared. Needed only if it was moved.",
    )


def model_folder(model: str) -> Path | None:
    """
    The folder of a local model; `None` for a Hub id.

    Raises:
        ValueError: If the folder holds no model, or is in a folder that is there and is not there itself.
    """
    folder = Path(model)
    if folder.is_dir():
        if not (folder / "model_index.json").exists():
            raise ValueError(f"Expected {folder} to be the folder of a model: it holds no model_index.json.")
        return folder
    if folder.is_absolute() or (folder.parent != Path() and folder.parent.is_dir()):
        raise ValueError(f"Expected {folder} to be the folder of a model, or a Hub id: there is no such folder.")
    return None
