"""Patterns that a mask must follow."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

from jcompress.prune.threshold import ordered_bits


@dataclasses.dataclass(frozen=True)
class NM:
    """Keep the ``n`` largest of every ``m`` along the contraction axis (-2 of an (in, out) kernel).

    The pattern fixes the sparsity at ``1 - n / m``. Hardware knows 2:4 (Mishra et al. 2021, arXiv:2104.08378); any
    ``0 <= n <= m`` works here. Ties go to the lower index.

    Attributes:
      n: how many are kept.
      m: of how many.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.prune.NM(2, 4).mask(jnp.array([[1.0], [4.0], [3.0], [2.0]])).ravel().tolist()
      [False, True, True, False]
    """

    n: int
    m: int

    def __post_init__(self) -> None:
        if not 0 <= self.n <= self.m or self.m < 1:
            raise ValueError(f"NM: found n={self.n}, m={self.m}; expected 0 <= n <= m and m >= 1")

    @property
    def sparsity(self) -> float:
        """The fraction of zeros that the pattern fixes."""
        return 1 - self.n / self.m

    def check(self, path: str, shape: tuple[int, ...]) -> None:
        """Raise if an array of this shape cannot follow the pattern."""
        if len(shape) < 2 or shape[-2] % self.m:
            found = f"axis -2 of length {shape[-2]}" if len(shape) > 1 else f"shape {shape} without axis -2"
            raise ValueError(
                f"{path}: {self} needs axis -2 in groups of {self.m}, found {found}; choose another m or keep it dense"
            )

    def mask(self, scores: jax.Array) -> jax.Array:
        """Mask of the shape of ``scores`` (..., in, out). Ranks come from pairwise comparisons, not from a sort."""
        *lead, rows, columns = scores.shape
        groups = ordered_bits(scores).reshape(*lead, rows // self.m, self.m, columns)
        place = lax.broadcasted_iota(jnp.int32, groups.shape, groups.ndim - 2)
        rank = jnp.zeros(groups.shape, jnp.int8 if self.m < 128 else jnp.int32)
        for i in range(self.m):
            other = groups[..., i : i + 1, :]
            ahead = (other > groups) | ((other == groups) & (place > i))
            rank = rank + ahead.astype(rank.dtype)
        return (rank < self.n).reshape(scores.shape)
