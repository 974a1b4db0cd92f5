"""Products of an activation with matrices of which only the kept entries, or the kept blocks, are held."""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu

from jcompress.trace.execution.kernels.platforms import Target, divisor, padded, precision_of

ROWS = 8
"""Rows of a mask in a byte."""


def by_groups(x: jax.Array, values: jax.Array, mask: jax.Array, keep: int, of: int, target: Target) -> jax.Array:
    """``x @ w`` where ``w`` keeps ``keep`` of every ``of`` entries along its inputs.

    A kept value is put at the one of ``of`` places that its mask names by comparing ranks, in registers: of memory
    only the kept values and a bit for each entry are read.

    Args:
      x: (rows, inputs).
      values: (8 keep / of, bytes, outputs): the kept values of eight inputs, those of a group in their order.
      mask: uint8 (bytes, outputs): eight inputs in a byte, the first in its lowest bit.
      keep: entries a group.
      of: the size of a group, which divides eight.
      target: what it is made for.

    Returns:
      float32 (rows, outputs).
    """
    rows, outputs, kept = x.shape[0], mask.shape[1], values.shape[0]
    tall, wide = target.chunk, divisor(outputs, target.width)
    x = padded(padded(x, 0, target.rows), 1, ROWS * tall, ROWS * mask.shape[0])
    mask = padded(padded(mask, 0, tall), 1, wide)
    values = padded(padded(values, 1, tall), 2, wide)
    m, blocks = x.shape[0], mask.shape[0] // tall
    own = x.reshape(m, blocks, tall, ROWS).transpose(1, 3, 0, 2)  # each byte's first input, second, ...
    out = pl.pallas_call(
        functools.partial(_groups_kernel, keep=keep, of=of),
        grid=(mask.shape[1] // wide, blocks),
        in_specs=[
            pl.BlockSpec((1, ROWS, m, tall), lambda j, i: (i, 0, 0, 0)),
            pl.BlockSpec((kept, tall, wide), lambda j, i: (0, i, j)),
            pl.BlockSpec((tall, wide), lambda j, i: (i, j)),
        ],
        out_specs=pl.BlockSpec((1, m, wide), lambda j, i: (i, 0, j)),
        out_shape=jax.ShapeDtypeStruct((blocks, m, mask.shape[1]), jnp.float32),
        **target.options,
    )(own, values, mask)
    return out.sum(0)[:rows, :outputs]


def compact(w: np.ndarray, keep: int, of: int) -> tuple[np.ndarray, np.ndarray]:
    """The kept values of a matrix, and a bit for each entry, as :func:`by_groups` reads them.

    Args:
      w: (inputs, outputs), zero where it is not kept.
      keep: entries a group at most.
      of: the size of a group along the inputs, which divides eight.

    Returns:
      ``(values, mask)``.

    Raises:
      ValueError: if a group keeps more.
    """
    inputs, outputs = w.shape
    w = np.pad(w, ((0, -inputs % ROWS), (0, 0)))
    grouped = w.reshape(-1, of, outputs)
    shown = grouped != 0
    if (shown.sum(1) > keep).any():
        raise ValueError(f"found a group of {of} that keeps more than {keep} of {of} entries; give the pattern it has")
    order = np.argsort(~shown, axis=1, kind="stable")[:, :keep]  # kept ones first, in their order
    values = np.take_along_axis(grouped, order, axis=1)
    values = values.reshape(-1, ROWS // of * keep, outputs).transpose(1, 0, 2)
    return values, np.packbits(shown.reshape(-1, ROWS, outputs), axis=1, bitorder="little")[:, 0]


def _groups_kernel(x_ref: Any, values_ref: Any, mask_ref: Any, out_ref: Any, *, keep: int, of: int) -> None:
    bits, precision = mask_ref[...].astype(jnp.int32), precision_of(x_ref.dtype)
    total = jnp.zeros(out_ref.shape[1:], jnp.float32)
    for group in range(ROWS // of):
        rank = jnp.zeros_like(bits)
        values = [values_ref[group * keep + i] for i in range(keep)]
        for place in range(group * of, (group + 1) * of):
            shown = (bits >> place) & 1
            w = jnp.zeros_like(values[0])
            for i, value in enumerate(values):
                w = jnp.where((shown == 1) & (rank == i), value, w)
            rank += shown
            total += jnp.dot(
                x_ref[0, place], w.astype(x_ref.dtype), precision=precision, preferred_element_type=jnp.float32
            )
    out_ref[0] = total


def by_blocks(x: jax.Array, blocks: jax.Array, inputs: np.ndarray, counts: np.ndarray, target: Target) -> jax.Array:
    """``x @ w`` where ``w`` keeps some of its square blocks, those of a column of blocks behind one another.

    On a TPU the places of the blocks are known to the machine that fetches them, before a kernel runs, so only kept
    ones are fetched; one step a block, which adds to the output block that it shares with the step before it. On a
    GPU a program walks along the kept blocks of its column.

    Args:
      x: (rows, inputs).
      blocks: (kept, size, size), column by column of blocks.
      inputs: int32 (kept,): the row of blocks of each.
      counts: int32 (columns of blocks,): how many a column keeps.
      target: what it is made for.

    Returns:
      float32 (rows, outputs).
    """
    run = walked if target.name == "gpu" else _fetched
    return run(x, blocks, np.asarray(inputs, np.int32), np.asarray(counts, np.int32), target)


def _split(x: jax.Array, size: int, target: Target) -> jax.Array:
    """The activation in blocks of inputs, (blocks, rows, size)."""
    x = padded(padded(x, 0, target.rows), 1, size)
    return x.reshape(x.shape[0], -1, size).transpose(1, 0, 2)


def walked(x: jax.Array, blocks: jax.Array, inputs: np.ndarray, counts: np.ndarray, target: Target) -> jax.Array:
    """:func:`by_blocks`, a program a column of blocks."""
    rows, size = x.shape[0], blocks.shape[-1]
    x = _split(x, size, target)
    m = x.shape[1]
    starts = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)
    places = [jnp.asarray(starts), jnp.asarray(inputs, jnp.int32)]
    whole = [pl.BlockSpec(a.shape, lambda j, n=a.ndim: (0,) * n) for a in (*places, x, blocks)]
    return pl.pallas_call(
        _walked_kernel,
        grid=(len(counts),),
        in_specs=whole,
        out_specs=pl.BlockSpec((m, size), lambda j: (0, j)),
        out_shape=jax.ShapeDtypeStruct((m, len(counts) * size), jnp.float32),
        **target.options,
    )(*places, x, blocks)[:rows]


def _walked_kernel(starts_ref: Any, inputs_ref: Any, x_ref: Any, w_ref: Any, out_ref: Any) -> None:
    column, precision = pl.program_id(0), precision_of(x_ref.dtype)

    def step(i: Any, total: jax.Array) -> jax.Array:
        x, w = x_ref[inputs_ref[i]], w_ref[i].astype(x_ref.dtype)
        return total + jnp.dot(x, w, precision=precision, preferred_element_type=jnp.float32)

    start = jnp.zeros(out_ref.shape, jnp.float32)
    out_ref[...] = lax.fori_loop(starts_ref[column], starts_ref[column + 1], step, start)


def _fetched(x: jax.Array, blocks: jax.Array, inputs: np.ndarray, counts: np.ndarray, target: Target) -> jax.Array:
    given, size = x.shape[0], blocks.shape[-1]
    x = _split(x, size, target)
    m = x.shape[1]
    # A column that keeps nothing has a step, too, with a block of zeros that stands behind the others.
    takes = np.maximum(counts, 1)
    columns = np.repeat(np.arange(len(counts), dtype=np.int32), takes)
    ends = np.cumsum(takes)
    which = np.full(len(columns), len(inputs), np.int32)
    which[np.repeat(counts > 0, takes)] = np.arange(len(inputs))
    rows = np.append(inputs, 0).astype(np.int32)[which]
    first = np.zeros(len(columns), np.int32)
    first[np.append(0, ends[:-1])] = 1
    held = jnp.concatenate([blocks, jnp.zeros((1, size, size), blocks.dtype)]) if (counts == 0).any() else blocks
    spec = tpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=4,
        grid=(len(columns),),
        in_specs=[
            pl.BlockSpec((1, m, size), lambda i, which, rows, columns, first: (rows[i], 0, 0)),
            pl.BlockSpec((1, size, size), lambda i, which, rows, columns, first: (which[i], 0, 0)),
        ],
        out_specs=pl.BlockSpec((1, m, size), lambda i, which, rows, columns, first: (columns[i], 0, 0)),
    )
    out = pl.pallas_call(
        _fetched_kernel,
        grid_spec=spec,
        out_shape=jax.ShapeDtypeStruct((len(counts), m, size), jnp.float32),
        **target.options,
    )(*map(jnp.asarray, (which, rows, columns, first)), x, held)
    return out.transpose(1, 0, 2).reshape(m, -1)[:given]


def _fetched_kernel(which: Any, rows: Any, columns: Any, first: Any, x_ref: Any, w_ref: Any, out_ref: Any) -> None:
    x, w = x_ref[0], w_ref[0].astype(x_ref.dtype)
    part = jnp.dot(x, w, precision=precision_of(x.dtype), preferred_element_type=jnp.float32)
    is_first = first[pl.program_id(0)] == 1

    @pl.when(is_first)
    def _() -> None:
        out_ref[0] = part

    @pl.when(jnp.logical_not(is_first))
    def _() -> None:
        out_ref[0] += part
