"""What all quantizers share: levels that a scale stretches over a range, and which entries share a scale."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import Context
from jcompress.formats import Quantized
from jcompress.formats.quantized import Groups, nearest, pool, spread
from jcompress.numeric import scaling


class Range(NamedTuple):
    """Ends of a range, float32 in the shape of the scales; ``low`` is None where it is ``-high``."""

    low: jax.Array | None
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class Grid:
    """The levels of a quantizer, before a scale stretches them.

    Attributes:
      bits: bits a code.
      dtype: dtype of the codes.
      top: the level that the end of the range is mapped to, before the scale is rounded; on an affine grid, the number
        of steps.
      table: the levels that the codes count, or None.
      affine: whether there is a zero point.
      power: how scales become powers of two: ``"up"``, so that nothing is clipped, ``"down"``, or None if they do not.
    """

    bits: int
    dtype: Any
    top: float
    table: tuple[float, ...] | None = None
    affine: bool = False
    power: str | None = None

    @property
    def steps(self) -> float | None:
        """Steps from one end of a uniform grid to the other; None if it is not uniform."""
        if self.table is not None or jnp.issubdtype(self.dtype, jnp.floating):
            return None
        return self.top if self.affine else 2 * self.top

    def over(self, ends: Range) -> tuple[jax.Array, jax.Array | None]:
        """Scales and, on an affine grid, zero points that fit the grid to a range."""
        # A product, because XLA turns a quotient into one in some programs only.
        part = 1.0 / self.top
        scale = ends.high * part
        if ends.low is not None:
            width = ends.high - ends.low
            scale = jnp.where(jnp.isfinite(width), width * part, scale - ends.low * part)
        scale = positive(scale)
        if self.power is not None:
            scale = power_of_two(scale, up=self.power == "up")
        if ends.low is None:
            return scale, None
        return scale, jnp.clip(jnp.round(-ends.low / scale), 0, self.top)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Problem:
    """An array and the grid that it is to be rounded to; all but the range of each scale is decided.

    Attributes:
      values: the array.
      where: entries that count, or None for all.
      grid: the levels.
      axes: negative axes along which a scale is shared.
      group_size: rows of axis -2 that share a scale, rows and columns of a block that does, or None.
    """

    values: jax.Array
    where: jax.Array | None
    grid: Grid = dataclasses.field(metadata={"static": True})
    axes: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    group_size: Groups = dataclasses.field(default=None, metadata={"static": True})

    @property
    def x(self) -> jax.Array:
        """The array in float32, hidden entries 0; made when it is asked for, since it may be twice as large."""
        x = self.values.astype(jnp.float32)
        return x if self.where is None else jnp.where(self.where, x, 0.0)

    def pool(self, x: jax.Array, combine: Any = jnp.add, start: Any = 0.0) -> jax.Array:
        """Reduce an array over what shares a scale."""
        return pool(x, self.axes, self.group_size, combine, start)

    def spread(self, x: jax.Array) -> jax.Array:
        """Repeat what is shared until it broadcasts against ``x``."""
        return spread(x, self.values, self.group_size)

    def normal(self) -> tuple[Problem, scaling.Unit]:
        """The same in units of what shares each scale, where squares and sums of entries stay inside float32."""
        unit = scaling.of(self.pool(jnp.abs(self.x), jnp.maximum))
        spread = scaling.Unit(self.spread(unit.root))
        return dataclasses.replace(self, values=spread.divide(self.x)), unit

    def count(self) -> jax.Array:
        """How many entries share each scale, as float32, 1 at least."""
        one = jnp.ones_like(self.values) if self.where is None else jnp.broadcast_to(self.where, self.values.shape)
        return jnp.maximum(self.pool(one.astype(jnp.float32)), 1.0)

    def full(self) -> Range:
        """The range of all entries, 0 among them."""
        return _full(self)

    def node(self, ends: Range, dtype: Any = np.dtype("float32")) -> Quantized:
        """The array rounded to the grid over a range."""
        scale, zero = self.grid.over(ends)
        return self.scaled(scale, zero, dtype)

    def scaled(self, scale: jax.Array, zero: jax.Array | None = None, dtype: Any = np.dtype("float32")) -> Quantized:
        """The array rounded to the grid at given scales."""
        grid = self.grid
        return Quantized(
            codes=_codes(self, scale, zero),
            scale=scale if grid.power is None else scale.astype(jnp.float8_e8m0fnu),
            zero=None if zero is None else zero.astype(grid.dtype),
            bits=grid.bits, table=grid.table, axes=self.axes, group_size=self.group_size, dtype=np.dtype(dtype),
        )  # fmt: skip

    def error(self, ends: Range) -> jax.Array:
        """The squared error over a range, in the shape of the scales."""
        difference = self.x - self.node(ends).materialize()
        difference = difference if self.where is None else jnp.where(self.where, difference, 0.0)
        return self.pool(difference**2)


# Compiled as a whole also outside ``jit``, so that nothing of the array's size is written out but the codes.


@jax.jit
def _full(problem: Problem) -> Range:
    if not problem.grid.affine:
        return Range(None, problem.pool(jnp.abs(problem.x), jnp.maximum))
    return Range(problem.pool(problem.x, jnp.minimum), problem.pool(problem.x, jnp.maximum))


@jax.jit
def _codes(problem: Problem, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
    grid, offset = problem.grid, None if zero is None else problem.spread(zero)
    return nearest(problem.x, problem.spread(scale), offset, grid.bits, grid.table, grid.dtype)


def fit(method: Any, w: jax.Array, context: Context, grid: Grid, choose: Callable[[Problem], Range]) -> Quantized:
    """The node for one array.

    Args:
      method: with the fields ``group_size``, ``axis`` and ``pad``.
      w: the array.
      context: what is known about it.
      grid: the levels.
      choose: a range for each scale.
    """
    problem = pose(method, w, context, grid)
    return problem.node(choose(problem), w.dtype)


def pose(method: Any, w: jax.Array, context: Context, grid: Grid) -> Problem:
    """The problem that an array poses."""
    check(method, context.path, w.shape)
    groups = getattr(method, "block", None) or method.group_size
    return Problem(w, context.where, grid, shared_axes(w.ndim, groups, method.axis), groups)


def shared_axes(ndim: int, group_size: Groups, axis: int | tuple[int, ...] | None) -> tuple[int, ...]:
    """Negative axes over which one scale is shared; a group shares along axis -2, a block along the last two."""
    if group_size is not None:
        return (-2, -1) if isinstance(group_size, tuple) else (-2,)
    given = () if axis is None or ndim < 2 else axis if isinstance(axis, tuple) else (axis,)
    own = [a if a < 0 else a - ndim for a in given]
    return tuple(a for a in range(-ndim, 0) if a not in own)


def validate_group(method: Any) -> None:
    """Raise unless ``method.group_size`` is a positive number or None, and ``method.block``, if any, a pair of them."""
    block = getattr(method, "block", None)
    if block is not None:
        if not isinstance(block, tuple) or len(block) != 2 or not all(isinstance(n, int) and n > 0 for n in block):
            raise ValueError(
                f"{type(method).__name__}: block={block!r} must be a pair of positive numbers, such as (128, 128)"
            )
        if method.group_size is not None:
            raise ValueError(f"{type(method).__name__}: found group_size and block; a scale is for one or the other")
    if isinstance(method.group_size, tuple):
        raise ValueError(
            f"{type(method).__name__}: found group_size={method.group_size}; rows and columns that share a scale are a "
            f"block: block={method.group_size}"
        )
    if method.group_size is not None and method.group_size < 1:
        raise ValueError(
            f"{type(method).__name__}: group_size={method.group_size} must be positive, or None for no groups"
        )


def validate_bits(method: Any, least: int = 1, most: int = 8) -> None:
    """Raise unless ``method.bits`` is an integer in range."""
    bits = method.bits
    if not isinstance(bits, (int, np.integer)) or isinstance(bits, bool) or not least <= bits <= most:
        more = most < 16 and isinstance(bits, int) and most < bits <= 16
        advice = f"codes of {bits} bits are jcompress.quantize.Int({bits})" if more else "it sets the stored width"
        raise ValueError(f"{type(method).__name__}: bits={bits!r} is not an integer from {least} to {most}; {advice}")


def check(method: Any, path: str, shape: tuple[int, ...], dtype: Any = None) -> None:
    """Raise if groups or the channel axis do not fit the shape: the ``check`` of every method on a grid."""
    size, axis = method.group_size, method.axis
    if (block := getattr(method, "block", None)) is not None:
        if len(shape) < 2:
            raise ValueError(f"{path}: block {block} needs two axes, found shape {shape}; keep it dense")
    elif size is not None:
        if len(shape) < 2:
            raise ValueError(
                f"{path}: group_size {size} needs axis -2, found shape {shape}; "
                "quantize it without groups, or keep it dense"
            )
        if shape[-2] % size and not method.pad:
            divisor = max(d for d in range(1, size + 1) if shape[-2] % d == 0) if shape[-2] else 1
            raise ValueError(
                f"{path}: group_size {size} does not divide axis -2 of length {shape[-2]}, the inputs; use {divisor}, "
                "or pad=True, or if the inputs lie along another axis say so: jc.plan(..., layout=)"
            )
    elif axis is not None and len(shape) > 1:
        for own in axis if isinstance(axis, tuple) else (axis,):
            if not -len(shape) <= own < len(shape):
                raise ValueError(
                    f"{path}: axis {own} is out of range for shape {shape}; use an axis from {-len(shape)} to "
                    f"{len(shape) - 1}"
                )


def positive(scale: jax.Array) -> jax.Array:
    """Scales fit to divide by: an array of zeros takes 1."""
    return jnp.where(scale >= jnp.finfo(scale.dtype).tiny, scale, 1.0)


def power_of_two(x: jax.Array, *, up: bool) -> jax.Array:
    """The power of two next to positive normal float32 values, read from the bits of their exponents."""
    exponent = jnp.uint32(0x7F800000)
    below = jax.lax.bitcast_convert_type(jax.lax.bitcast_convert_type(x, jnp.uint32) & exponent, jnp.float32)
    return jnp.where(up & (x > below) & (below < 2.0**127), 2 * below, below)
