"""One file written by several processes, each its own shards: the bytes are those that one process would write."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
from collections.abc import Callable, Iterator
from typing import Any, BinaryIO

import jax
import numpy as np

from jcompress.core import Part
from jcompress.io import files
from jcompress.io.manifest import StorageError
from jcompress.io.streams import Store, integers, numbers
from jcompress.numeric import packing
from jcompress.numeric.processes import Block, blocks, exchanged, own_blocks, runs, shown_before, spans, texts, whole

_PIECE = 1 << 20
"""Numbers that are made bits at a time."""
_MOST_RUNS = 1 << 20
"""Runs of all processes after which they send one another the bytes that two of them share."""


class _Meeting:
    """Where all processes learn whether one of them failed, so that none waits for it."""

    def __init__(self, path: Any) -> None:
        self._path = path
        self.failed = False

    def agree(self, error: Exception | None = None, note: str = "") -> str:
        """The note of process 0; every process calls this. Raises on all if it is given an error on any."""
        found = [json.loads(text) for text in texts(json.dumps([None if error is None else str(error), note]))]
        wrong = [(i, text) for i, (text, _) in enumerate(found) if text is not None]
        if wrong:
            self.failed = True
            if error is not None:
                raise error
            raise StorageError(f"{self._path}: process {wrong[0][0]} failed: {wrong[0][1]}")
        return found[0][1]


def save(path: str | os.PathLike[str], store: Store, head: Callable[[str], bytes]) -> int:
    """Write a file together; every process calls this.

    Args:
      path: the file, on a file system that all processes share.
      store: what it holds. Its masks are known to all processes, its other arrays shard by shard.
      head: of the checksum of the payload gives the bytes before it, of one length.

    Returns:
      The number of bytes written.

    Raises:
      StorageError: on every process, for what fails on any.
    """
    meeting = _Meeting(path)
    start = len(head("0" * 16))
    if jax.process_index():
        _follow(path, store, start, meeting)
    else:
        try:
            files.replace(path, lambda file: _lead(file, path, store, start, head, meeting))
        except Exception as error:
            if not meeting.failed:
                meeting.agree(error)
            raise
    meeting.agree()
    return start + store.nbytes


def _lead(file: BinaryIO, path: Any, store: Store, start: int, head: Callable[[str], bytes], meeting: _Meeting) -> None:
    """Process 0 makes the file and ends it."""
    file.truncate(start + store.nbytes)
    meeting.agree(note=json.dumps([os.path.basename(file.name), _target(path)]))
    _write_own(file, store, start, meeting)
    digest = hashlib.blake2b(digest_size=8)
    with open(file.name, "rb") as written:  # opened anew, to see what others wrote
        written.seek(start)
        while piece := written.read(_PIECE):
            digest.update(piece)
    file.seek(0)
    file.write(head(digest.hexdigest()))


def _follow(path: Any, store: Store, start: int, meeting: _Meeting) -> None:
    """The others find the file and write their part of it."""
    name, target = json.loads(meeting.agree())
    try:
        if _target(path) != target:
            raise StorageError(f"{path}: process 0 saves to {target}; give all processes one path")
        file = open(os.path.join(os.path.dirname(_target(path)), name), "r+b")  # noqa: SIM115  # closed below
    except OSError as error:
        told = (
            f"{path}: process 0 made a file that is not here ({error.strerror}); save where all processes share files"
        )
        _write_own(None, store, start, meeting, StorageError(told))
        return
    except StorageError as error:
        _write_own(None, store, start, meeting, error)
        return
    with file:
        _write_own(file, store, start, meeting)


def _target(path: Any) -> str:
    return os.path.realpath(os.fsdecode(path))


def _write_own(file: Any, store: Store, start: int, meeting: _Meeting, error: Exception | None = None) -> None:
    """What this process writes. It goes on in step with the others after an error, and raises at the end."""
    writer, bit, count = _Placed(file, start), 0, 0
    for part in store.parts:
        pieces = _own(part)  # where processes communicate
        if error is None:
            try:
                for place, values in pieces:
                    values, width = (values, part.width) if part.code is not None else numbers(part, values)
                    writer.write(bit + place * part.width, values, width)
            except (OSError, StorageError) as found:
                error = found
        bit, count = bit + part.nbits, count + _runs(part)
        if count > _MOST_RUNS or part is store.parts[-1]:
            shared, count = writer.shared(), 0  # here too
            if error is None and not jax.process_index():
                try:
                    writer.join(shared)
                except OSError as found:
                    error = found
    meeting.agree(error or _synced(file))


def _synced(file: Any) -> Exception | None:
    try:
        file.flush()
        os.fsync(file.fileno())
    except OSError as error:
        return error
    return None


def _runs(part: Part) -> int:
    return sum(runs(part.array.shape, block.index)[0].size for block in blocks(part.array)) if spans(part.array) else 2


def _own(part: Part) -> Iterator[tuple[int, np.ndarray]]:
    """Of a part, what this process writes: the place among its numbers, and the numbers from there."""
    x, here, count = part.array, jax.process_index(), jax.process_count()
    if part.code is not None or not spans(x):
        values = integers(part)[0] if part.code is not None else _shown(whole(x), part.where)
        ends = [len(values) * i // count for i in (here, here + 1)]
        return iter([(ends[0], values[slice(*ends)])])
    where = None if part.where is None else whole(part.where)
    return itertools.chain.from_iterable(_of_block(x, block, values, where) for block, values in own_blocks(x))


def _shown(values: np.ndarray, where: Any) -> np.ndarray:
    return values.reshape(-1) if where is None else values[whole(where)]


def _of_block(x: Any, block: Block, values: np.ndarray, where: Any) -> Iterator[tuple[int, np.ndarray]]:
    """The numbers of a block, run by run: entries that follow one another in the whole array too."""
    starts, length = runs(x.shape, block.index)
    if not values.size:
        return
    rows = np.ascontiguousarray(values).reshape(starts.size, length)
    if where is None:
        yield from zip(starts.tolist(), rows, strict=True)
        return
    flat = where.reshape(-1)
    for start, place, row in zip(starts.tolist(), shown_before(flat, starts).tolist(), rows, strict=True):
        yield place, row[flat[start : start + length]]


class _Placed:
    """Writes bits at any place of a file; bytes that it fills in part wait until the others' parts are known."""

    def __init__(self, file: Any, start: int) -> None:
        self._file, self._start = file, start
        self._partial: dict[int, int] = {}

    def write(self, bit: int, values: np.ndarray, width: int) -> None:
        """Write integers of ``width`` bits from a bit of the payload on."""
        for first in range(0, values.size, _PIECE):
            self._write(bit + first * width, values[first : first + _PIECE], width)

    def _write(self, bit: int, values: np.ndarray, width: int) -> None:
        pieces: list[bytes] = []
        writer = packing.BitWriter(pieces.append, bit % 8)
        writer.write(values, width)
        writer.close()
        data, end = b"".join(pieces), bit % 8 + values.size * width
        inside = range(1 if bit % 8 else 0, end // 8)
        for i in {0, len(data) - 1} - set(inside) if data else ():
            place = bit // 8 + i
            self._partial[place] = self._partial.get(place, 0) | data[i]
        if inside:
            self._file.seek(self._start + bit // 8 + inside.start)
            self._file.write(data[inside.start : inside.stop])

    def shared(self) -> list[np.ndarray]:
        """The bytes that every process filled in part; all call this."""
        places = np.fromiter(self._partial.keys(), np.uint64, len(self._partial))
        values = np.fromiter(self._partial.values(), np.uint8, len(self._partial))
        self._partial = {}
        return exchanged(np.concatenate([places.view(np.uint8), values]))

    def join(self, shared: list[np.ndarray]) -> None:
        """Write the bytes of which several processes filled a part each."""
        found = [_pairs(data) for data in shared]
        joined, index = np.unique(np.concatenate([x[0] for x in found]), return_inverse=True)
        data = np.zeros(joined.size, np.uint8)
        np.bitwise_or.at(data, index, np.concatenate([x[1] for x in found]))
        for place, value in zip(joined.tolist(), data.tolist(), strict=True):
            self._file.seek(self._start + place)
            self._file.write(bytes([value]))


def _pairs(data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    count = data.size // 9
    return data[: 8 * count].view(np.uint64), data[8 * count :]
