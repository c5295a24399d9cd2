"""Summary of a dataset for the person who named it, before anything is spent. It holds public facts only."""

from __future__ import annotations

from collections.abc import Iterator

from dp_curriculum.config import CurriculumConfig, DataConfig
from dp_curriculum.data.images import ImageSource
from dp_curriculum.data.persons import person_option
from dp_curriculum.data.places import is_folder_name


_MOST_NAMES = 10
_PERSON_WORDS = ("patient", "person", "subject", "participant", "user_id", "speaker", "donor")
_COLOURS = {1: "grey", 3: "colour"}


def describe_data(config: CurriculumConfig, source: ImageSource | None = None) -> list[str]:
    """
    Lines that say how a configuration is understood. No row is read, and nothing that a row decides is in them.

    Args:
        config ([`CurriculumConfig`]): The configuration, its channels settled.
        source ([`ImageSource`], *optional*): The opened dataset. Without it, what it would settle is left out.
    """
    rows = [*_settled(config.data, source), *_declared(config, source)]
    width = max(len(name) for name, _ in rows)
    return ["Data:", *(f"  {name.ljust(width)}  {text}" for name, text in rows)]


def _settled(data: DataConfig, source: ImageSource | None) -> Iterator[tuple[str, str]]:
    """Facts that names and metadata of the dataset settle."""
    if source is None:
        yield "source", f"{_option(data)}, {_place(data)}"
        yield "split", data.dataset_split
        return
    yield "source", _source(data, source)
    others = [name for name in source.other_splits if name != source.split]
    yield "split", source.split + (f"; not used: {_shorten(others)}" if others else "")
    if source.image_column is None:
        yield "images", "image files"
    else:
        why = "--image_column" if data.image_column else "by its type"
        yield "images", f"column {source.image_column} ({why})"
    yield "classes", _classes(data, source)


def _classes(data: DataConfig, source: ImageSource) -> str:
    names = _shorten(source.class_names)
    if source.labels is None:
        hint = "" if data.label_column else "; --label_column names a column"
        if source.image_column is None:
            hint = "; add a sub-folder per class to train several"
        return f"none: all images train one class{hint}"
    if data.label_column:
        why = "--label_column"
    elif source.labels == "sub-folders":
        why = "in the order of --class_names; others add nothing" if data.class_names else "in alphabetical order"
    else:
        why = "by its type"
    if len(source.class_names) == 1:
        return f"one, {names}, by {source.labels}; add a sub-folder per class to train several"
    return f"{len(source.class_names)} by {source.labels} ({why}): {names}"


def _declared(config: CurriculumConfig, source: ImageSource | None) -> Iterator[tuple[str, str]]:
    """Facts that the configuration declares, and what nothing reads."""
    data, unread = config.data, () if source is None else source.unread
    side, embedded = data.resolution, data.is_embedded if source is None else source.kind == "embedded"
    yield "pixels", f"{_COLOURS[data.channels]}, the centre square of each image, resized to {side}x{side}"
    if config.has_latents:
        shape = "x".join(map(str, config.input_shape))
        yield (
            "latents",
            f"each image by itself, as {shape}, by --vae_name_or_path={config.autoencoder.vae_name_or_path}",
        )
    if not embedded:
        low, high = data.intensity_range or ("0", "65535 (floats: 1)")
        hint = "" if data.intensity_range else "; --intensity_range 0 4095 for a 12-bit scanner"
        yield "deep pixels", f"more than 8 bits: {low} is black, {high} is white{hint}"
    size = config.privacy.public_dataset_size
    if size is not None:
        yield "number", f"{size:,} {data.unit}s, public (--public_dataset_size)"
    elif not embedded:
        yield "number", "counted when they are read, and stated on the card; --public_dataset_size declares it instead"
    if data.holdout is not None:
        yield "held out", f"about {data.holdout:.3g} of the {data.unit}s, drawn in secret: training never reads them"
    yield "one person", _person(config, unread)
    if unread:
        yield "not used", _shorten(unread)
    if not embedded:
        yield "unreadable", "such files add nothing, without a message; dp-curriculum inspect lists them for you"


def _person(config: CurriculumConfig, unread: tuple[str, ...]) -> str:
    group_size = config.privacy.group_size
    if config.data.unit == "person":
        together = f"; {group_size} persons together (--group_size)" if group_size > 1 else ""
        return f"any number of images, by {person_option(config.data)}: the guarantee is for the person{together}"
    columns = [name for name in unread if any(word in name.casefold() for word in _PERSON_WORDS)]
    if group_size > 1:
        return f"at most {group_size} images (--group_size)"
    beside = f"; {columns[0]} is not used" if columns else ""
    return f"one image{beside}; if a person may have several, name their column with --person_column"


def _option(data: DataConfig) -> str:
    if data.train_data_dir is not None:
        return f"--train_data_dir={data.train_data_dir}"
    return f"--dataset_name={data.dataset_name}"


def _place(data: DataConfig) -> str:
    if data.is_embedded:
        return "embedded"
    if data.train_data_dir is not None or is_folder_name(data.dataset_name):
        return "a folder"
    return "a name on the Hub; its columns and classes are looked up when training starts"


def _source(data: DataConfig, source: ImageSource) -> str:
    if source.kind == "memory":
        named = "" if data.is_embedded else f", named {source.place} by the configuration"
        return f"a dataset in memory{named}"
    kinds = {"embedded": "embedded", "hub": "on the Hub", "folder": f"the folder {source.place}"}
    return f"{source.option}, {kinds[source.kind]}"


def _shorten(names: tuple[str, ...] | list[str]) -> str:
    return ", ".join(names[:_MOST_NAMES]) + (", ..." if len(names) > _MOST_NAMES else "")
