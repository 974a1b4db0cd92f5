"""Arrays that several processes hold together: which blocks of them are whose, and their values for all.

All that communicates here is called by every process, in the same order.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

_ROUND = 1 << 28
"""Bytes on a device in one exchange."""

Slices = tuple[slice, ...]


def spans(x: Any) -> bool:
    """Whether no process can read the whole of ``x`` by itself."""
    return isinstance(x, jax.Array) and not (x.is_fully_addressable or x.is_fully_replicated)


@dataclasses.dataclass(frozen=True)
class Block:
    """A part of an array that lies on one device.

    Attributes:
      index: where it lies, a slice for each axis with both ends.
      owner: the number of the process that answers for it, where several have copies.
      shape: its lengths.
    """

    index: Slices
    owner: int
    shape: tuple[int, ...]


def blocks(x: jax.Array) -> list[Block]:
    """The blocks that an array consists of, each once, in the same order on every process."""
    owners: dict[tuple[tuple[int, int], ...], int] = {}
    devices: Any = x.sharding.devices_indices_map(x.shape)
    for device, index in devices.items():
        ends = tuple(part.indices(n)[:2] for part, n in zip(index, x.shape, strict=True))
        owners[ends] = min(owners.get(ends, device.process_index), device.process_index)
    return [
        Block(tuple(slice(*end) for end in ends), owner, tuple(b - a for a, b in ends))
        for ends, owner in sorted(owners.items())
    ]


def own_blocks(x: jax.Array) -> Iterator[tuple[Block, np.ndarray]]:
    """The blocks that this process answers for, and their values."""
    here = {
        tuple(part.indices(n)[:2] for part, n in zip(shard.index, x.shape, strict=True)): shard
        for shard in x.addressable_shards
    }
    for block in blocks(x):
        if block.owner == jax.process_index():
            yield block, np.asarray(here[tuple((part.start, part.stop) for part in block.index)].data)


def runs(shape: tuple[int, ...], index: Slices) -> tuple[np.ndarray, int]:
    """Where the runs of a block begin in the whole array, flat and in order, and how long each is.

    A run is entries that follow one another in the whole array too.
    """
    if not shape:
        return np.zeros(1, np.int64), 1
    ends = [part.indices(n)[:2] for part, n in zip(index, shape, strict=True)]
    cut = max((i for i, n in enumerate(shape) if ends[i] != (0, n)), default=0)
    inner = math.prod(shape[cut + 1 :])
    starts, step = np.array([ends[cut][0] * inner], np.int64), inner * shape[cut]
    for i in reversed(range(cut)):
        starts = np.add.outer(np.arange(*ends[i], dtype=np.int64) * step, starts)
        step *= shape[i]
    return starts.reshape(-1), (ends[cut][1] - ends[cut][0]) * inner


def shown_before(mask: np.ndarray, starts: np.ndarray) -> np.ndarray:
    """How many entries a flat mask shows before each of some places, which are in order."""
    between = np.add.reduceat(mask.view(np.uint8), starts, dtype=np.int64)
    return int(mask[: starts[0]].sum(dtype=np.int64)) + np.cumsum(between) - between


def placed(x: Any, sharding: jax.sharding.Sharding) -> jax.Array:
    """An array of the host, or what has its shape and gives blocks of it by their slices, on devices.

    Other processes may have some of the devices; each takes its own blocks.
    """
    known: dict[str, np.ndarray] = {}

    def block(index: Any) -> np.ndarray:
        if str(index) not in known:  # copies of one block follow one another
            known.clear()
            known[str(index)] = np.asarray(x[index])
        return known[str(index)]

    return jax.make_array_from_callback(x.shape, sharding, block)


def whole(x: Any) -> np.ndarray:
    """The values of an array on every process, truth values sent by eight in a byte."""
    if not spans(x):
        return np.asarray(x)
    mine = [_bytes(values) for _, values in own_blocks(x)]
    found = exchanged(np.concatenate([np.zeros(0, np.uint8), *mine]))
    out, at = np.zeros(x.shape, x.dtype), [0] * len(found)
    for block in blocks(x):
        size = math.prod(block.shape)
        taken = -(-size // 8) if x.dtype == np.bool_ else size * np.dtype(x.dtype).itemsize
        start = at[block.owner]
        at[block.owner] += taken
        data = found[block.owner][start : start + taken]
        values = np.unpackbits(data, count=size).astype(np.bool_) if x.dtype == np.bool_ else data.view(x.dtype)
        out[block.index] = values.reshape(block.shape)
    return out


def _bytes(values: np.ndarray) -> np.ndarray:
    flat = np.ascontiguousarray(values).reshape(-1)
    return np.packbits(flat) if flat.dtype == np.bool_ else flat.view(np.uint8)


def exchanged(data: np.ndarray) -> list[np.ndarray]:
    """The bytes of every process, by its number, on all of them; their lengths may differ."""
    if jax.process_count() == 1:
        return [data]
    lengths = _gathered(np.array([data.size], np.uint64).view(np.uint8)).view(np.uint64).reshape(-1).tolist()
    piece = min(1 << max(lengths, default=0).bit_length(), max(_ROUND // jax.process_count(), 1))
    rounds = []
    for start in range(0, max(lengths), piece):  # of one length, so that few programs are compiled
        mine = data[start : start + piece]
        rounds.append(_gathered(np.pad(mine, (0, piece - mine.size))))
    return [
        np.concatenate([np.zeros(0, np.uint8), *(part[i] for part in rounds)])[:length]
        for i, length in enumerate(lengths)
    ]


def _gathered(data: np.ndarray) -> np.ndarray:
    """Bytes of one length from every process, (processes, bytes)."""
    # Imported late: it is heavy, and a single process never needs it.
    from jax.experimental import multihost_utils

    return np.asarray(multihost_utils.process_allgather(data))


def texts(mine: str) -> list[str]:
    """A text from every process."""
    return [bytes(x).decode() for x in exchanged(np.frombuffer(mine.encode(), np.uint8))]
