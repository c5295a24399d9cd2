"""The files of a public model that a run uses, in a folder or on the Hub, and what is published beside them."""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, Generic, TypeVar

import yaml
from huggingface_hub import try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from dp_curriculum.diffusion import autoencoder, pretrained
from dp_curriculum.diffusion.model_files import PublicModel, check_weights
from dp_curriculum.runtime.hashing import hash_file
from dp_curriculum.sharing.hub import HubError, fetch_model


logger = logging.getLogger(__name__)

_BESIDE = ("README.md", "privacy.json")
_MAX_TEXT = 2**20  # bytes of a card or a report that is looked at
LICENCE = re.compile(r"[a-z0-9.+-]{1,60}")


Model = TypeVar("Model", bound=PublicModel)


@dataclass(frozen=True)
class Kind(Generic[Model]):
    """
    Kind of public model: the options that name it, and how its files are read.

    Args:
        option, revision, subfolder (`str`): The options.
        room (`str`): Folder of it in a pipeline.
        names (`tuple[str, ...]`): Files that say what it is.
        read (`Callable`): `(folder, label)` to the model; it raises `ValueError` for what cannot be used.
    """

    option: str
    revision: str
    subfolder: str
    room: str
    names: tuple[str, ...]
    read: Callable[[Path, str], Model]


NETWORK = Kind(pretrained.OPTION, "--revision", "--subfolder", "unet", pretrained.NAMES, pretrained.read_network)
AUTOENCODER = Kind(
    autoencoder.OPTION, "--vae_revision", "--vae_subfolder", "vae", autoencoder.NAMES, autoencoder.read_autoencoder
)


@dataclass(frozen=True)
class ModelSource(Generic[Model]):
    """
    A public model that a run uses.

    Args:
        name (`str`): Hub id, or the resolved path of a folder.
        is_local (`bool`): Whether it is a folder.
        revision (`str`): Commit on the Hub; of a folder, sha256 of the files that the model is made from.
        model ([`PublicModel`]): What its files say.
        card (`str`): Text of its card; empty if there is none.
        report (`Mapping`, *optional*): Its `privacy.json`, unchecked.
    """

    name: str
    is_local: bool
    revision: str
    model: Model
    card: str
    report: Mapping[str, Any] | None

    @property
    def metadata(self) -> dict[str, Any]:
        """Metadata of its card; nothing where there are none that can be read."""
        match = re.match(r"---\n(.*?\n)---\n", self.card.replace("\r\n", "\n"), re.DOTALL)
        try:
            found = yaml.safe_load(match[1]) if match else {}
        except yaml.YAMLError:
            return {}
        return found if isinstance(found, dict) else {}

    @property
    def license(self) -> str:
        """Licence that its card states, or `"not stated"`."""
        stated = self.metadata.get("license")
        return stated if isinstance(stated, str) and LICENCE.fullmatch(stated) else "not stated"


def open_source(
    name: str,
    kind: Kind[Model],
    *,
    revision: str | None = None,
    subfolder: str | None = None,
    has_weights: bool = True,
) -> ModelSource[Model]:
    r"""
    Finds a model, and reads all of it but its weights.

    Args:
        name (`str`): A folder, or a Hub id.
        kind ([`Kind`]): [`NETWORK`] or [`AUTOENCODER`].
        revision (`str`, *optional*): Branch, tag or commit on the Hub; of a folder, the sha256 that it has to have.
        subfolder (`str`, *optional*): Folder within it.
        has_weights (`bool`, *optional*, defaults to `True`): Whether its weights are needed; else none are downloaded.

    Raises:
        ValueError: If there is no such model, it may not be read, or it is none that a run can use.
        HubError: If the Hub failed, and the files are not in its cache.
    """
    label = f"{kind.option}={name}"
    inside = PurePosixPath(subfolder or ".")
    if inside.is_absolute() or ".." in inside.parts:
        raise ValueError(f"Expected {kind.subfolder}={subfolder} to be a folder within the model.")
    if Path(name).is_dir():
        return _open_folder(Path(name).resolve(), label, kind, revision, inside, has_weights=has_weights)
    if name.startswith((".", "/", "~")) or name.count("/") > 1:
        raise ValueError(f"Expected {label} to be a folder: there is none.")
    try:
        validate_repo_id(name)
    except HFValidationError:
        raise ValueError(f"Expected {label} to be a folder or a Hub id: it is neither.") from None
    return _open_repository(name, label, kind, revision, inside, has_weights=has_weights)


def _open_folder(
    folder: Path,
    label: str,
    kind: Kind[Model],
    revision: str | None,
    inside: PurePosixPath,
    *,
    has_weights: bool,
) -> ModelSource[Model]:
    if not (folder / inside).is_dir():
        raise ValueError(f"Expected {kind.subfolder}={inside} to be a folder of {label}: there is none.")
    model = kind.read(folder / inside, label)
    if has_weights:
        check_weights(model, [path.name for path in model.weights.parent.iterdir()])
    digest = _hash_files(model.files)
    if revision is not None and revision != digest:
        raise ValueError(
            f"Expected {label} to be what {kind.revision}={revision} says: its files have the sha256 {digest} now. "
            f"Restore them, or leave out {kind.revision}."
        )
    return _source(str(folder), model, folder, digest, is_local=True)


def _hash_files(files: Iterable[Path]) -> str:
    """sha256 of the names and contents of the files that a model is made from."""
    return hashlib.sha256(json.dumps([[path.name, hash_file(path)] for path in files]).encode()).hexdigest()


def _source(name: str, model: Model, root: Path, revision: str, *, is_local: bool) -> ModelSource[Model]:
    places = {path: [folder / path for folder in (model.folder, root)] for path in _BESIDE}
    card, report = (next((text for path in places[one] if (text := _text(path))), "") for one in _BESIDE)
    try:
        found = json.loads(report) if report else None
    except ValueError:
        found = None
    return ModelSource(name, is_local, revision, model, card, found if isinstance(found, dict) else None)


def _text(path: Path) -> str:
    if not path.is_file() or path.stat().st_size > _MAX_TEXT:
        return ""
    return path.read_text(encoding="utf-8", errors="replace")


# --- the Hub -------------------------------------------------------------------------------------------------------


def _open_repository(
    name: str,
    label: str,
    kind: Kind[Model],
    revision: str | None,
    inside: PurePosixPath,
    *,
    has_weights: bool,
) -> ModelSource[Model]:
    above = [inside.parent] if inside.name == kind.room else []  # a component of a pipeline
    names = [*_BESIDE, *(str(folder / file) for folder in (inside, *above) for file in (*kind.names, *_BESIDE))]
    commit, folder, listed = _fetch(name, label, kind, revision, names)
    model = kind.read(folder / inside, label)
    if has_weights:
        weights = model.weights.relative_to(folder).as_posix()
        room = str(PurePosixPath(weights).parent)
        _fetch(name, label, kind, commit, [weights])
        check_weights(model, [PurePosixPath(file).name for file in listed if str(PurePosixPath(file).parent) == room])
    return _source(name, model, folder, commit, is_local=False)


def _fetch(
    name: str, label: str, kind: Kind[Model], revision: str | None, names: list[str]
) -> tuple[str, Path, list[str]]:
    """Commit, the folder of its files in the cache, the names of all files; without the Hub, what the cache has."""
    try:
        commit, files, listed = fetch_model(name, names, revision=revision)
    except HubError as error:
        cached = {file: try_to_load_from_cache(name, file, revision=revision) for file in names}
        files = {file: Path(path) for file, path in cached.items() if isinstance(path, str)}
        if not files:
            raise ValueError(
                f"Expected {label} to be a folder, or in the cache of huggingface_hub: it is neither, and {error}."
            ) from None
        logger.warning(f"{label}: {error}; its copy in the cache of huggingface_hub is used")
        listed, commit = list(files), ""
    except ValueError as error:
        at = "" if revision is None else f" at {kind.revision}={revision}"
        raise ValueError(f"Expected {label}{at} to be a folder, or a model on the Hub: {error}.") from None
    if not files:
        return commit, Path(), listed
    file, path = next(iter(files.items()))
    folder = path.parents[len(PurePosixPath(file).parts) - 1]
    return commit or folder.name, folder, listed
