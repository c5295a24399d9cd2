"""Files that somebody shared beside a card, looked at with care: none is executed, loaded or unpickled."""

from __future__ import annotations

import functools
import inspect
import math
import re
import zlib
from collections.abc import Collection, Iterator, Mapping
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, ModelMixin, UNet2DModel

from dp_curriculum import closed_form_prior, pipeline_dp_curriculum
from dp_curriculum.privacy.verification import Check, not_checked, version_text, written_by_this_version
from dp_curriculum.runtime.hashing import hash_file
from dp_curriculum.sharing.export import (
    PRIOR_CODE,
    PRIOR_WEIGHTS,
    VAE_CONFIG,
    VAE_WEIGHTS,
    WEIGHTS,
    hashed_files,
    model_files,
    parts_of,
)
from dp_curriculum.sharing.hub import MAX_SIZES
from dp_curriculum.sharing.model_card import describe_network
from dp_curriculum.sharing.scan import read_safetensors_header
from dp_curriculum.sharing.strict import read_json, same, shorten
from dp_curriculum.sharing.synthetic_dataset import MANIFEST


Files = Mapping[str, Path]
Report = Mapping[str, Any]

DATASET_FILES = ("README.md", "privacy.json")  # beside the images
_MADE_BY_THE_HUB = frozenset({".gitattributes"})
_DOWNLOADED = (".cache/huggingface/", ".git/")  # what huggingface_hub and git write beside a download
_SHARD = re.compile(r"data/train-(\d{5})-of-(\d{5})\.parquet", re.ASCII)
_INDEX = {
    "_class_name": "DPCurriculumPipeline",
    "unet": ["diffusers", "UNet2DModel"],
    "scheduler": ["diffusers", "EDMEulerScheduler"],
}
_MORE = ("id2label", "sampling", "privacy", "prior", "patch_size", "noise_schedule", "vae", "latent_bound")
_PRIORS = ([None, None], ["dp_curriculum", "ClosedFormPrior"])
_NOTES = ("_class_name", "_diffusers_version", "_name_or_path")  # that diffusers writes into a configuration
_MAX_INTEGER, _MAX_LAYERS, _MAX_ENTRIES = 100_000, 32, 32  # of a network that is built, without memory, to be compared
_PIXEL_CHUNKS = (b"IHDR", b"PLTE", b"IDAT", b"IEND")


# --- names ---------------------------------------------------------------------------------------------------------


def find_files(folder: Path) -> tuple[dict[str, Path], list[str]]:
    """
    Regular files of a folder by name, and what is none by name and kind: links that lead out of it, pipes, devices.

    A link into the cache of `huggingface_hub`, as `snapshot_download` makes them, is a file.
    """
    files, odd = {}, []
    for path in _walk(folder):
        name = path.relative_to(folder).as_posix()
        if name.startswith(_DOWNLOADED):
            continue
        inside = not path.is_symlink() or _in_cache(path, folder)
        if inside and path.is_file():
            files[name] = path
        else:
            odd.append(f"{name}, {'a link' if path.is_symlink() else 'no file'}")
    return files, sorted(odd)


def _walk(folder: Path) -> Iterator[Path]:
    """Everything but folders; links are not followed."""
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink():
            yield from _walk(path)
        else:
            yield path


def _in_cache(path: Path, folder: Path) -> bool:
    snapshot = folder.resolve()
    return snapshot.parent.name == "snapshots" and path.resolve().parent == snapshot.parent.parent / "blobs"


def check_sizes(files: Files) -> None:
    """
    Refuses files that are larger than what this package writes, before they are read.

    Raises:
        ValueError: It names the file.
    """
    for name, path in files.items():
        size, largest = path.stat().st_size, MAX_SIZES[Path(name).suffix]
        if size > largest:
            raise ValueError(f"Expected {name} to have at most {largest:,} bytes: it has {size:,}.")


def check_model_names(names: Collection[str]) -> Check:
    """Checks that a repository holds the files of a pipeline, all of them and no other."""
    return _check_names("those of a pipeline", set(names), set(model_files(parts_of(names))), _MADE_BY_THE_HUB)


def check_dataset_names(names: Collection[str], *, local: bool) -> Check:
    """Checks that a dataset holds its card, its report and whole sets of images, and nothing else."""
    shards = {name: match for name in names if (match := _SHARD.fullmatch(name))}
    count = max((int(match[2]) for match in shards.values()), default=1)
    whole = [f"data/train-{index:05d}-of-{count:05d}.parquet" for index in range(min(count, len(shards) + 1))]
    beside = _MADE_BY_THE_HUB | ({MANIFEST} if local else set())
    return _check_names("those of a dataset", set(names), {*DATASET_FILES, *whole}, beside)


def _check_names(claimed: str, names: set[str], expected: set[str], allowed: Collection[str]) -> Check:
    odd, missing = sorted(names - expected - set(allowed)), sorted(expected - names)
    found = [
        f"{word} {', '.join(shorten(name) for name in some[:3])}{', ...' if some[3:] else ''}"
        for word, some in (("also", odd), ("without", missing))
        if some
    ]
    return Check("files", claimed, "; ".join(found) or "no others", not found)


# --- hashes --------------------------------------------------------------------------------------------------------


def check_listed(listed: Mapping[str, str], found: Mapping[str, str | None], expected: Collection[str]) -> Check:
    """
    Compares the hashes on a card with those of the files.

    Args:
        listed (`Mapping[str, str]`): sha256 by name, as the card has it.
        found (`Mapping[str, str | None]`): sha256 of the files; `None` where it is not known.
        expected (`Collection[str]`): Names that the card has to list.
    """
    name, claimed = "other files (sha256)", f"{len(expected)} files"
    if not listed:
        return not_checked(name, claimed, "the card lists none: `dp-curriculum push` and `synthesize` do")
    for file in sorted({*listed, *expected}):
        if file not in listed or file not in expected:
            where = "is not on the card" if file in expected else "is not there"
            return Check(name, claimed, f"{shorten(file)} {where}", False)
    unknown = sorted(file for file in expected if found.get(file) is None)
    wrong = sorted(file for file in expected if found.get(file) not in (None, listed[file]))
    if wrong:
        return Check(name, claimed, f"{shorten(wrong[0])} is another", False)
    if unknown:
        return not_checked(name, claimed, f"the Hub has no hash of {shorten(unknown[0])}")
    return Check(name, claimed, "all as on the card", True)


def hashes_of_model(files: Files) -> dict[str, str | None]:
    """sha256 of the files that the card of a model lists."""
    return {name: hash_file(files[name]) for name in hashed_files(parts_of(files)) if name in files}


@functools.cache
def released_pipelines() -> dict[str, str]:
    """
    sha256 of `pipeline.py` of each released version.

    A release adds its line: `sha256sum src/dp_curriculum/pipeline_dp_curriculum.py`, under the number of the version.
    """
    text = resources.files("dp_curriculum.sharing").joinpath("released_pipelines.json").read_text(encoding="utf-8")
    return dict(read_json(text))


def check_pipeline_code(files: Files, report: Report) -> Check:
    """Checks that `pipeline.py`, which a card asks people to run, is that of the version that wrote the report."""
    name = "pipeline.py"
    if name not in files:
        return Check(name, "there", "missing", False)
    version = str(report["implementation"]["version"])
    if written_by_this_version(report):
        expected: str | None = hash_file(Path(str(pipeline_dp_curriculum.__file__)))
    else:
        ours = report["implementation"]["package"] == "dp_curriculum"
        expected = released_pipelines().get(version) if ours else None
    if expected is None:
        return not_checked(name, f"of {version}", version_text(report))
    found = hash_file(files[name])
    return Check(name, f"{expected[:16]}... of {version}", f"{found[:16]}...", found == expected)


def check_prior_code(files: Files, report: Report) -> list[Check]:
    """Checks that the code beside a prior, which a loader without this package runs, is that of this version."""
    if PRIOR_CODE not in files:
        return []
    if not written_by_this_version(report):
        return [not_checked(PRIOR_CODE, "of its version", version_text(report))]
    expected, found = hash_file(Path(str(closed_form_prior.__file__))), hash_file(files[PRIOR_CODE])
    return [Check(PRIOR_CODE, f"{expected[:16]}...", f"{found[:16]}...", found == expected)]


# --- contents ------------------------------------------------------------------------------------------------------


def read_network(files: Files) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """
    The configuration of the network, and the shapes of its weights. It takes no memory.

    Raises:
        ValueError: If it is no `UNet2DModel`, or one that cannot be trained.
    """
    return _read_model(files["unet/config.json"], UNet2DModel)


def _read_model(path: Path, model_class: type[ModelMixin]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    config, kind = read_json(path.read_bytes()), model_class.__name__
    known = {*inspect.signature(model_class.__init__).parameters, *_NOTES}
    odd = sorted(set(config) - known)
    if config["_class_name"] != kind or odd:
        raise ValueError(f"not of a {kind}: {shorten(str(odd[0] if odd else config['_class_name']))}")
    numbers = [value for entry in config.values() for value in (entry if isinstance(entry, list) else [entry])]
    lengths = [len(entry) for entry in config.values() if isinstance(entry, list)]
    too_large = [value for value in numbers if isinstance(value, int) and abs(value) > _MAX_INTEGER]
    if too_large or config.get("layers_per_block", 1) > _MAX_LAYERS or max(lengths, default=0) > _MAX_ENTRIES:
        raise ValueError("a network that is too large")
    with torch.device("meta"):
        model = model_class.from_config(config)
    return config, {name: list(value.shape) for name, value in model.state_dict().items()}


def check_index(files: Files, report: Report) -> list[Check]:
    """Checks that `model_index.json` holds the report, and loads diffusers' classes and no code of the repository."""
    if "model_index.json" not in files:
        return [Check("model_index.json", "there", "missing", False)]
    index = read_json(files["model_index.json"].read_bytes())
    equal = same(index["privacy"], report)
    checks = [Check("pipe.privacy", "the same as privacy.json", "it is" if equal else "another report", equal)]
    problem = next(_index_problems(index, report), None)
    beyond = sorted(set(index) - {*_INDEX, *_NOTES, *_MORE})
    if problem is None and beyond and not written_by_this_version(report):
        return [*checks, not_checked("model_index.json", f"also {shorten(beyond[0])}", version_text(report))]
    problem = problem or (f"also {shorten(beyond[0])}" if beyond else None)
    return [*checks, Check("model_index.json", "a pipeline of this package", problem or "it is", problem is None)]


def _index_problems(index: Mapping[str, Any], report: Report) -> Iterator[str]:
    for name, value in _INDEX.items():
        if not same(index.get(name), value):
            yield f"another {name}: {shorten(str(index.get(name)))}"
    for name, value in index.items():
        # A pair names a library and a class; where it is no library that is installed, it is code of the repository.
        if name == "prior" and any(same(value, known) for known in _PRIORS):
            continue
        if isinstance(value, list) and not same(value[:1], ["diffusers"]):
            yield f"another library for {shorten(name)}: {shorten(str(value))}"
    if not re.fullmatch(r"[\w.+-]{1,40}", str(index.get("_diffusers_version"))):
        yield "another _diffusers_version"
    labels, count = index["id2label"], report["data_domain"].get("num_classes")
    wanted = [str(label) for label in range(len(labels) if count is None else min(count, len(labels) + 1))]
    if sorted(labels) != sorted(wanted) or not all(isinstance(name, str) for name in labels.values()):
        yield f"not one name for each of {count} classes"
    if not all(type(value) in (int, float) for value in index["sampling"].values()):
        yield "sampling without numbers"
    if "vae" in index and not same(index["vae"], ["diffusers", "AutoencoderKL"]):
        yield f"another vae: {shorten(str(index['vae']))}"
    bound = index.get("latent_bound")
    is_range = isinstance(bound, (int, float)) and not isinstance(bound, bool) and 0 < bound < math.inf
    if ("vae" in index) != is_range or (bound is not None and not is_range):
        yield "a vae without the range of its latents, or a range without a vae"
    if index.get("patch_size", 1) not in (1, 2, 4):
        yield "another patch_size"
    schedule = index.get("noise_schedule")
    if schedule is not None:
        try:
            pipeline_dp_curriculum.NoiseSchedule(**schedule)
        except (TypeError, ValueError):
            yield "another noise_schedule"


def class_names(files: Files) -> tuple[str, ...]:
    """The names of the classes, in their order."""
    names = read_json(files["model_index.json"].read_bytes())["id2label"]
    return tuple(str(names[index]) for index in sorted(names, key=int))


def network_text(files: Files) -> str:
    """The network, as a card describes it."""
    config, shapes = read_network(files)
    number = sum(_product(shape) for shape in shapes.values())
    patch_size = read_json(files["model_index.json"].read_bytes()).get("patch_size", 1)
    channels, side = config["out_channels"] // patch_size**2, config["sample_size"] * patch_size
    return describe_network(number, channels, side, patch_size)


def sampler_text(files: Files) -> str:
    """The sampler, as a card describes it."""
    saved = read_json(files["model_index.json"].read_bytes())["sampling"]
    return f"EDM stochastic Heun, {saved['num_inference_steps']} steps, S_churn {saved['s_churn']:g}"


def check_weights(files: Files, report: Report) -> Check:
    """sha256 of the weights, and that they are tensors of this network. Nothing of them is loaded."""
    if WEIGHTS not in files:
        return Check("weights", WEIGHTS, "missing", False)
    if not _has_shapes(files[WEIGHTS], read_network(files)[1]):
        return Check("weights", "of unet/config.json", "of another network", False)
    if VAE_WEIGHTS in files:
        _, shapes = _read_model(files[VAE_CONFIG], AutoencoderKL)
        if not _has_shapes(files[VAE_WEIGHTS], shapes):
            return Check("weights", f"of {VAE_CONFIG}", "of another autoencoder", False)
    more = {name: hash_file(files[name]) for name in (PRIOR_WEIGHTS, VAE_WEIGHTS) if name in files}
    claimed, computed = report["weights"], {WEIGHTS: hash_file(files[WEIGHTS]), **more}
    differ = [name for name in (*computed, *claimed) if claimed.get(name) != computed.get(name)]
    name = differ[0] if differ else WEIGHTS
    room = "" if name == WEIGHTS else shorten(name.split("/")[0]).strip("'") + " "
    shown, found = (shorten(str(hashes.get(name))[:16]).strip("'") for hashes in (claimed, computed))
    return Check("weights (sha256)", f"{room}{shown}...", f"{room}{found}...", claimed == computed)


def _has_shapes(path: Path, shapes: Mapping[str, list[int]]) -> bool:
    header = read_safetensors_header(path)
    header.pop("__metadata__", None)
    return {name: row["shape"] for name, row in header.items()} == dict(shapes)


def check_sample_sheet(files: Files) -> Check:
    """Checks that `samples.png` is a picture of pixels alone. It is not decoded."""
    name = "samples.png"
    if name not in files:
        return Check(name, "there", "missing", False)
    kinds = list(_chunks(files[name].read_bytes()))
    plain = kinds[:1] == [b"IHDR"] and kinds[-1:] == [b"IEND"] and set(kinds) <= set(_PIXEL_CHUNKS)
    return Check(name, "a PNG of pixels alone", "it is" if plain else "it is not", plain)


def _chunks(data: bytes) -> Iterator[bytes]:
    """The kinds of the chunks of a PNG; nothing where it is none, or something follows its end."""
    if data[:8] != b"\x89PNG\r\n\x1a\n":
        return
    place = 8
    while place < len(data):
        length = int.from_bytes(data[place : place + 4], "big")
        kind, end = data[place + 4 : place + 8], place + 12 + length
        if end > len(data) or zlib.crc32(data[place + 4 : end - 4]) != int.from_bytes(data[end - 4 : end], "big"):
            yield b"broken"
            return
        yield kind
        place = end


def _product(shape: list[int]) -> int:
    return functools.reduce(int.__mul__, shape, 1)
