"""Neighbours at the level of the operating system: two whole trainings, with rows that are broken in every way, and
without them, leave the same bytes on both descriptors, the same status and the same files, but for noised values.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import pytest
from pictures import CLASSES, bomb, encoded, photo, png, write_hub_folder


LOUD = encoded(photo(), "TIFF", compression="tiff_adobe_deflate").replace(b"x\x9c", b"xx")
BAD_IMAGES: list[Any] = [
    *(None, b"", b"junk", LOUD, encoded(photo(), "JPEG")[:-200], bomb(7072), bomb(7000, bits=16)),
    {"bytes": None, "path": "/dev/zero"},
    {"bytes": None, "path": "ftp://127.0.0.1:9/1.png"},
    {"bytes": None, "path": "../../1.png"},
]
BAD_LINES = [
    "{name},unknown",
    "{name},cat,",
    '"{name},cat',
    f"{{name}},{'1' * 23}",
    "{name},\udcff",
    "../../etc/passwd,cat",
    "ftp://127.0.0.1:9/1.png,dog",
]
TRAIN = (
    *("--resolution", "8", "--num_channels", "1", "--block_out_channels", "8"),
    *("--pretrain_steps", "4", "--pretrain_batch_size", "4", "--num_dp_steps", "3", "--expected_batch_size", "6"),
    *("--public_dataset_size", "30", "--target_epsilon", "9", "--seed", "0", "--num_inference_steps", "2"),
    *("--stages", "moments", "dp_sgd", "--checkpointing_steps", "2", "--sample_steps", "2"),
)


def good_images() -> list[bytes]:
    return [png(photo(8 + number).convert("L")) for number in range(12)]


def parquet(folder: Path, *, broken: bool) -> tuple[str, ...]:
    images: list[Any] = good_images()
    labels: list[Any] = [number % 2 for number in range(12)]
    if broken:
        images[3:3] = BAD_IMAGES
        labels[3:3] = [0] * len(BAD_IMAGES)
        images += [images[0]] * 3
        labels += [None, 7, -1]
    write_hub_folder(folder / "scans", images, label=(labels, CLASSES), note=(["x"] * len(labels), TEXT))
    return ("--dataset_name", "scans")


def folders(folder: Path, *, broken: bool) -> tuple[str, ...]:
    for number, data in enumerate(good_images()):
        path = folder / "scans" / ("cat" if number % 2 else "dog") / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    if broken:
        for number, data in enumerate(image for image in BAD_IMAGES if isinstance(image, bytes)):
            (folder / "scans" / "cat" / f"bad-{number}.tiff").write_bytes(data)
        (folder / "scans" / "cat" / "test_1.png").write_bytes(b"junk")
        (folder / "scans" / "dog" / "zero.png").symlink_to("/dev/zero")
        (folder / "scans" / "dog" / "nowhere.png").symlink_to("nowhere")
        (folder / "scans" / "odd\udcff.png").write_bytes(good_images()[0])
    return ("--train_data_dir", "scans")


def table(folder: Path, *, broken: bool) -> tuple[str, ...]:
    (folder / "scans").mkdir(parents=True)
    lines = ["file_name,kind"]
    for number, data in enumerate(good_images()):
        (folder / "scans" / f"{number}.png").write_bytes(data)
        lines.append(f"{number}.png,{'cat' if number % 2 else 'dog'}")
    if broken:
        for number, line in enumerate(BAD_LINES):
            (folder / "scans" / f"bad-{number}.png").write_bytes(good_images()[0])
            lines.insert(4, line.format(name=f"bad-{number}.png"))
    (folder / "scans" / "metadata.csv").write_text("\n".join(lines) + "\n", errors="surrogateescape")
    return ("--train_data_dir", "scans", "--label_column", "kind", "--class_names", "cat", "dog")


TEXT = datasets.Value("string")
MASKS = (
    (rb"[0-9a-f]{64}", b"<sha256>"),
    (rb'"(session|run_id)": "[0-9a-f]{32}"', b"<id>"),
    # A bar of what spends nothing shows times; that of noisy steps shows time left by a trial on random images.
    (rb"about [^,\r\n]* left", b"<time left>"),
    (rb"(\r?sample sheet[^\r\n]*|\r +\r)+", b"<sheet>"),
    (rb"lesson moments[^\r\n]*", b"<lesson>"),
    (rb"(\r?<lesson>)+", b"<lesson>"),
)


def masked(data: bytes) -> bytes:
    for pattern, replacement in MASKS:
        data = re.sub(pattern, replacement, data)
    return data


def train(folder: Path, make: Callable[..., tuple[str, ...]], *, broken: bool) -> dict[str, Any]:
    """One training in a folder of its own, under one name: what it printed and left, without noised values."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    given = make(folder, broken=broken)
    command = [sys.executable, "-m", "dp_curriculum.cli", "train", *given, *TRAIN, "--output_dir", "out"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=300)
    left = {path.relative_to(folder / "out"): path for path in sorted((folder / "out").rglob("*")) if path.is_file()}
    is_text = {".json", ".jsonl", ".yaml", ".md", ".py", ".head"}.__contains__
    files = {str(name): masked(path.read_bytes()) if is_text(name.suffix) else b"" for name, path in left.items()}
    return {
        "status": done.returncode,
        "out": masked(done.stdout),
        "err": masked(done.stderr),
        "files": files,
    }


@pytest.mark.slow
@pytest.mark.parametrize("make", [parquet, folders, table])
def test_two_trainings_with_and_without_broken_rows_look_the_same(
    make: Callable[..., tuple[str, ...]], tmp_path: Path
) -> None:
    with_them = train(tmp_path / "run", make, broken=True)
    without = train(tmp_path / "run", make, broken=False)
    assert with_them["status"] == 0, with_them["err"].decode()
    assert with_them == without
    assert b"hard stage: 100%" in without["err"] and "privacy.json" in without["files"]
