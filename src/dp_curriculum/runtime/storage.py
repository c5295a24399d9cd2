"""Files as their owner and the operating system expect them: flushed, of the mode that the umask gives, and named."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


logger = logging.getLogger(__name__)

LITTER = ".tmp-"  # begins the name of everything that is not finished yet

# What file systems and systems answer that cannot flush a folder, or cannot even open one: network shares, FUSE,
# folders that may be written to and not read.
_NO_FOLDER_FLUSH = {errno.EINVAL, errno.ENOTSUP, errno.EOPNOTSUPP, errno.EBADF, errno.EACCES, errno.ENOSYS}
_warned_of: set[int] = set()  # devices
_NETWORK = ("nfs", "cifs", "smb", "9p", "afs", "ceph", "lustre", "gpfs", "gluster", "sshfs", "beegfs", "virtiofs")
_MOUNTS = Path("/proc/self/mountinfo")


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """
    Gives an error of the operating system the path that it is about, where it names none, as those of `write` do.

    Raises:
        OSError: With its number and `path`.
    """
    try:
        yield
    except OSError as error:
        if error.filename is not None or isinstance(error, ConnectionError) or str(path) in str(error):
            raise
        if error.errno is None:
            raise OSError(f"{error}: {str(path)!r}") from error
        raise OSError(error.errno, error.strerror, str(path)) from error


def fsync_directory(folder: Path) -> None:
    """
    Makes the names in a folder durable. A file system that cannot do that is passed over, with one warning.

    Raises:
        OSError: If the disk refuses.
    """
    with naming(folder):
        try:
            _fsync(folder)
        except OSError as error:
            if error.errno not in _NO_FOLDER_FLUSH:
                raise
            _warn_once(folder)


def settle(path: Path) -> None:
    """
    Makes the file or folder at `path` durable, with the modes that new files have here: some libraries make theirs
    readable by their owner alone.

    Raises:
        OSError: If the disk refuses.
    """
    mode = _mode_of_new_files(path.parent)
    for written in [*path.rglob("*"), path]:
        if written.is_dir():
            fsync_directory(written)
            continue
        with naming(written):
            if stat.S_IMODE(written.stat().st_mode) != mode:
                with contextlib.suppress(PermissionError):  # a file system that keeps no modes
                    written.chmod(mode)
            _fsync(written)


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _mode_of_new_files(folder: Path) -> int:
    """File mode that the umask, or the default list of a folder, makes of 0666. Reading the umask would change it."""
    path = folder / f"{LITTER}{uuid.uuid4().hex}"
    handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        return stat.S_IMODE(os.fstat(handle).st_mode)
    finally:
        os.close(handle)
        path.unlink()


def _warn_once(folder: Path) -> None:
    device = folder.stat().st_dev
    if device not in _warned_of:
        _warned_of.add(device)
        logger.warning(
            f"{folder}: this file system cannot flush folders; files that were written just before a power failure "
            "may be missing after it."
        )


def check_local_disk(folder: Path) -> None:
    """
    Refuses a network share, as far as the system tells: its locks may not hold between machines.

    Raises:
        ValueError: Naming the kind of file system.
    """
    kind = file_system(folder)
    if any(name in kind for name in _NETWORK):
        raise ValueError(
            f"Refusing to keep {folder} locked: it is on a network file system ({kind}), where two machines may write "
            "at once. Name a folder of a local disk."
        )


def file_system(folder: Path) -> str:
    """Kind of the file system of a folder, such as `"ext4"`; empty where the system does not tell."""
    if not _MOUNTS.exists():  # another system than Linux
        return ""
    longest, kind = -1, ""
    for line in _MOUNTS.read_text(encoding="utf-8", errors="surrogateescape").splitlines():
        left, _, right = line.partition(" - ")
        point = re.sub(r"\\([0-7]{3})", lambda match: chr(int(match[1], 8)), left.split()[4])
        if folder.resolve().is_relative_to(point) and len(point) >= longest:  # of two mounts in a place, the last
            longest, kind = len(point), right.split()[0]
    return kind
