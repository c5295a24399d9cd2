"""`dp-curriculum inspect`."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path

from dp_curriculum.commands.arguments import CommandParser, config_defaults
from dp_curriculum.config import DataConfig
from dp_curriculum.data.images import ImageSource
from dp_curriculum.data.inspection import (
    NOT_COVERED,
    Inspection,
    contact_sheet,
    format_inspection,
    format_overlap,
    inspect_images,
)
from dp_curriculum.data.places import check_one_place
from dp_curriculum.data.sources import open_images
from dp_curriculum.diffusion.sheets import save_sheet
from dp_curriculum.runs.run_folder import RunFolder


_NAMES_ON_TERMINAL = 5


def main(args: Sequence[str]) -> int:
    """Shows the owner of private images, and only the owner, which of them contribute and why others do not."""
    parser = CommandParser("inspect", main.__doc__, [DataConfig])
    parser.add_argument(
        "data", nargs="?", help="Folder or Hub id of the images. The options below can name it instead."
    )
    parser.add_argument("--config", help="YAML file of a run. Its section `data` is read.")
    parser.add_argument(
        "--output_dir",
        default="PRIVATE-inspection",
        help="Folder for the PRIVATE files: a new one, or that of an earlier call.",
    )
    parser.add_argument(
        "--compare_with", metavar="DATASET", help="A public dataset: report which images are also in it."
    )
    config_defaults(parser, args)
    given = parser.parse_args(args)
    fields = {name: getattr(given, name) for name in (field.name for field in dataclasses.fields(DataConfig))}
    if given.data is not None:
        fields |= {"dataset_name": given.data, "train_data_dir": None}
    config, folder = DataConfig(**fields), Path(given.output_dir)
    check_one_place(config)
    if config.num_channels is None and not config.is_embedded:  # all that the images have is shown
        config = dataclasses.replace(config, num_channels=3)
    _check_folder(folder)
    source, refusal = _open(config)
    public = None if given.compare_with is None else _open_public(config, given.compare_with)
    found = inspect_images(source, config)
    heading = f"{source.option}, --dataset_split={source.split}\n" + "".join(f"{line}\n" for line in refusal)
    other = None if public is None else inspect_images(*public)

    def told(most: int | None) -> str:
        overlap = "" if other is None else f"\n{format_overlap(found, other, most=most)}"
        return f"{heading}{format_inspection(found, most=most)}{overlap}"

    print(f"{told(_NAMES_ON_TERMINAL)}\n{NOT_COVERED}")
    _write(folder, f"{NOT_COVERED}\n{told(None)}\n", found, config)
    print(f"all names and a contact sheet: {folder}")
    return 0


def _open_public(config: DataConfig, name: str) -> tuple[ImageSource, DataConfig]:
    """The other dataset, in the shape of the private one."""
    other = dataclasses.replace(
        _pictures_alone(config),
        dataset_name=name,
        train_data_dir=None,
        image_column=None,
        num_channels=config.channels,
    )
    return open_images(other), other


def _open(config: DataConfig) -> tuple[ImageSource, list[str]]:
    """The images as training would read them; where it refuses to, without classes and persons, and why."""
    try:
        return open_images(config), []
    except ValueError as error:
        refusal = str(error)
    try:
        return open_images(_pictures_alone(config)), [f"training would refuse this: {refusal}"]
    except ValueError:
        raise ValueError(refusal) from None


def _pictures_alone(config: DataConfig) -> DataConfig:
    return dataclasses.replace(
        config, label_column="none", class_names=[], num_classes=None, person_column=None, person_from=None
    )


def _check_folder(folder: Path) -> None:
    """Refuses a place from which the files could be shared by mistake."""
    for parent in (folder.resolve(), *folder.resolve().parents):
        if RunFolder(parent).holds_run or (parent / "model_index.json").exists():
            raise ValueError(
                f"Expected --output_dir={folder} to lie outside of the run in {parent}: what inspect writes is "
                "private."
            )


def _write(folder: Path, text: str, found: Inspection, config: DataConfig) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "PRIVATE_inspection.txt").write_text(text, encoding="utf-8", errors="backslashreplace")
    if any(found.sheet.values()):
        save_sheet(contact_sheet(found, config), folder / "PRIVATE_contact_sheet.png", columns=8)
