"""No file is heard: a process reads hundreds of bad ones, and both of its descriptors are watched."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from corpus import bombs, damaged_files, largest_files, odd_files, whole_files

from dp_curriculum.data.decoding import FORMATS


# It prints nothing itself: what it found goes to a file.
READ = """
import json, logging, resource, sys, warnings

records = []
class Keep(logging.Handler):
    def emit(self, record):
        records.append(record.getMessage())

logging.basicConfig(level=logging.DEBUG, handlers=[Keep()])
warnings.simplefilter("always")
from dp_curriculum.config import DataConfig
from dp_curriculum.data.reading import load_images
from dp_curriculum.data.workers import decoder_pool
records.clear()
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
found = load_images(DataConfig(train_data_dir=sys.argv[1], label_column="none", resolution=16, num_channels=3))
logged = [line for line in records if "fsspec" not in line]
decoder_pool().close()
peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - before
result = {"labels": found.labels.tolist(), "means": found.images.float().mean((1, 2, 3)).tolist()}
with open(sys.argv[2], "w") as file:
    json.dump({**result, "logged": logged, "peak": peak, "grown": grown}, file)
"""


def read_folder(folder: Path) -> tuple[dict[str, bool], dict[str, Any]]:
    """Whether each file was read, by its name, and all that was found; both descriptors were silent."""
    result = folder.parent / "result.json"
    command = [sys.executable, "-c", READ, str(folder), str(result)]
    done = subprocess.run(command, capture_output=True, timeout=500)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")
    found = json.loads(result.read_text())
    assert found["logged"] == ["reading images"]
    names = sorted(path.name for path in folder.iterdir())
    assert len(names) == len(found["labels"])
    return {name: label == 0 for name, label in zip(names, found["labels"])}, found


def written(folder: Path, files: Iterable[tuple[str, bytes]]) -> Path:
    folder.mkdir()
    for name, data in files:
        (folder / name).write_bytes(data)
    return folder


def corpus() -> Iterator[tuple[str, bytes]]:
    yield from whole_files()
    yield from damaged_files()
    yield from odd_files()
    yield from bombs()


@pytest.mark.slow
def test_hundreds_of_bad_files_are_not_heard(tmp_path: Path) -> None:
    read, found = read_folder(written(tmp_path / "corpus", corpus()))
    assert len(read) >= 300 and len(FORMATS) >= 10
    whole = {name for name, _ in whole_files()}
    assert all(read[name] for name in whole), "the control: a good file of each format is read"
    assert not any(read[name] for name, _ in bombs() if "text" not in name), "none of these was allowed"
    assert 0.2 * len(read) < sum(not good for good in read.values()), "most of the damage was noticed"
    assert found["peak"] < 1.0e9


@pytest.mark.slow
def test_the_largest_images_that_are_allowed_take_a_bounded_memory(tmp_path: Path) -> None:
    """16 bits of 7071 pixels squared took 1.3 GiB, in the process that trains."""
    read, found = read_folder(written(tmp_path / "large", largest_files()))
    assert all(read.values())
    assert found["peak"] < 0.9e9, "a worker's"
    assert found["grown"] < 50e6, "the process that trains holds what is left of an image"
