"""Facts about private images for their owner only: which rows contribute, and why others do not.

Nothing here is covered by a guarantee, and no other part of the package reads what it finds.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dp_curriculum.config import DataConfig
from dp_curriculum.data.images import ImageReference, ImageSource
from dp_curriculum.data.reading import pixel_format
from dp_curriculum.data.workers import chunked, decoder_pool


NOT_COVERED = (
    "PRIVATE: this was read from the images without any noise. It is not covered by an epsilon, must not be shared, "
    "and must not steer choices that are published."
)
_SHEET_CLASSES, _SHEET_COLUMNS = 10, 8
_NO_CLASS = "its label is no declared class"
_NO_PERSON = "it names no person"


@dataclass
class Inspection:
    """
    Facts about the images, row by row.

    Args:
        class_names (`tuple[str, ...]`): The declared classes.
        labels (`str`, *optional*): Where classes come from.
        names (`list[str]`): A file, or the number of a row.
        classes (`list[int]`): Class of each row, or `NO_CONTRIBUTION`.
        persons (`list[str | None]`): Person of each row, or `None`; empty where images are the unit.
        facts (`list[dict]`): Format, mode, size, and the reason why a row cannot be read.
        digests (`list[str]`): Digests of the decoded pixels; empty where there are none.
        columns (`dict[str, Counter]`): How often each value occurs, by column.
        sheet (`dict[int, list[np.ndarray]]`): A few images of each of the first classes.
    """

    class_names: tuple[str, ...]
    labels: str | None
    names: list[str] = field(default_factory=list)
    classes: list[int] = field(default_factory=list)
    persons: list[str | None] = field(default_factory=list)
    facts: list[dict[str, Any]] = field(default_factory=list)
    digests: list[str] = field(default_factory=list)
    columns: dict[str, Counter[str]] = field(default_factory=lambda: defaultdict(Counter))
    sheet: dict[int, list[np.ndarray]] = field(default_factory=lambda: defaultdict(list))

    def contributes(self, row: int) -> bool:
        return self._reason(row) is None

    def _reason(self, row: int) -> str | None:
        if self.facts[row]["reason"] is not None or self.classes[row] < 0:
            return str(self.facts[row]["reason"] or _NO_CLASS)
        return _NO_PERSON if self.persons and self.persons[row] is None else None

    def reasons(self) -> dict[str, list[str]]:
        """Names of the rows that contribute nothing, by the reason; most frequent first."""
        found: dict[str, list[str]] = defaultdict(list)
        for row, name in enumerate(self.names):
            reason = self._reason(row)
            if reason is not None:
                found[reason].append(name)
        return dict(sorted(found.items(), key=lambda item: -len(item[1])))

    def rows_in(self, other: Inspection) -> list[str]:
        """Names of the rows whose image is in another dataset too, equal once both are decoded."""
        known = set(other.digests) - {""}
        return [name for name, digest in zip(self.names, self.digests) if digest in known]

    def duplicates(self) -> list[list[str]]:
        """Groups of rows whose images are equal once they are decoded; largest first."""
        groups: dict[str, list[str]] = defaultdict(list)
        for name, digest in zip(self.names, self.digests):
            if digest:
                groups[digest].append(name)
        return sorted((group for group in groups.values() if len(group) > 1), key=len, reverse=True)


def inspect_images(source: ImageSource, config: DataConfig) -> Inspection:
    """
    Reads a whole dataset for its owner.

    Args:
        source ([`ImageSource`]): The dataset.
        config ([`DataConfig`]): Shape and conventions, as training would read it.
    """
    found = Inspection(source.class_names, source.labels)
    pool, row = decoder_pool(), 0
    for decoded in pool.map(chunked(_noted(source, found)), pixel_format(config), describe=True):
        for pixels, readable, facts in zip(decoded.pixels, decoded.readable, decoded.facts):
            found.facts.append(facts)
            found.digests.append(hashlib.sha256(pixels.tobytes()).hexdigest() if readable else "")
            label = found.classes[row]
            if readable and 0 <= label < _SHEET_CLASSES and len(found.sheet[label]) < _SHEET_COLUMNS:
                found.sheet[label].append(pixels)
            row += 1
    for batch in source.read_beside():
        for name, values in batch.items():
            found.columns[name].update(str(value) for value in values)
    return found


def _noted(source: ImageSource, found: Inspection) -> Iterator[ImageReference]:
    for images, classes, persons in source.read():
        found.persons.extend(persons)
        for image, label in zip(images, classes):
            found.names.append(str(image) if isinstance(image, Path) else f"row {len(found.names)}")
            found.classes.append(label)
            yield image


def contact_sheet(found: Inspection, config: DataConfig) -> torch.Tensor:
    """A few images of each of the first ten classes, one row per class: `(B, C, H, W)` in `[0, 1]`."""
    blank = np.zeros((config.channels, config.resolution, config.resolution), dtype=np.uint8)
    shown = [
        (*found.sheet[label], *[blank] * (_SHEET_COLUMNS - len(found.sheet[label]))) for label in sorted(found.sheet)
    ]
    return torch.from_numpy(np.concatenate([np.stack(row) for row in shown])).float() / 255


def format_inspection(found: Inspection, *, most: int | None) -> str:
    """
    Formats the facts as text.

    Args:
        found ([`Inspection`]): What was found.
        most (`int`, *optional*): Most names that are listed of one kind; all if `None`.
    """
    rows = len(found.names)
    contributing = sum(found.contributes(row) for row in range(rows))
    lines = [f"{contributing:,} of {rows:,} rows contribute"]
    for reason, names in found.reasons().items():
        lines.append(f"  {len(names):,} contribute nothing: {reason}")
        lines += _listed(names, most)
    lines += _classes(found)
    lines += _persons(found)
    lines += _sizes([facts for facts in found.facts if "width" in facts])
    lines += _duplicates(found, most)
    lines += _columns(found.columns, most)
    return "\n".join(lines)


def format_overlap(found: Inspection, public: Inspection, *, most: int | None) -> str:
    """Formats which images are also in a public dataset."""
    names = found.rows_in(public)
    return "\n".join([f"{len(names):,} rows are in the public dataset too, equal to the pixel", *_listed(names, most)])


def _listed(names: Sequence[str], most: int | None) -> list[str]:
    shown = list(names if most is None else names[:most])
    more = [f"      and {len(names) - len(shown):,} more"] if len(names) > len(shown) else []
    return [f"      {_printable(name)}" for name in shown] + more


def _printable(text: str) -> str:
    return text.encode("unicode_escape", "backslashreplace").decode() if not text.isprintable() else text


def _classes(found: Inspection) -> list[str]:
    counts = Counter(found.classes[row] for row in range(len(found.names)) if found.contributes(row))
    where = "no labels: all images are of one class" if found.labels is None else f"classes by {found.labels}"
    return [where, *(f"  {counts[index]:>8,}  {name}" for index, name in enumerate(found.class_names))]


def _persons(found: Inspection) -> list[str]:
    if not found.persons:
        return []
    images_of = Counter(name for row, name in enumerate(found.persons) if found.contributes(row))
    counts, persons = sorted(images_of.values()), {name for name in found.persons if name is not None}
    if not counts:
        return [f"{len(persons):,} persons, and no row of one that contributes"]
    lines = [
        f"{len(persons):,} persons, {len(counts):,} of them with images that contribute: {counts[0]:,} to "
        f"{counts[-1]:,} each, median {statistics.median_low(counts):,}"
    ]
    if len(persons) == len(found.persons):
        lines.append("each row is a person of its own: without persons, the unit is the image, and the same")
    if len(persons) == 1:
        lines.append("all rows are of one person: training refuses that, because nothing of one person can be hidden")
    return lines


def _sizes(facts: Sequence[Mapping[str, Any]]) -> list[str]:
    if not facts:
        return []
    lines = []
    for name in ("format", "mode"):
        counts = Counter(str(fact[name]) for fact in facts).most_common()
        lines.append(f"{name}s: {', '.join(f'{value} ({count:,})' for value, count in counts)}")
    for name in ("width", "height"):
        values = [fact[name] for fact in facts]
        lines.append(f"{name}: {min(values)} to {max(values)} pixels, median {statistics.median_low(values)}")
    cropped = sum(fact["width"] != fact["height"] for fact in facts)
    lines.append(f"{cropped:,} are not square: the square around the centre is used")
    deep = [fact["range"] for fact in facts if fact.get("range")]
    if deep:
        low, high = min(pair[0] for pair in deep), max(pair[1] for pair in deep)
        lines.append(
            f"{len(deep):,} have more than 8 bits: values from {low:g} to {high:g}; --intensity_range says what is "
            "black and white (take it from the scanner's documentation, not from here)"
        )
    return lines


def _duplicates(found: Inspection, most: int | None) -> list[str]:
    groups = found.duplicates()
    if not groups:
        return ["no two images are equal"]
    rows = sum(len(group) for group in groups)
    many = f"{len(groups):,} groups" if len(groups) > 1 else "one group"
    lines = [f"{rows:,} rows are in {many} of equal images, at most {len(groups[0]):,} in one"]
    return lines + _listed([" = ".join(group[:4]) for group in groups], most)


def _columns(columns: Mapping[str, Counter[str]], most: int | None) -> list[str]:
    lines = []
    for name, counts in columns.items():
        (_, largest), rows = counts.most_common(1)[0], sum(counts.values())
        lines.append(
            f"column {name}: {len(counts):,} values in {rows:,} rows, {rows / len(counts):.3g} rows per value on "
            f"average, at most {largest:,}"
        )
        lines += _listed([f"{value} ({count:,})" for value, count in counts.most_common()], most and min(most, 5))
    return lines
