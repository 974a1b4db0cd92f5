"""Floats of 8 and 4 bits under a float scale."""

from __future__ import annotations

import dataclasses
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import Context, Method
from jcompress.formats import Quantized
from jcompress.quantize import grids, ranges

DTYPES = {"e4m3": jnp.float8_e4m3fn, "e5m2": jnp.float8_e5m2, "e2m1": jnp.float4_e2m1fn}
"""By bits of exponent and mantissa; the first and the last have no infinities."""


@dataclasses.dataclass(frozen=True)
class Float8(Method):
    """Round to the nearest 8-bit float under a scale (Micikevicius et al. 2022, arXiv:2209.05433).

    ``w ~ s q`` with ``s = r / m``, ``m`` the largest finite value: 448 for e4m3, 57344 for e5m2. Ties go to even. A
    scale is a trainable float32; for powers of two see :class:`Microscaling`, for no scale ``Float("float8_e4m3fn")``.

    Attributes:
      dtype: ``"e4m3"``, more precise, or ``"e5m2"``, of wider range.
      group_size: rows of the contraction axis (-2) that share a scale; None for no groups.
      axis: without groups, the axis that has a scale for each index; None for one scale for the whole array.
      clip: ``"minmax"``, ``"mse"`` or a method of :mod:`jcompress.quantize.ranges`.
      pad: whether a last group may be smaller than the others.
      block: instead of groups, rows and columns that share a scale: (128, 128) as in DeepSeek-V3 (DeepSeek-AI 2024,
        arXiv:2412.19437). Blocks at the edges may be smaller.

    Raises:
      ValueError: for another dtype, or a group size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.quantize.Float8("e4m3")(jnp.array([448.0, 100.0, 0.01]))
      >>> node.materialize().tolist(), node
      ([448.0, 96.0, 0.009765625], Quantized(codes=float8_e4m3fn[3], scale=float32[1], bits=8, axes=(-1)))
      >>> jc.quantize.Float8(block=(128, 128))(jnp.ones((200, 256))).scale.shape
      (2, 2)
    """

    dtype: Literal["e4m3", "e5m2"] = "e4m3"
    group_size: int | None = None
    axis: int | None = -1
    clip: ranges.Clip = "minmax"
    pad: bool = False
    block: tuple[int, int] | None = None

    check = grids.check

    def __post_init__(self) -> None:
        if self.dtype not in ("e4m3", "e5m2"):
            raise ValueError(f"Float8: dtype={self.dtype!r} is unknown; use 'e4m3' or 'e5m2'")
        ranges.validate(self, grid(self.dtype))

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        return grids.fit(self, w, context, grid(self.dtype), ranges.of(self.clip))


@dataclasses.dataclass(frozen=True)
class Float4(Method):
    """Round to the nearest 4-bit float, e2m1, under a scale: 0, 0.5, 1, 1.5, 2, 3, 4 and 6 with either sign.

    ``w ~ s q`` with ``s = r / 6``, ties to even (the FP4 of the OCP microscaling formats, v1.0, 2023).

    Attributes:
      group_size: rows of the contraction axis (-2) that share a scale; None for no groups.
      axis: without groups, the axis that has a scale for each index; None for one scale for the whole array.
      clip: ``"minmax"``, ``"mse"`` or a method of :mod:`jcompress.quantize.ranges`.
      pad: whether a last group may be smaller than the others.

    Raises:
      ValueError: for a group size that does not divide.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.Float4()(jnp.array([6.0, -2.6, 0.3])).materialize().tolist()
      [6.0, -3.0, 0.5]
    """

    group_size: int | None = None
    axis: int | None = -1
    clip: ranges.Clip = "minmax"
    pad: bool = False

    check = grids.check

    def __post_init__(self) -> None:
        ranges.validate(self, grid("e2m1"))

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Quantized:
        """The node for one array."""
        return grids.fit(self, w, context, grid("e2m1"), ranges.of(self.clip))


def grid(dtype: str) -> grids.Grid:
    """The levels of a float dtype, its largest finite one at the end of the range."""
    info = jnp.finfo(DTYPES[dtype])
    return grids.Grid(int(info.bits), np.dtype(DTYPES[dtype]), float(info.max))
