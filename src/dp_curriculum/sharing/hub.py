"""Uploads to the Hub and downloads from it: one commit of files that may be shared, and careful reads of others."""

from __future__ import annotations

import logging
import tempfile
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi
from huggingface_hub.errors import (
    EntryNotFoundError,
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
)
from huggingface_hub.utils import validate_repo_id

from dp_curriculum.sharing.export import export_release, held_parts, model_files


logger = logging.getLogger(__name__)

WAITS = (1.0, 2.0, 4.0, 8.0)  # seconds before each new try
_PASSING = frozenset({408, 409, 412, 429, 500, 502, 503, 504})  # HTTP statuses after which another try may succeed
# Bytes that a file may have by the end of its name, if it is to be read.
MAX_SIZES = {".json": 2**20, ".md": 2**20, ".py": 2**20, ".png": 2**25, ".safetensors": 20 * 2**30}

Value = TypeVar("Value")


class HubError(OSError):
    """The Hub was not reached, or failed. Nothing was committed by half, and what is on disk is as it was."""


@dataclass(frozen=True)
class Pushed:
    """A repository after a push: its address, its last commit, and whether that is new."""

    url: str
    commit: str
    changed: bool


def push_to_hub(
    output_dir: str | Path,
    repo_id: str,
    *,
    private: bool = True,
    token: str | None = None,
    license: str | None = None,
    allow_non_private: bool = False,
    dataset_ledger: str | None = None,
) -> str:
    r"""
    Shares what of a run may be shared, as one commit; none if the repository holds just that.

    Args:
        output_dir (`str` or `Path`): Folder of a run.
        repo_id (`str`): Repository, made if needed; without a namespace it is the user's own.
        private (`bool`, *optional*, defaults to `True`): Whether a new repository is visible to its owners alone.
        token (`str`, *optional*): Hub token; the one of this machine if unset.
        license (`str`, *optional*): Licence of the weights, as the Hub names it.
        allow_non_private (`bool`, *optional*, defaults to `False`): Whether a run without guarantee may be shared,
            stamped NOT PRIVATE.
        dataset_ledger (`str`, *optional*): The ledger that the run is charged to, if it was moved; the push is noted
            there.

    Returns:
        `str`: Address of the repository.

    Raises:
        ExportRefused: If the run is not private; nothing is sent.
        ValueError: If there is no token, or it does not permit this.
        HubError: If the Hub was not reached or failed, after several tries.

    Privacy:
        Sends the files of [`~export.model_files`], which hold noised weights, the report and public constants.
    """
    full_id = check_token(repo_id, token=token)
    with tempfile.TemporaryDirectory() as folder:
        export_release(
            output_dir,
            Path(folder) / "model",
            repo_id=full_id,
            license=license,
            allow_non_private=allow_non_private,
            dataset_ledger=dataset_ledger,
            shared_as=("push", full_id),
        )
        make_repository(full_id, private=private, token=token)
        names = model_files(held_parts(Path(folder) / "model"))
        return commit_folder(Path(folder) / "model", full_id, names, token=token).url


def check_token(repo_id: str, *, token: str | None = None) -> str:
    """
    Asks the Hub whose token this is; sends nothing else.

    Returns:
        `str`: The id of the repository with its namespace.

    Raises:
        ValueError: If there is no token, it is not valid, it is for reading, or the namespace is somebody else's.
        HubError: If the Hub was not reached.
    """
    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise ValueError(f"Expected --repo_id={repo_id} to be a Hub id: {_one_line(error)}") from None
    try:
        user = _try_again(HfApi(token=token).whoami)
    except _Refused as error:
        raise ValueError(
            f"Refusing to push to {repo_id}: {error}. Log in with `hf auth login`, or set HF_TOKEN."
        ) from None
    if user.get("auth", {}).get("accessToken", {}).get("role") == "read":
        raise ValueError(f"Refusing to push to {repo_id}: the token may only read. Use one that may write.")
    namespace, _, name = repo_id.rpartition("/")
    namespace = namespace or user["name"]
    writable = {user["name"]} | {
        org["name"]
        for org in user.get("orgs", [])
        if org.get("roleInOrg", "write") in ("admin", "write", "contributor")
    }
    if namespace not in writable:
        raise ValueError(
            f"Refusing to push to {repo_id}: {user['name']} may write to {', '.join(sorted(writable))}. Name one of "
            "these."
        )
    return f"{namespace}/{name}"


def make_repository(repo_id: str, *, repo_type: str = "model", private: bool = True, token: str | None = None) -> None:
    """
    Makes the repository, unless it is there; then it stays as visible as it is.

    Raises:
        ValueError: If the token does not permit it.
        HubError: If the Hub was not reached or failed.
    """
    api = HfApi(token=token)
    try:
        _try_again(lambda: api.create_repo(repo_id, repo_type=repo_type, private=private, exist_ok=True))
        info = _try_again(lambda: api.repo_info(repo_id, repo_type=repo_type))
    except _Refused as error:
        raise ValueError(f"Refusing to push to {repo_id}: {error}. Use another token.") from None
    if private and info.private is False:
        logger.warning(f"{repo_id} already exists and is public: everybody can see what is pushed.")


def commit_folder(
    folder: Path,
    repo_id: str,
    names: Iterable[str],
    *,
    repo_type: str = "model",
    token: str | None = None,
) -> Pushed:
    """
    Brings a repository to these files in one commit. Folders that they lie in then hold nothing else.

    A try that was cut off leaves no commit, or a whole one whose answer was lost; the next try sees which.

    Raises:
        ValueError: If the card is not valid, or the token does not permit this.
        HubError: If the Hub was not reached or failed, after several tries.
    """
    api, names = HfApi(token=token), sorted(names)
    folders = {PurePosixPath(name).parts[0] for name in names if "/" in name}

    def commit() -> Pushed:
        info: Any = api.repo_info(repo_id, repo_type=repo_type)
        there = [sibling.rfilename for sibling in info.siblings or []]
        stale = [name for name in there if name.split("/")[0] in folders and "/" in name and name not in names]
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            *(CommitOperationAdd(name, folder / name) for name in names),
            *(CommitOperationDelete(name) for name in stale),
        ]
        done = api.create_commit(
            repo_id,
            operations,
            commit_message="Share a model with its privacy report"
            if repo_type == "model"
            else "Share a synthetic dataset with its privacy report",
            repo_type=repo_type,
            parent_commit=info.sha,
        )
        url = f"{api.endpoint}/{'' if repo_type == 'model' else f'{repo_type}s/'}{repo_id}"
        return Pushed(url, done.oid, done.oid != info.sha)

    try:
        return _try_again(commit)
    except _Refused as error:
        raise ValueError(
            f"The Hub refused the push to {repo_id}: {error}. Use a token that may write there."
        ) from None
    except ValueError as error:  # the Hub's word on the metadata of the card
        raise ValueError(f"Expected the card to be valid: {' '.join(str(error).split())}") from None


def canonical_dataset_id(name: str) -> str:
    """The id that a dataset has on the Hub now, because old ids keep working; `name` itself if the Hub knows none."""
    try:
        return _try_again(lambda: HfApi().dataset_info(name, timeout=10)).id
    except (_Refused, HubError, ValueError):  # refused, not reached, or no id
        return name


def is_public_dataset(name: str) -> bool:
    """True if anybody can download this dataset from the Hub; also false if the Hub is not reached."""
    try:
        info = _try_again(lambda: HfApi(token=False).dataset_info(name, timeout=10))
    except (_Refused, HubError, ValueError):
        return False
    return not info.private and not getattr(info, "gated", False)


def fetch_published(
    repo_id: str, names: Iterable[str], *, repo_type: str = "model", revision: str | None = None
) -> tuple[dict[str, Path], dict[str, str | None]]:
    """
    Downloads files of these names, and no other, of one commit of a repository, each of a size that it may have.

    Returns:
        `tuple[dict[str, Path], dict[str, str | None]]`: The files by name, and the names of all files of the
        repository with the sha256 that the Hub keeps of large ones.

    Raises:
        ValueError: If there is no such repository, or a file is too large.
        HubError: If the Hub was not reached or failed.
    """
    api = HfApi()
    try:
        info: Any = _try_again(
            lambda: api.repo_info(repo_id, repo_type=repo_type, revision=revision, files_metadata=True)
        )
    except _Refused as error:
        raise ValueError(f"Expected {repo_id} to be a folder, or a {repo_type} on the Hub: {error}.") from None
    sizes = {sibling.rfilename: sibling.size for sibling in info.siblings or []}
    found = {}
    for name in names:
        if name not in sizes:
            continue
        size, largest = sizes[name], MAX_SIZES[PurePosixPath(name).suffix]
        if size is None or size > largest:
            raise ValueError(f"Expected {name} of {repo_id} to have at most {largest:,} bytes: it has {size}.")
        path = _try_again(
            lambda name=name: api.hf_hub_download(repo_id, name, repo_type=repo_type, revision=info.sha)  # type: ignore[misc]
        )
        found[name] = Path(path)
    large = {sibling.rfilename: sibling.lfs for sibling in info.siblings or []}
    return found, {name: None if large[name] is None else large[name].sha256 for name in sorted(sizes)}


def fetch_model(
    repo_id: str, names: Iterable[str], *, revision: str | None = None
) -> tuple[str, dict[str, Path], list[str]]:
    """
    Downloads files of these names, and no other, of one commit of a model that a run starts from.

    Returns:
        `tuple[str, dict[str, Path], list[str]]`: The commit, the files by name, and the names of all files there.

    Raises:
        ValueError: If there is no such model or revision, or it may not be read; the message is the reason alone.
        HubError: If the Hub was not reached or failed.
    """
    try:
        commit = str(_try_again(lambda: HfApi().repo_info(repo_id, revision=revision)).sha)
        files, listed = fetch_published(repo_id, names, revision=commit)
    except _Refused as error:
        cure = "look at its name, or log in with `hf auth login` if it is private"
        if error.is_gated:
            cure = "it is gated: accept its terms on the Hub, and log in with `hf auth login`"
        raise ValueError(f"{error}; {cure}") from None
    return commit, files, list(listed)


# --- the network ---------------------------------------------------------------------------------------------------


class _Refused(Exception):
    """The Hub understood, and said no; another try would not help. `is_gated` if terms have to be accepted."""

    def __init__(self, reason: str, *, is_gated: bool = False) -> None:
        super().__init__(reason)
        self.is_gated = is_gated


def _try_again(call: Callable[[], Value]) -> Value:
    """Calls, and calls again after a failure that may pass: a lost connection, a conflict, an overloaded Hub."""
    for wait in (*WAITS, None):
        try:
            return call()
        except Exception as error:
            reason = _one_line(error)
            if _is_refusal(error):
                raise _Refused(reason, is_gated=isinstance(error, GatedRepoError)) from None
            if not _may_pass(error):
                raise
            if wait is None or isinstance(error, OfflineModeIsEnabled):
                raise HubError(f"the Hub could not be used: {reason}") from None
            logger.warning(f"The Hub: {reason} Trying again in {wait:g} s.")
            time.sleep(wait)
    raise AssertionError("the last try returns or raises")


def _status(error: Exception) -> int | None:
    return (
        getattr(getattr(error, "response", None), "status_code", None) if isinstance(error, HfHubHTTPError) else None
    )


def _is_refusal(error: Exception) -> bool:
    kinds = (LocalTokenNotFoundError, RepositoryNotFoundError, EntryNotFoundError)
    return isinstance(error, kinds) or _status(error) in (400, 401, 403, 404)


def _may_pass(error: Exception) -> bool:
    # huggingface_hub raises the errors of requests, httpx or httpx2, by its version; their names are the same.
    names = {kind.__name__ for kind in type(error).__mro__}
    lost = bool(names & {"TransportError", "RequestException"}) and not isinstance(error, HfHubHTTPError)
    return lost or isinstance(error, (ConnectionError, TimeoutError)) or _status(error) in _PASSING


def _one_line(error: Any) -> str:
    """The first line of an error's message that says something."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".") or type(error).__name__
