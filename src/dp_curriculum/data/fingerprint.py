"""Keyed fingerprint of a dataset: tells its owner, and no one else, that two runs read the same images."""

from __future__ import annotations

import dataclasses
import hashlib
import hmac
import itertools
from collections import defaultdict
from collections.abc import Iterator

from dp_curriculum.data.decoding import read_file
from dp_curriculum.data.images import Batch, ImageReference, ImageSource


_BITS = 256


class Fingerprint:
    """
    Sum of keyed hashes of all rows, taken while they are read. The order of the rows does not count.

    A row is the bytes of its image, as they came: classes, resolution and colour are options of a run. Where persons
    are the unit, the rows of each are summed and hashed first, so that other persons of the same images are told
    apart; what they are called has no part in it. It says nothing to whoever lacks the key.

    Privacy:
        A function of all rows. It goes into the ledger of the dataset, which is its owner's, and into nothing else: no
        report, no card, no log. It is compared with that of the first run; that comparison fails only if the data
        changed between two runs, so it says nothing about a row of data that did not.
    """

    def __init__(self, key: bytes) -> None:
        self._key = key
        self._sums: dict[str | None, int] = {}  # by person, in memory alone; of all rows where images are the unit
        self._count, self._has_persons = 0, False

    def watch(self, source: ImageSource) -> ImageSource:
        """The same source; reading it to its end takes the fingerprint."""

        def read() -> Iterator[Batch]:
            self._sums, self._count, self._has_persons = defaultdict(int), 0, source.persons is not None
            for images, labels, persons in source.read():
                for image, person in itertools.zip_longest(images, persons):
                    self._add(image, person)
                yield images, labels, persons

        return dataclasses.replace(source, read=read)

    def digest(self) -> str:
        """Fingerprint of the rows that were read."""
        parts = self._sums.values()
        summed = sum(map(self._of_person, parts) if self._has_persons else parts) % 2**_BITS
        total = summed.to_bytes(_BITS // 8, "big") + self._count.to_bytes(8, "big")
        return hmac.new(self._key, b"all" + total, hashlib.sha256).hexdigest()

    def _of_person(self, rows: int) -> int:
        message = b"person" + (rows % 2**_BITS).to_bytes(_BITS // 8, "big")
        return int.from_bytes(hmac.new(self._key, message, hashlib.sha256).digest(), "big")

    def _add(self, image: ImageReference, person: str | None) -> None:
        row = hmac.new(self._key, b"row" + _bytes_of(image), hashlib.sha256).digest()
        self._sums[person] += int.from_bytes(row, "big")
        self._count += 1


def _bytes_of(image: ImageReference) -> bytes:
    """Bytes of a row; none for one that cannot be read, which is no reason to say anything."""
    if image is None or isinstance(image, bytes):
        return image or b""
    try:
        return read_file(str(image))
    except (OSError, ValueError):
        return b""
