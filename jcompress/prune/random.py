"""Pruning at random, the control of every comparison."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context
from jcompress.formats import Masked
from jcompress.prune import select
from jcompress.prune.patterns import NM


@dataclasses.dataclass(frozen=True)
class Random:
    """Keep weights chosen uniformly at random: a control for methods that claim to choose well.

    Scores are uniform and depend on the key and the path only, so under a growing sparsity the masks are nested.

    Attributes:
      sparsity: the fraction of zeros, in [0, 1]: a number, a traced scalar or an optax schedule. None if a pattern
        fixes it.
      scope: ``"leaf"`` or ``"global"``, as for :class:`Magnitude`.
      pattern: :class:`NM`, or None for unstructured.

    Raises:
      ValueError: for a sparsity outside [0, 1], or if no key is given.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jnp.ones((8, 8))}
      >>> small = jc.compress(w, jc.plan(w, [("w", jc.prune.Random(sparsity=0.75))]), key=jax.random.key(0))
      >>> int(small["w"].mask.sum())
      16
    """

    needs: ClassVar[tuple[str, ...]] = ("key",)
    sparsity: Any = None
    scope: select.Scope = "leaf"
    pattern: NM | None = None

    __repr__ = core.method_repr

    def __post_init__(self) -> None:
        select.validate(self)

    @property
    def joint(self) -> bool:
        """Whether one threshold serves all leaves of the rule."""
        return self.scope == "global" and self.pattern is None

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the pattern does not fit the shape."""
        select.check(self, path, shape)

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Masked]:
        """One node for each array of the rule."""
        return select.fit(self, _uniform, arrays, contexts)

    def __call__(self, w: jax.Array, context: Context, /) -> Masked:
        """The node for one array; the context must hold a key."""
        return self.fit([w], [context])[0]


def _uniform(w: jax.Array, context: Context) -> jax.Array:
    """Uniform scores, sharded as ``w`` is."""
    return jnp.zeros_like(w, jnp.float32) + jax.random.uniform(context.key, w.shape)
