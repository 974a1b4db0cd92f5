"""Layers as sums of a few templates."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context, Method
from jcompress.formats import Mixed
from jcompress.formats.summed_templates import spanned


@dataclasses.dataclass(frozen=True)
class Templates(Method):
    """All leaves of a rule are sums of ``count`` templates, ``W_l = sum_k a_lk T_k`` (Savarese & Maire 2019).

    The templates are stored once, by the first leaf's node, and the others refer to it: their gradient is the sum over
    all layers. They are the best in least squares, from the singular vectors of the leaves, so with as many templates
    as leaves nothing changes; a layer costs ``count`` numbers of its own. Trained from there, or from the start, layers
    of like weights become loops over one layer (arXiv:1902.09701). Kernels of a static hypernetwork (Ha et al. 2016,
    arXiv:1609.09106), which are affine in an embedding of their layer, are such sums too. Layers that are all one
    template are those of ``jc.tie``.

    Attributes:
      count: how many templates, at most as many as leaves.

    Raises:
      ValueError: for leaves of different shapes or dtypes, or more templates than leaves.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {str(i): jax.random.normal(jax.random.key(i), (8, 8)) for i in range(4)}
      >>> small = jc.compress(params, jc.plan(params, [(".*", jc.share.Templates(count=2))]))
      >>> jc.nbits(small) // 32 == 2 * 64 + 4 * 2
      True
    """

    count: int = 4

    joint: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.count < 1:
            raise ValueError(f"Templates: count={self.count} must be positive")

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Mixed]:
        """One node for each array of the rule."""
        first = arrays[0]
        for w, context in zip(arrays, contexts, strict=True):
            if w.shape != first.shape or w.dtype != first.dtype:
                raise ValueError(
                    f"{context.path}: found {w.dtype}{list(w.shape)}, and {contexts[0].path} is {first.dtype}"
                    f"{list(first.shape)}; leaves that share templates are of one shape: give them rules of their own"
                )
        if self.count > len(arrays):
            raise ValueError(
                f"{contexts[0].path}: Templates found count={self.count} for {len(arrays)} leaves, expected at most as "
                f"many; use count={len(arrays)}, which is exact, or less"
            )
        shown = [w if c.where is None else jnp.where(c.where, w, 0) for w, c in zip(arrays, contexts, strict=True)]
        weights, templates = spanned(shown, self.count, first.ndim)
        templates = templates.astype(first.dtype)
        shared = core.Common(templates, ("templates",)) if len(arrays) > 1 else templates
        return [Mixed(a, shared, count=self.count, ndim=first.ndim) for a in weights]
