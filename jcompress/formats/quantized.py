"""Codes of a few bits on a grid, with a scale."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Compressed, Relaying
from jcompress.numeric import scaling

Groups = int | tuple[int, int] | None


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Quantized(Compressed):
    """Codes of 1 to 16 bits on a grid: ``scale * level(codes)``.

    The grid is one of four. Integers, symmetric (signed codes) or affine (unsigned codes with a ``zero``): the level
    is ``codes - zero``, and one symmetric bit codes a sign, with levels ``2 * codes + 1`` for codes -1 and 0. Narrow
    floats: the codes are 8- or 4-bit floats, and are the levels. A table: the level is ``table[codes]``.

    Scales and zero points have the rank of ``codes`` and broadcast against it; with a ``group_size`` their axis
    ``group_axis`` counts groups of that many entries, the last one possibly smaller. Of blocks there are two of each.

    Attributes:
      codes: int8, uint8, int16, uint16, or an 8- or 4-bit float array in the shape of the dense one.
      scale: float array, or a node that stands for one; trainable, unless it is of 8 bits.
      zero: zero points of the codes' dtype in the shape of ``scale``, or None. Held, so that 0.0 stays exact. Or a node
        that stands for fractions, whose 0.0 is not.
      bits: bits a code, 1 to 16.
      table: the levels that uint8 codes count, ascending, at most ``2**bits``; or None.
      axes: the axes along which a scale is shared, negative.
      group_size: entries along ``group_axis`` that share a scale, or None; of a block, its rows and its columns.
      dtype: dtype of the dense array.
      full_range: whether signed codes go down to ``-2**(bits - 1)``, as those of learned steps; else ``encode`` stops
        one above it.
      group_axis: the axis that groups lie along, negative; of blocks both.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.formats.Quantized(codes=jnp.array([[1, -2]], jnp.int8), scale=jnp.array([[0.5]]), bits=4)
      >>> node.materialize().tolist(), node.nbits()
      ([[0.5, -1.0]], 40)
    """

    codes: Any
    scale: Any
    zero: Any = None
    bits: int = dataclasses.field(kw_only=True, metadata={"static": True})
    table: tuple[float, ...] | None = dataclasses.field(default=None, metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(default=(-2,), metadata={"static": True})
    group_size: Groups = dataclasses.field(default=None, metadata={"static": True})
    dtype: np.dtype = dataclasses.field(default=np.dtype("float32"), metadata={"static": True})
    full_range: bool = dataclasses.field(default=False, metadata={"static": True})
    group_axis: int | tuple[int, ...] = dataclasses.field(default=-2, metadata={"static": True})
    elementwise: ClassVar[tuple[str, ...]] = ("codes",)

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        scale = self.scales(key=key)
        return (self._spread(scale) * self.levels(scale.dtype)).astype(self.dtype)

    def encode(self, w: jax.Array) -> Quantized:
        """The node with the codes nearest to ``w``, its scales and zero points as they are."""
        scale = core.dense(self.scale).astype(jnp.float32)
        scale = self._spread(scale)
        zero, dtype = self._offset(jnp.float32), jnp.dtype(self.codes.dtype)
        codes = nearest(w.astype(jnp.float32), scale, zero, self.bits, self.table, dtype, self.full_range)
        return dataclasses.replace(self, codes=codes)

    def levels(self, dtype: Any) -> jax.Array:
        """What the scale multiplies, as floats in the shape of ``codes``."""
        if self.table is not None:
            return jnp.asarray(self.table, dtype)[self.codes.astype(jnp.int32)]
        codes = self.codes.astype(dtype)
        if (zero := self._offset(dtype)) is not None:
            return codes - zero
        return 2 * codes + 1 if self.bits == 1 else codes

    def _offset(self, dtype: Any) -> jax.Array | None:
        """The zero points, for each code."""
        return None if self.zero is None else self._spread(core.dense(self.zero).astype(dtype))

    def scales(self, *, key: jax.Array | None = None) -> jax.Array:
        """The scales as products take them: as wide as the array, and as float32 where they are too narrow for codes.

        A narrower product would be rounded where it is computed by itself, and not where XLA fuses it.
        """
        scale, codes = core.dense(self.scale, key=key), 1 if self.bits <= 8 else 2
        scale = scale if jnp.dtype(scale.dtype).itemsize > codes else scale.astype(jnp.float32)
        return scale.astype(jnp.promote_types(scale.dtype, self.dtype))

    def _spread(self, scale: jax.Array) -> jax.Array:
        return spread(scale, self.codes, self.group_size, self.group_axis)

    def relaid(self, relaying: Relaying, /) -> Quantized | None:
        if any(core.is_node(x) for x in (self.codes, self.scale, self.zero)):
            return None
        codes, scale = relaying.array(self.codes), relaying.array(self.scale, self.group_size)
        zero = None if self.zero is None else relaying.array(self.zero, self.group_size)
        if codes is None or scale is None or (zero is None and self.zero is not None):
            return None
        axes = relaying.axes(self.axes)
        along = self.group_axis if self.group_size is None else relaying.groups(self.group_size)
        return dataclasses.replace(self, codes=codes, scale=scale, zero=zero, axes=axes, group_axis=along)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Quantized:
        if not core.is_node(self.scale) and self.scale is not None and not core.is_trainable(self.scale):
            return self
        levels, w = self.levels(jnp.float32), w.astype(jnp.float32)
        if where is not None:
            levels = jnp.where(where, levels, 0.0)
            w = jnp.where(where, w, 0.0)
        square = pool(levels * levels, self.axes, self.group_size, jnp.add, 0.0, self.group_axis)
        small = self._small(w.size // max(square.size, 1) + 1)
        product = pool(levels * small * w, self.axes, self.group_size, jnp.add, 0.0, self.group_axis)
        scale = jnp.where(square > 0, product / jnp.maximum(square * small, jnp.finfo(jnp.float32).tiny), 0.0)
        if core.is_node(self.scale):
            return dataclasses.replace(self, scale=self.scale.project(scale))
        return dataclasses.replace(self, scale=scale if self.scale is None else scale.astype(self.scale.dtype))

    def _small(self, size: int) -> float:
        """A power of two, under which so many levels times weights add up inside float32."""
        most = max(map(abs, self.table)) if self.table is not None else 2.0**self.bits
        if jnp.issubdtype(self.codes.dtype, jnp.floating):
            most = float(jnp.finfo(self.codes.dtype).max)
        return 2.0 ** -max(math.ceil(math.log2(max(size * most, 1))), 0)

    def widths(self) -> dict[str, int]:
        return {"codes": self.bits, "zero": self.bits}


def nearest(
    w: jax.Array,
    scale: jax.Array | float,
    zero: jax.Array | None,
    bits: int,
    table: tuple[float, ...] | None,
    dtype: Any,
    full_range: bool = False,
) -> jax.Array:
    """The codes of the levels nearest to ``w / scale``, ties to even; outside the grid, those of its ends.

    Args:
      w: float32 array.
      scale: scales that broadcast against it.
      zero: zero points that broadcast against it, or None.
      bits: bits a code.
      table: ascending levels, or None; a tie goes to the lower one.
      dtype: dtype of the codes.
      full_range: whether signed codes go down to ``-2**(bits - 1)``.
    """
    if table is not None:
        return _nearest_in_table(w, jnp.asarray(scale), np.asarray(table, np.float32)).astype(dtype)
    scaled = scaling.ratio(w, scale)
    if jnp.issubdtype(dtype, jnp.floating):
        most = float(jnp.finfo(dtype).max)
        return jnp.clip(scaled, -most, most).astype(dtype)
    if zero is not None:
        whole = jnp.round(zero)
        return jnp.clip(jnp.round(scaled + (zero - whole)) + whole, 0, 2**bits - 1).astype(dtype)
    if bits == 1:
        return jnp.where(scaled < 0, -1, 0).astype(dtype)
    most = 2 ** (bits - 1) - 1
    return jnp.clip(jnp.round(scaled), -most - full_range, most).astype(dtype)


def _nearest_in_table(w: jax.Array, scale: jax.Array, levels: np.ndarray) -> jax.Array:
    """How many midpoints between levels lie below. A few are compared with one by one: faster than a search."""
    middles = (levels[1:] + levels[:-1]) / 2
    if len(middles) > 31:
        return jnp.searchsorted(jnp.asarray(middles), scaling.ratio(w, scale), side="left")
    w, scale = jnp.where(scale < 0, -w, w), jnp.abs(scale)
    return sum(((w > float(m) * scale).astype(jnp.int32) for m in middles), start=jnp.zeros(w.shape, jnp.int32))


def pool(
    x: jax.Array,
    axes: tuple[int, ...],
    group_size: Groups,
    combine: Any,
    start: Any,
    group_axis: int | tuple[int, ...] = -2,
) -> jax.Array:
    """Reduce ``x`` over what shares a scale, to the shape of the scales.

    Args:
      x: array.
      axes: negative axes to reduce.
      group_size: reduce the axis of groups by this many, the last padded with ``start``; or None for all of ``axes``.
        Of blocks two numbers, by which the two axes of groups are reduced.
      combine: ``jnp.add``, ``jnp.maximum`` or ``jnp.minimum``.
      start: its identity.
      group_axis: the axis of groups, negative, or both axes of blocks; the last two by default.
    """
    reduce: Any = {jnp.add: jnp.sum, jnp.maximum: jnp.max, jnp.minimum: jnp.min}[combine]
    if group_size is None:
        return reduce(x, axis=axes, keepdims=True, initial=start)
    for size, place in _along(group_size, group_axis):
        axis, rows = x.ndim + place, x.shape[place]
        groups = -(-rows // size)
        x = jnp.pad(x, [(0, groups * size - rows if d == axis else 0) for d in range(x.ndim)], constant_values=start)
        x = reduce(x.reshape(*x.shape[:axis], groups, size, *x.shape[axis + 1 :]), axis=axis + 1, initial=start)
    return x


def spread(scale: jax.Array, like: jax.Array, group_size: Groups, group_axis: int | tuple[int, ...] = -2) -> jax.Array:
    """The inverse of :func:`pool`: repeat what is shared until it broadcasts against ``like``."""
    if group_size is None:
        return scale
    for size, place in _along(group_size, group_axis):
        axis, shape = scale.ndim + place, scale.shape
        wide = jnp.broadcast_to(jnp.expand_dims(scale, axis + 1), (*shape[: axis + 1], size, *shape[axis + 1 :]))
        wide = wide.reshape(*shape[:axis], shape[axis] * size, *shape[axis + 1 :])
        scale = jax.lax.slice_in_dim(wide, 0, like.shape[place], axis=axis)
    return scale


def _along(size: int | tuple[int, int], axis: int | tuple[int, ...]) -> Iterable[tuple[int, int]]:
    """Sizes of groups, and the axes that they lie along."""
    sizes = size if isinstance(size, tuple) else (size,)
    return zip(sizes, axis if isinstance(axis, tuple) else (axis, -1), strict=False)
