"""The sum of singular values: a penalty whose minimum has low rank."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.numeric import scaling, shrinkage


@dataclasses.dataclass(frozen=True)
class NuclearNorm:
    """``strength * sum_i s_i`` over the singular values, the convex envelope of the rank (Fazel 2002).

    Its proximal operator is soft thresholding of the singular values (Cai, Candes & Shen 2010, arXiv:0810.3286), so
    after each step the matrix has its least penalized rank; :class:`jcompress.factorize.SVD` by ``tolerance`` then
    writes it in factors. A convolution kernel counts as the (window and input) x output matrix. The decomposition
    gathers a sharded matrix.

    Attributes:
      strength: of the penalty, not negative.
      ndim: axes of the array of one layer; an array has more in front where layers are stacked. By default all of them.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import penalties
      >>> penalties.NuclearNorm(2.0).prox(jnp.diag(jnp.array([3.0, 0.5])), 0.5).round(3).tolist()
      [[2.0, 0.0], [0.0, 0.0]]
    """

    strength: Any
    ndim: int | None = None

    @property
    def axes(self) -> tuple[int, ...]:
        """The axes that a matrix needs."""
        return (-2, -1)

    def _matrix(self, x: jax.Array) -> jax.Array:
        lead = x.shape[: x.ndim - (self.ndim or x.ndim)]
        return x.reshape(*lead, -1, x.shape[-1])

    def __call__(self, x: jax.Array, /) -> jax.Array:
        """The value."""
        return self.strength * jnp.linalg.svd(self._matrix(x.astype(jnp.float32)), compute_uv=False).sum()

    def prox(self, x: jax.Array, step: Any, /) -> jax.Array:
        """Singular values move by ``step * strength`` towards zero."""
        unit = scaling.unit([x])
        u, s, v = jnp.linalg.svd(unit.divide(self._matrix(x)), full_matrices=False)
        s = shrinkage.soft_threshold(unit.multiply(s), step * self.strength)
        found = jnp.matmul(u * s[..., None, :], v, precision=jax.lax.Precision.HIGHEST)
        return found.reshape(x.shape).astype(x.dtype)
