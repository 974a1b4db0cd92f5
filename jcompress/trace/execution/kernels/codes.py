"""Products of an activation with packed integer codes: unpacked and widened in registers, scaled after each group.

Codes lie as :class:`~jcompress.formats.Bits` packs them: ``8 / bits`` neighbours along the last axis in a byte. What a
byte holds is never laid out side by side: the first of each byte make one product, the second another (its phases),
and the small results are put in their order outside.
"""

from __future__ import annotations

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from jcompress.trace.execution.kernels.platforms import Codes, Target, divisor, padded, precision_of


def by_rows(
    x: jax.Array, data: jax.Array, scale: jax.Array | None, zero: jax.Array | None, codes: Codes, target: Target
) -> jax.Array:
    """``x @ w`` for codes (inputs, outputs) that are packed along the outputs.

    Each program takes some groups of inputs and a block of outputs; sums over groups of programs are left to XLA, so
    that no program waits for another.

    Args:
      x: (rows, inputs), bfloat16 or float32.
      data: uint8 (inputs, bytes).
      scale: (groups, outputs), or None.
      zero: (groups, outputs) zero points, or None.
      codes: how a byte is read.
      target: what it is made for.

    Returns:
      float32 (rows, outputs).
    """
    (rows, inputs), phases = x.shape, codes.phases
    group = codes.group or min(target.chunk, inputs)
    count, columns = -(-inputs // group), data.shape[1]
    each = min(target.depth // group or 1, count)
    wide = divisor(columns, target.width)
    x = padded(padded(x, 0, target.rows), 1, group * each)
    data = padded(padded(data, 0, group * each), 1, wide)
    blocks, m = x.shape[1] // group, x.shape[0]
    own = x.reshape(m, blocks, group).transpose(1, 0, 2)
    operands = [own, data.reshape(blocks, group, data.shape[1])]
    for array in (scale, zero):
        if array is not None:  # (phases, groups, 1, bytes), as a program reads them
            spread = padded(array.astype(jnp.float32), 1, wide * phases, columns * phases)
            spread = padded(spread, 0, each, count).reshape(blocks, -1, phases)
            operands.append(spread.transpose(2, 0, 1)[:, :, None])
    kernel = functools.partial(_rows_kernel, codes=codes, each=each, scaled=scale is not None, affine=zero is not None)
    splits = blocks // each
    out = pl.pallas_call(
        kernel,
        grid=(operands[1].shape[2] // wide, splits),
        in_specs=[
            pl.BlockSpec((each, m, group), lambda j, i: (i, 0, 0)),
            pl.BlockSpec((each, group, wide), lambda j, i: (i, 0, j)),
            *[pl.BlockSpec((phases, each, 1, wide), lambda j, i: (0, i, 0, j))] * (len(operands) - 2),
        ],
        out_specs=pl.BlockSpec((1, phases, m, wide), lambda j, i: (i, 0, 0, j)),
        out_shape=jax.ShapeDtypeStruct((splits, phases, m, operands[1].shape[2]), jnp.float32),
        **target.options,
    )(*operands)
    return out.sum(0).transpose(1, 2, 0).reshape(m, -1)[:rows, : codes.length]


def _rows_kernel(x_ref: Any, w_ref: Any, *refs: Any, codes: Codes, each: int, scaled: bool, affine: bool) -> None:
    *known, out_ref = refs
    precision = precision_of(x_ref.dtype)

    def group(i: Any, totals: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
        x, few = x_ref[i], w_ref[i].astype(jnp.int32)
        found = []
        for phase, total in enumerate(totals):
            levels = codes.levels(few, phase, x.dtype)
            part = jnp.dot(x, levels, precision=precision, preferred_element_type=jnp.float32)
            if affine:
                part -= jnp.sum(x.astype(jnp.float32), axis=1, keepdims=True) * known[-1][phase, i]
            found.append(total + (part * known[0][phase, i] if scaled else part))
        return tuple(found)

    start = jnp.zeros((x_ref.shape[1], w_ref.shape[2]), jnp.float32)
    totals = lax.fori_loop(0, each, group, (start,) * codes.phases)
    for phase, total in enumerate(totals):
        out_ref[0, phase] = total


def by_columns(
    x: jax.Array, data: jax.Array, scale: jax.Array | None, zero: jax.Array | None, codes: Codes, target: Target
) -> jax.Array:
    """``x @ w.T`` for codes (outputs, inputs) that are packed along the inputs, as a table that embeds and predicts.

    A group is a part of a row, which no matrix unit takes by itself. So ``x`` is spread to a matrix with a column for
    each group, zero outside of it: one product gives the sums of all groups, which are scaled and added.

    Args:
      x: (rows, inputs) of few rows.
      data: uint8 (outputs, bytes).
      scale: (outputs, groups), or None.
      zero: (outputs, groups) zero points, or None.
      codes: how a byte is read.
      target: what it is made for.

    Returns:
      float32 (rows, outputs).
    """
    (rows, inputs), phases, outputs = x.shape, codes.phases, data.shape[0]
    group = codes.group or min(target.chunk, inputs)
    count = -(-inputs // group)
    each = target.groups(count, group)  # groups a program
    tall = divisor(outputs, target.height)
    x = padded(x, 1, group * each)
    blocks = x.shape[1] // (group * each)
    deep = group * each // phases  # bytes a program, along a row
    data = padded(padded(data, 0, tall), 1, deep)
    split = x.reshape(rows, blocks, each, group // phases, phases)
    # (blocks, rows, phases, bytes, groups): which group a byte belongs to.
    spread = jnp.einsum("mbgkp,gh->bmpgkh", split, jnp.eye(each, dtype=x.dtype)).reshape(blocks, rows, phases, deep, -1)
    operands = [spread, data]
    for array in (scale, zero):
        if array is not None:
            wide = padded(padded(array.astype(jnp.float32), 0, tall), 1, each, count)
            operands.append(wide.reshape(-1, blocks, each).transpose(1, 0, 2))
    kernel = functools.partial(
        _columns_kernel, codes=codes, group=group // phases, scaled=scale is not None, affine=zero is not None
    )
    out = pl.pallas_call(
        kernel,
        grid=(data.shape[0] // tall, blocks),
        in_specs=[
            pl.BlockSpec((1, rows, phases, deep, each), lambda j, i: (i, 0, 0, 0, 0)),
            pl.BlockSpec((tall, deep), lambda j, i: (j, i)),
            *[pl.BlockSpec((1, tall, each), lambda j, i: (i, j, 0))] * (len(operands) - 2),
        ],
        out_specs=pl.BlockSpec((1, rows, tall), lambda j, i: (i, 0, j)),
        out_shape=jax.ShapeDtypeStruct((blocks, rows, data.shape[0]), jnp.float32),
        **target.options,
    )(*operands)
    return out.sum(0)[:, :outputs]


def _columns_kernel(x_ref: Any, w_ref: Any, *refs: Any, codes: Codes, group: int, scaled: bool, affine: bool) -> None:
    *known, out_ref = refs
    few, precision = w_ref[...].astype(jnp.int32), precision_of(x_ref.dtype)
    for row in range(x_ref.shape[1]):
        total = jnp.zeros((few.shape[0], x_ref.shape[-1]), jnp.float32)
        sums = jnp.zeros((1, x_ref.shape[-1]), jnp.float32)
        for phase in range(codes.phases):
            x = x_ref[0, row, phase]
            levels = codes.levels(few, phase, x.dtype)
            total += jnp.dot(levels, x, precision=precision, preferred_element_type=jnp.float32)
            sums += jnp.sum(x.astype(jnp.float32), axis=0, keepdims=True)
        if affine:
            total -= sums * known[-1][0]
        out_ref[0, row] = jnp.sum(total * known[0][0] if scaled else total, axis=1)
