"""What must not be shared is found, whatever file it hides in; what somebody shared is read with care."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image, PngImagePlugin
from safetensors.torch import save_file

from dp_curriculum.sharing.scan import MAX_HEADER_BYTES, UnsafeFile, read_safetensors_header, scan_folder


def scan(folder: Path, name: str, content: str | bytes, **options: Any) -> None:
    """Scans a folder of this one file."""
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    scan_folder(folder, [name], **options)


@pytest.mark.parametrize(
    ("text", "what"),
    [
        ('{"token": "hf_' + "a" * 34 + '"}', "a Hub token"),
        ("-----BEGIN OPENSSH PRIVATE KEY-----", "a private key"),
        ("key AKIA" + "A1B2" * 4, "an access key"),
        ("ghp_" + "x" * 36, "an access token"),
        ("sk-" + "x" * 40, "an access token"),
        ("saved in /home/anna/models", "a local path"),
        ('"/mnt/hospital/scans"', "a local path"),
        ("in /Users/anna", "a local path"),
        (json.dumps("C:\\Users\\anna"), "a local path"),
        ("file:///etc/passwd", "a local path"),
        ("from ~/models", "a local path"),
    ],
)
def test_secrets_and_places_are_found_and_not_repeated(text: str, what: str, tmp_path: Path) -> None:
    with pytest.raises(UnsafeFile, match=f"Refusing to share notes.json: it contains {what}") as caught:
        scan(tmp_path, "notes.json", text)
    assert text not in str(caught.value)


def test_the_names_of_this_machine_are_found(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFile, match="it contains a local path"):
        scan(tmp_path, "a.json", "trained on ward7", local_names={"ward7": "a local path"})
    scan(tmp_path, "a.json", "trained on ward7", local_names={"ward8": "a local path"})


@pytest.mark.parametrize(
    "text",
    [
        "https://arxiv.org/abs/2504.01395 and org/data/x",
        'from_pretrained("org/home/model")',
        "nouns and/or verbs, 3/4, sha256 " + "0" * 64,
        "unet/diffusion_pytorch_model.safetensors",
    ],
)
def test_ordinary_text_passes(text: str, tmp_path: Path) -> None:
    scan(tmp_path, "README.md", text)


def test_a_file_too_many_too_few_or_elsewhere_is_refused(tmp_path: Path) -> None:
    (tmp_path / "b.md").write_text("b")
    with pytest.raises(UnsafeFile, match="See b.md"):
        scan(tmp_path, "a.md", "a")
    with pytest.raises(UnsafeFile, match="See c.md"):
        scan_folder(tmp_path, ["a.md", "b.md", "c.md"])
    scan_folder(tmp_path, ["a.md", "b.md"])
    os.symlink(tmp_path / "a.md", tmp_path / "c.md")
    with pytest.raises(UnsafeFile, match="Refusing to share c.md: it is a link"):
        scan_folder(tmp_path, ["a.md", "b.md", "c.md"])


def test_a_binary_file_under_the_name_of_a_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsafeFile, match="what is no text"):
        scan(tmp_path, "model_index.json", b"\x80\x05\x95\xff")


def test_a_picture_holds_pixels_alone(tmp_path: Path) -> None:
    picture = Image.new("L", (4, 4))
    picture.save(tmp_path / "samples.png")
    scan_folder(tmp_path, ["samples.png"])
    text = PngImagePlugin.PngInfo()
    text.add_text("comment", "patient 7")
    picture.save(tmp_path / "samples.png", pnginfo=text)
    with pytest.raises(UnsafeFile, match="samples.png: it is no PNG of pixels alone"):
        scan_folder(tmp_path, ["samples.png"])
    picture.save(tmp_path / "samples.png", format="GIF")
    with pytest.raises(UnsafeFile, match="samples.png: it is no PNG of pixels alone"):
        scan_folder(tmp_path, ["samples.png"])


def test_weights_hold_tensors_alone(tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_file({"weight": torch.ones(3)}, path, metadata={"format": "pt"})
    scan_folder(tmp_path, ["a.safetensors"])
    assert set(read_safetensors_header(path)) == {"__metadata__", "weight"}
    save_file({"weight": torch.ones(3)}, path, metadata={"note": "patient 7"})
    with pytest.raises(UnsafeFile, match="a.safetensors: it holds metadata"):
        scan_folder(tmp_path, ["a.safetensors"])
    save_file({"/home/anna/weight": torch.ones(3)}, path)
    with pytest.raises(UnsafeFile, match="a local path"):
        scan_folder(tmp_path, ["a.safetensors"])


def framed(header: Any, *, length: int | None = None, body: int = 0) -> bytes:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(raw) if length is None else length).to_bytes(8, "little") + raw + bytes(body)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\x80\x02}q\x00.",
        b"PK\x03\x04" + bytes(100),
        framed({}, length=2**62),
        framed({}, length=MAX_HEADER_BYTES + 1, body=MAX_HEADER_BYTES + 10),
        framed(b"{" * 10),
        framed(b"[" * 100_000),
        framed([1]),
        framed({"a": 3}),
        framed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [0, 400]}}, body=4),
        framed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [-4, 0]}}, body=4),
        framed({"a": {"dtype": "F32", "shape": [1], "data_offsets": [4, 0]}}, body=4),
        framed({"a": {"dtype": "F32", "shape": [1], "data_offsets": ["0", "4"]}}, body=4),
    ],
    ids=lambda content: f"{content[:12]!r} of {len(content)}",
)
def test_what_is_no_safetensors_file_is_refused_in_one_line(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    path.write_bytes(content)
    with pytest.raises(UnsafeFile, match="^Expected a.safetensors to be a safetensors file") as caught:
        read_safetensors_header(path)
    assert "\n" not in str(caught.value)
