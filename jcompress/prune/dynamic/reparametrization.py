"""Soft-threshold reparametrization."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp

from jcompress.core import Context, Method
from jcompress.formats import SoftThreshold


@dataclasses.dataclass(frozen=True)
class STR(Method):
    """Soft-threshold reparametrization: every leaf learns its own threshold (Kusupati et al. 2020, arXiv:2002.03231).

    The network sees ``sign(w) * max(|w| - sigmoid(s), 0)``; ``w`` and ``s`` both train, under the same weight decay,
    which is what sets the sparsity: there is no hyperparameter for it.

    Attributes:
      initial: the first ``s``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.dynamic.STR(initial=0.0)(jnp.array([2.0, -0.25]))
      >>> node.materialize().tolist(), jc.finalize(node)
      ([1.5, 0.0], Masked(values=float32[2], mask=bool[2]))
    """

    initial: float = -10.0

    whole: ClassVar[bool] = True

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> SoftThreshold:
        """The node for one array."""
        return SoftThreshold(jnp.copy(w), jnp.full((), self.initial, jnp.float32))
