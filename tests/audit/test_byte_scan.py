"""Everything that a run writes, byte by byte: no generator state, key, count, private name or private picture."""

from __future__ import annotations

import os
import random
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from byte_scan import generator_states, holds_number, holds_picture, holds_secret, holds_text
from PIL import Image
from safetensors.torch import load_file, save_file

from dp_curriculum.cli import main
from dp_curriculum.dp_sgd.trainer import DPTrainer
from dp_curriculum.privacy.randomness import SecretGenerator


SIDE = 8
COUNTS = {"calm": 37, "storm": 41}  # and 78 in all, where 60 is declared
NUMBERS = (*COUNTS.values(), sum(COUNTS.values()))
WORDS = ("patient", "4711", "private-pictures")
BARCODE = np.random.default_rng(4711).integers(0, 2, (SIDE, SIDE)) * 255


@pytest.fixture(scope="module")
def private_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures with telling names, one of which is a barcode; one cannot be read."""
    folder = tmp_path_factory.mktemp("private-pictures")
    source = np.random.default_rng(0)
    for name, count in COUNTS.items():
        (folder / name).mkdir()
        for row in range(count):
            pixels = BARCODE if row == 5 else source.integers(0, 256, (SIDE, SIDE))
            path = folder / name / f"patient-{4711 + row}.png"
            Image.fromarray(pixels.astype(np.uint8)).save(path)
            if row == 6:
                path.write_bytes(path.read_bytes()[:40])
    return folder


@pytest.fixture(scope="module")
def run(private_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[bytes]]:
    """A run of all stages that was stopped and resumed, with its console beside it, and every key it drew.

    Its paths are relative: pytest numbers its folders, and any of these numbers may be one of the private counts.
    """
    out, keys = tmp_path_factory.mktemp("runs") / "out", []
    pictures = os.path.relpath(private_folder, out.parent)
    arguments = f"""train --train_data_dir {pictures} --output_dir {out.name} --resolution {SIDE} --num_channels 1
        --seed 20260401
        --stages mean moments dp_sgd --public_dataset_size 60 --expected_batch_size 16 --num_dp_steps 4
        --checkpointing_steps 2 --pretrain_steps 2 --pretrain_batch_size 4 --num_inference_steps 2 --sample_steps 1
        --block_out_channels 8 --report_to tensorboard""".split()
    draw, step = SecretGenerator._fresh_key, DPTrainer.step

    def fresh_key(self: SecretGenerator, num_bytes: int) -> bytes:
        keys.append(draw(self, num_bytes))
        return keys[-1]

    def stop_after_one(self: DPTrainer) -> None:
        step(self)
        if self.num_steps_taken == 1:
            signal.raise_signal(signal.SIGINT)

    console = tmp_path_factory.mktemp("console") / "console.txt"
    with pytest.MonkeyPatch.context() as patch, console.open("w") as file:
        patch.chdir(out.parent)
        patch.setattr(SecretGenerator, "_fresh_key", fresh_key)
        saved = [os.dup(1), os.dup(2)]
        try:
            os.dup2(file.fileno(), 1)
            os.dup2(file.fileno(), 2)
            with patch.context() as stopping:
                stopping.setattr(DPTrainer, "step", stop_after_one)
                main(arguments)
            assert main([*arguments, "--resume_from_checkpoint", "latest"]) == 0
        finally:
            for number, copy in zip((1, 2), saved):
                os.dup2(copy, number)
                os.close(copy)
    shutil.copy(console, out / "console.txt")
    return out, keys


@pytest.mark.slow
def test_a_run_leaves_nothing_private_in_any_byte(run: tuple[Path, list[bytes]]) -> None:
    folder, keys = run
    suffixes = {path.suffix for path in folder.rglob("*") if path.is_file()}
    assert {".safetensors", ".png", ".json", ".jsonl", ".yaml", ".md", ".txt"} <= suffixes
    # Three queries of the lessons; a mask and a noise for each of four steps; a noise that each start times.
    assert len(keys) == 3 + 2 * 4 + 2 and min(map(len, keys)) >= 8
    assert holds_secret(folder, [*keys, *generator_states()]) == []
    assert holds_number(folder, NUMBERS) == []
    # The folder of the data is named in the configuration of the run, and in what it refuses; never a picture.
    assert holds_text(folder, WORDS[:2]) == []
    assert holds_text(folder, WORDS[2:]) in ([], ["config.yaml"])
    assert holds_picture(folder, BARCODE.astype(float)) == []


def write_state(folder: Path) -> None:
    (folder / "run" / "rng.bin").write_bytes(torch.get_rng_state().numpy().tobytes())


def write_python_state(folder: Path) -> None:
    (folder / "run" / "x").write_bytes(b"head" + np.array(random.getstate()[1][:-1], dtype=np.uint32).tobytes())


def write_numpy_state(folder: Path) -> None:
    words = np.random.get_state()[1]  # type: ignore[index]
    save_file({"numpy": torch.from_numpy(words.astype(np.uint32).view(np.int32))}, folder / "run" / "s.safetensors")


def write_count(folder: Path) -> None:
    (folder / "privacy.json").write_text((folder / "privacy.json").read_text() + '{"rows": 78}')


def write_count_in_a_name(folder: Path) -> None:
    (folder / "run" / "rows-37.txt").write_text("")


def write_name(folder: Path) -> None:
    (folder / "run" / "log.txt").write_text("cannot read patient-4711.png")


def tamper_picture(folder: Path) -> None:
    """A faint barcode in a sheet of samples."""
    with Image.open(folder / "samples.png") as image:
        pixels = np.asarray(image.convert("L")).astype(float)
    pixels[3 : 3 + SIDE, 2 : 2 + SIDE] = 100 + 0.1 * BARCODE
    Image.fromarray(pixels.astype(np.uint8)).save(folder / "samples.png")


def tamper_tensor(folder: Path) -> None:
    """The barcode in [-1, 1], upside down in brightness, in a checkpoint."""
    path = next((folder / "run").rglob("ema.safetensors"))
    batch = torch.from_numpy(1 - BARCODE / 127.5).float()
    save_file({**load_file(path), "batch": torch.stack([torch.rand(SIDE, SIDE), batch])}, path)


def write_pixels(folder: Path) -> None:
    (folder / "run" / "cache.arrow").write_bytes(b"arrow" + BARCODE.astype(np.uint8).tobytes())


@pytest.mark.slow
@pytest.mark.parametrize(
    ("leak", "scan"),
    [
        (write_state, lambda folder: holds_secret(folder, generator_states())),
        (write_python_state, lambda folder: holds_secret(folder, generator_states())),
        (write_numpy_state, lambda folder: holds_secret(folder, generator_states())),
        (write_count, lambda folder: holds_number(folder, NUMBERS)),
        (write_count_in_a_name, lambda folder: holds_number(folder, NUMBERS)),
        (write_name, lambda folder: holds_text(folder, WORDS)),
        (tamper_picture, lambda folder: holds_picture(folder, BARCODE.astype(float))),
        (tamper_tensor, lambda folder: holds_picture(folder, BARCODE.astype(float))),
        (write_pixels, lambda folder: holds_picture(folder, BARCODE.astype(float))),
    ],
)
def test_each_leak_is_found(
    leak: Callable[[Path], None], scan: Callable[[Path], list[str]], run: Any, tmp_path: Path
) -> None:
    folder = tmp_path / "out"
    shutil.copytree(run[0], folder)
    (folder / "run" / "config.yaml").unlink()
    assert scan(folder) == []
    leak(folder)
    assert len(scan(folder)) == 1


@pytest.mark.slow
def test_a_key_is_found_in_any_form(run: Any, tmp_path: Path) -> None:
    key = run[1][0]
    for number, form in enumerate((key, key.hex().encode(), f"seed: {int.from_bytes(key, 'little')}".encode())):
        (tmp_path / f"{number}.txt").write_bytes(b"..." + form + b"...")
    assert holds_secret(tmp_path, [key]) == ["0.txt", "1.txt", "2.txt"]
