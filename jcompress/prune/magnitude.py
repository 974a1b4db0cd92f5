"""Pruning by magnitude."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Context
from jcompress.formats import Masked
from jcompress.prune import select
from jcompress.prune.patterns import NM


@dataclasses.dataclass(frozen=True)
class Magnitude:
    """Keep the weights of largest magnitude (Han et al. 2015, arXiv:1506.02626).

    The score of a weight is ``|w|``. The number of weights kept is exact, ``n - round(sparsity * n)``, and ties go
    to the lower index. With a cubic ramp, ``optax.polynomial_schedule(0.0, 0.9, power=3, transition_steps=n)``,
    this is gradual pruning (Zhu & Gupta 2017, arXiv:1710.01878).

    Attributes:
      sparsity: the fraction of zeros, in [0, 1]: a number, a traced scalar or an optax schedule. None if a pattern
        fixes it.
      scope: ``"leaf"``, a threshold for each leaf, or ``"global"``, one for all leaves of the rule.
      pattern: :class:`NM`, or None for unstructured.

    Raises:
      ValueError: for a sparsity outside [0, 1] or one that disagrees with the pattern.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.prune.Magnitude(sparsity=0.5)(jnp.array([1.0, -4.0, 2.0, -3.0]))
      >>> node.materialize().tolist()
      [0.0, -4.0, 0.0, -3.0]
    """

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
        return select.fit(self, lambda w, _: jnp.abs(w), arrays, contexts)

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Masked:
        """The node for one array."""
        return self.fit([w], [context])[0]
