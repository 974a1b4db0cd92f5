"""Convolutions as one-dimensional ones."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.factorize.subspaces import check_filled, check_rank, is_share, largest
from jcompress.formats.lowrank import truncated_svd
from jcompress.formats.network import TensorNetwork


@dataclasses.dataclass(frozen=True)
class Separable(Method):
    """A ``d x 1`` convolution to ``rank`` channels, then a ``1 x d`` one, in closed form.

    The kernel as a matrix of (height, input) by (width, output) has its best approximation of a rank by a singular
    value decomposition (Jaderberg et al. 2014, arXiv:1405.3866, scheme 2; closed by Tai et al. 2016, arXiv:1511.06067).
    Gathers a sharded kernel, once.

    Attributes:
      rank: the channels between, or the share of the numbers that is kept, in (0, 1).

    Raises:
      ValueError: for an array that is no two-dimensional convolution, or a rank above the limit.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = jax.random.normal(jax.random.key(0), (3, 3, 8, 6))
      >>> [x.shape for x in jc.factorize.Separable(rank=5)(w).factors]
      [(3, 8, 5), (3, 5, 6)]
    """

    rank: int | float

    def __post_init__(self) -> None:
        check_rank("Separable", self.rank)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array is no kernel of a two-dimensional convolution, or the rank above its limit."""
        self._rank(path, shape)

    def _rank(self, path: str, shape: tuple[int, ...]) -> int:
        if len(shape) != 4:
            raise ValueError(
                f"{path}: Separable needs the kernel of a two-dimensional convolution, found shape {shape}; use SVD"
            )
        check_filled("Separable", path, shape)
        h, w, i, o = shape
        most = min(h * i, w * o)
        if is_share(self.rank):
            return largest(lambda r: r * (h * i + w * o), max(most, 1), self.rank * h * w * i * o)
        if self.rank > most:
            raise ValueError(f"{path}: Separable found rank={self.rank}, expected at most {most} for shape {shape}")
        return int(self.rank)

    @core.compiled
    def __call__(self, w: jax.Array, context: Context = Context(), /) -> TensorNetwork:
        """The node for one array."""
        rank = self._rank(context.path, w.shape)
        height, width, i, o = w.shape
        u, v = truncated_svd(w.transpose(0, 2, 1, 3).reshape(height * i, width * o), rank)
        right = jnp.moveaxis(v.reshape(rank, width, o), 0, 1)
        return TensorNetwork((u.reshape(height, i, rank), right), "hir,wro->hwio", (1,) * 4)
