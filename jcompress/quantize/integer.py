"""Uniform integer quantization."""

from __future__ import annotations

import dataclasses
from functools import partial
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context
from jcompress.formats import Quantized
from jcompress.formats.quantized import nearest, pool, spread


class _Grid(NamedTuple):
    """Scales and zero points in the shape of the scales; ``zero`` is None on a symmetric grid."""

    scale: jax.Array
    zero: jax.Array | None


class _Range(NamedTuple):
    """Ends of a range and the squared error they lead to, in the shape of the scales."""

    error: jax.Array
    low: jax.Array | None
    high: jax.Array


@dataclasses.dataclass(frozen=True)
class Int:
    """Round to the nearest integer of a uniform grid (Jacob et al. 2018, arXiv:1712.05877).

    Symmetric: ``q = clip(round(w / s), -m, m)`` with ``m = 2**(bits - 1) - 1`` and ``s = r / m`` for the largest
    magnitude ``r``. Affine: ``q = clip(round(w / s) + z, 0, 2**bits - 1)`` over ``[min(w, 0), max(w, 0)]``, the zero
    point ``z`` an integer, so that 0.0 is exact. One symmetric bit keeps the sign, with the mean magnitude as its
    scale, which is optimal (Rastegari et al. 2016, arXiv:1603.05279).

    Attributes:
      bits: bits a code, 1 to 8.
      group_size: rows of the contraction axis (-2) that share a scale; None for no groups.
      symmetric: whether the grid is symmetric about zero.
      axis: without groups, the axis that has a scale for each index, the output channels by default; None for one
        scale for the whole array. Vectors take one scale.
      clip: ``"minmax"``, the full range, or ``"mse"``, the fraction of it that gives the least squared error.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for bits outside 1 to 8, or a group size that does not divide.

    An array of zeros gives zeros; NaN and infinity are refused by ``compress`` and undefined under ``jit``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.quantize.Int(bits=4)(jnp.array([[0.7, -7.0], [-0.33, 2.4]]))
      >>> node.codes.tolist()
      [[7, -7], [-3, 2]]
    """

    bits: int = 8
    group_size: int | None = None
    symmetric: bool = True
    axis: int | None = -1
    clip: Literal["minmax", "mse"] = "minmax"
    pad: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.bits, (int, np.integer)) or isinstance(self.bits, bool) or not 1 <= self.bits <= 8:
            raise ValueError(f"Int: bits={self.bits!r} is not an integer from 1 to 8; it sets the stored width")
        if self.group_size is not None and self.group_size < 1:
            raise ValueError(f"Int: group_size={self.group_size} must be positive, or None for no groups")
        if self.clip not in ("minmax", "mse"):
            raise ValueError(f"Int: clip={self.clip!r} is unknown; use 'minmax' or 'mse'")

    __repr__ = core.method_repr

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if groups or the channel axis do not fit the shape."""
        if self.group_size is not None:
            if len(shape) < 2:
                raise ValueError(
                    f"{path}: group_size {self.group_size} needs axis -2, found shape {shape}; "
                    "quantize it without groups, or keep it dense"
                )
            if shape[-2] % self.group_size and not self.pad:
                divisor = max(d for d in range(1, self.group_size + 1) if shape[-2] % d == 0) if shape[-2] else 1
                raise ValueError(
                    f"{path}: group_size {self.group_size} does not divide axis -2 of length {shape[-2]}; "
                    f"use {divisor}, or pad=True"
                )
        elif self.axis is not None and len(shape) > 1 and not -len(shape) <= self.axis < len(shape):
            raise ValueError(
                f"{path}: axis {self.axis} is out of range for shape {shape}; "
                f"use an axis from {-len(shape)} to {len(shape) - 1}"
            )

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        axes = self._shared_axes(w.ndim)
        x = w.astype(jnp.float32)
        x = x if context.where is None else jnp.where(context.where, x, 0.0)
        grid = self._grid(x, axes, context.where)
        codes = self._codes(x, grid)
        return Quantized(
            codes=codes,
            scale=grid.scale,
            zero=None if grid.zero is None else grid.zero.astype(jnp.uint8),
            bits=int(self.bits), axes=axes, group_size=self.group_size, dtype=np.dtype(w.dtype),
        )  # fmt: skip

    def _shared_axes(self, ndim: int) -> tuple[int, ...]:
        """Negative axes over which one scale is shared; a group shares along axis -2."""
        if self.group_size is not None:
            return (-2,)
        own = None if self.axis is None or ndim < 2 else (self.axis if self.axis < 0 else self.axis - ndim)
        return tuple(a for a in range(-ndim, 0) if a != own)

    def _grid(self, x: jax.Array, axes: tuple[int, ...], where: jax.Array | None) -> _Grid:
        if self.symmetric and self.bits == 1:
            total = pool(jnp.abs(x), axes, self.group_size, jnp.add, 0.0)
            counted = jnp.ones_like(x) if where is None else jnp.broadcast_to(where, x.shape).astype(x.dtype)
            return _Grid(total / jnp.maximum(pool(counted, axes, self.group_size, jnp.add, 0.0), 1.0), None)
        high = pool(jnp.abs(x) if self.symmetric else x, axes, self.group_size, jnp.maximum, 0.0)
        low = None if self.symmetric else pool(x, axes, self.group_size, jnp.minimum, 0.0)
        if self.clip == "mse":
            low, high = self._best_range(x, low, high, axes, where)
        return self._grid_over(low, high)

    def _grid_over(self, low: jax.Array | None, high: jax.Array) -> _Grid:
        """The grid from ``low`` to ``high``, or, where ``low`` is None, from ``-high`` to ``high``."""
        if low is None:
            return _Grid(_positive(_over(high, 2 ** (self.bits - 1) - 1)), None)
        top = 2**self.bits - 1
        scale = _positive(_over(high - low, top))
        return _Grid(scale, jnp.clip(jnp.round(-low / scale), 0, top))

    def _codes(self, x: jax.Array, grid: _Grid) -> jax.Array:
        zero = None if grid.zero is None else spread(grid.zero, x, self.group_size)
        dtype = jnp.int8 if self.symmetric else jnp.uint8
        return nearest(x / spread(grid.scale, x, self.group_size), zero, int(self.bits), None, dtype)

    @partial(jax.jit, static_argnames=("self", "axes"))
    def _best_range(
        self, x: jax.Array, low: jax.Array | None, high: jax.Array, axes: tuple[int, ...], where: jax.Array | None
    ) -> tuple[jax.Array | None, jax.Array]:
        """The part of the range with the least squared error, for each scale: a coarse search, then a fine one.

        Candidates are tried one after another, so memory does not grow with their number.
        """

        def error(low: jax.Array | None, high: jax.Array) -> jax.Array:
            grid = self._grid_over(low, high)
            levels = self._codes(x, grid).astype(jnp.float32)
            levels = levels if grid.zero is None else levels - spread(grid.zero, x, self.group_size)
            difference = x - spread(grid.scale, x, self.group_size) * levels
            difference = difference if where is None else jnp.where(where, difference, 0.0)
            return pool(difference**2, axes, self.group_size, jnp.add, 0.0)

        def search(best: _Range, parts: jax.Array) -> _Range:
            centre = best

            def one(i: jax.Array, best: _Range) -> _Range:
                end = jnp.minimum(parts[i] * centre.high, high)
                start = None if low is None or centre.low is None else jnp.maximum(parts[i] * centre.low, low)
                found = _Range(error(start, end), start, end)
                return jax.tree.map(lambda a, b: jnp.where(found.error < best.error, a, b), found, best)

            return jax.lax.fori_loop(0, parts.size, one, best)

        coarse = search(_Range(error(low, high), low, high), jnp.linspace(0.04, 0.98, 48))
        best = search(coarse, jnp.linspace(0.98, 1.02, 16))
        return best.low, best.high


def _over(x: jax.Array, n: int) -> jax.Array:
    """``x / n`` as a product: XLA makes it one in some programs only, and those would differ in the last bit."""
    return x * (1.0 / n)


def _positive(scale: jax.Array) -> jax.Array:
    """Scales fit to divide by: an array of zeros takes 1."""
    return jnp.where(scale >= jnp.finfo(scale.dtype).tiny, scale, 1.0)
