"""Files that are replaced whole: a reader sees the old one or the new one, whatever happens to the writer."""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import secrets
import stat
from collections.abc import Callable, Iterator
from io import BufferedReader
from typing import Any, BinaryIO, TypeVar

import numpy as np

from jcompress.io.manifest import StorageError

try:
    import fcntl
except ImportError:  # Windows, where a file that is open cannot be removed
    fcntl = None  # type: ignore[assignment]

_T = TypeVar("_T")


class _FileError(StorageError, OSError):
    """So that ``except OSError`` works too."""


class _MissingFileError(StorageError, FileNotFoundError):
    """So that ``except FileNotFoundError`` works too."""


@contextlib.contextmanager
def told(path: Any, what: str) -> Iterator[None]:
    """What the system refuses is told in one sentence."""
    try:
        yield
    except StorageError:
        raise
    except FileNotFoundError as error:
        raise _with_number(_MissingFileError(f"{path}: there is no such file; check the path"), error) from None
    except OSError as error:
        raise _with_number(_FileError(f"{path}: {what} failed: {error.strerror or error}"), error) from None


def _with_number(told: OSError, error: OSError) -> OSError:
    told.errno = error.errno
    return told


@contextlib.contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[BufferedReader]:
    """A file to read. Directories, devices and pipes are refused: what they hold has no size."""
    with contextlib.ExitStack() as stack:
        with told(path, "reading"):
            name = _name(path)
            _check_regular(path, os.stat(name))
            file = stack.enter_context(open(name, "rb"))
        yield file


def _name(path: str | os.PathLike[str]) -> str:
    name = os.fsdecode(path)
    if "\0" in name:
        raise StorageError(f"{name!r}: found a zero in the name of a file; check the path")
    return name


def _check_regular(path: Any, status: os.stat_result) -> None:
    if not stat.S_ISREG(status.st_mode):
        found = "a directory" if stat.S_ISDIR(status.st_mode) else "a device or a pipe"
        raise _FileError(f"{path}: found {found}, expected a file; add a name to the path")


def replace(path: str | os.PathLike[str], write: Callable[[BinaryIO], _T]) -> _T:
    """Write beside ``path``, then rename. Links are followed, and the permissions of an old file kept.

    Args:
      path: the file.
      write: what writes to a new file, which is open and empty.

    Returns:
      What ``write`` returns.

    Raises:
      StorageError: where no file can be written, as an ``OSError`` too. An old file is as it was then.
    """
    with told(path, "writing"):
        target, mode = check_target(path)
        folder, name = os.path.split(target)
        stem = _stem(name)
        _remove_stale(folder, stem)
        with _temporary(folder, stem, mode) as file:
            result = write(file)
            file.flush()
            os.fsync(file.fileno())
            if fcntl is None:
                file.close()
            os.replace(file.name, target)
        _sync_folder(folder)
        return result


def check_target(path: str | os.PathLike[str]) -> tuple[str, int | None]:
    """Where a file of this name would be written, and the permissions of one that is there.

    Raises:
      StorageError: where none can be, as an ``OSError`` too.
    """
    target = os.path.realpath(_name(path))
    mode = _mode(path, target)
    if not os.path.isdir(folder := os.path.dirname(target)):
        raise _MissingFileError(f"{path}: there is no directory {folder}; make it first")
    return target, mode


def _mode(path: Any, target: str) -> int | None:
    """The permissions of the file that is there."""
    try:
        status = os.stat(target)
    except FileNotFoundError:
        return None
    _check_regular(path, status)
    return stat.S_IMODE(status.st_mode)


def _stem(name: str) -> str:
    """What the names of temporary files begin with; a name that is nearly too long itself is shortened."""
    long = len(os.fsencode(name)) > 200
    return f".{hashlib.blake2b(os.fsencode(name), digest_size=16).hexdigest() if long else name}."


@contextlib.contextmanager
def _temporary(folder: str, stem: str, mode: int | None) -> Iterator[BinaryIO]:
    """A new file, locked while it is written so that nobody takes it for a stale one; gone after an exception."""
    while True:
        name = os.path.join(folder, f"{stem}{secrets.token_hex(4)}.tmp")
        try:
            with open(name, "xb") as file:
                _lock(file)
                if not os.path.exists(name):
                    continue  # it was removed as a stale one between the two calls
                if mode is not None:
                    os.chmod(name, mode)
                yield file
                return
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(name)
            raise


def _lock(file: BinaryIO) -> None:
    if fcntl is not None:
        with contextlib.suppress(OSError):  # some file systems have no locks; there nothing counts as stale
            fcntl.flock(file, fcntl.LOCK_EX)


def _remove_stale(folder: str, stem: str) -> None:
    """Remove what earlier writers left that were killed: their files are there, and no longer locked."""
    pattern = re.compile(re.escape(stem) + r"[0-9a-f]{8}\.tmp")
    with contextlib.suppress(OSError):
        for name in filter(pattern.fullmatch, os.listdir(folder)):
            with contextlib.suppress(OSError):
                _remove_unlocked(os.path.join(folder, name))


def _remove_unlocked(path: str) -> None:
    if fcntl is None:
        os.unlink(path)
        return
    with open(path, "rb") as file:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.unlink(path)


def _sync_folder(folder: str) -> None:
    """Make the renaming last through a power cut, where the system can open folders."""
    with contextlib.suppress(OSError):
        handle = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


class Bytes:
    """The rest of a file from where it stands, read slice by slice."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._start = file, file.tell()
        self.size = size

    def __getitem__(self, part: slice) -> np.ndarray:
        first, last, _ = part.indices(self.size)
        self._file.seek(self._start + first)
        data = self._file.read(last - first)
        if len(data) != last - first:
            raise StorageError("the file was cut short while it was read; restore it from a copy")
        return np.frombuffer(data, np.uint8)

    def checksum(self) -> str:
        """The checksum of all of them."""
        digest = hashlib.blake2b(digest_size=8)
        for first in range(0, self.size, 1 << 20):
            digest.update(self[first : first + (1 << 20)].data)
        return digest.hexdigest()
