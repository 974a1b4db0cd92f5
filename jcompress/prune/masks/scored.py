"""Masks by any score, and what the methods share that keep the weights of the highest score."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress.core import Context, Method
from jcompress.formats import Masked
from jcompress.prune import scores
from jcompress.prune.masks import selection
from jcompress.prune.masks.patterns import Pattern


@dataclasses.dataclass(frozen=True)
class ByScore(Method):
    """Keep the weights of the highest score, whatever the score is.

    The number of weights kept is exact, ``n - round(sparsity * n)``, and ties go to the lower index.

    Attributes:
      sparsity: the fraction of zeros, in [0, 1]: a number, a traced scalar or an optax schedule. None if a pattern
        fixes it.
      scope: ``"leaf"``, a threshold for each leaf; ``"output"``, one for the weights of each output; or ``"global"``,
        one for all leaves of the rule. Outputs are the axes that are not contracted: the last one, unless the
        statistics know better.
      pattern: :class:`NM`, :class:`Block` or :class:`Shared`, or None for unstructured.
      score: a function of an array and its context that gives an array of the same shape, such as those of
        :mod:`jcompress.prune.scores`.

    Raises:
      ValueError: for a sparsity outside [0, 1] or one that disagrees with the pattern, or if what the score reads
        is missing.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> method = jc.prune.ByScore(sparsity=0.5, score=lambda w, context: -w)
      >>> method(jnp.array([1.0, -4.0, 2.0, -3.0])).materialize().tolist()
      [0.0, -4.0, 0.0, -3.0]
    """

    sparsity: Any = None
    scope: selection.Scope = "leaf"
    pattern: Pattern | None = None
    score: scores.Score = dataclasses.field(default=scores.magnitude, repr=False)

    whole: ClassVar[bool] = True

    def __post_init__(self) -> None:
        selection.validate(self)

    @property
    def needs(self) -> tuple[str, ...]:
        """What the score reads from the context."""
        return scores.needs(self.score)

    @property
    def takes_complex(self) -> bool:  # type: ignore[override]  # it depends on the score
        """Whether the score knows what a complex weight is worth."""
        return self.score in (scores.magnitude, scores.random) or getattr(self.score, "takes_complex", False)

    @property
    def joint(self) -> bool:
        """Whether one threshold, or one mask, serves all leaves of the rule."""
        return selection.is_joint(self)

    def unit(self, shape: tuple[int, ...]) -> int:
        """How many weights the sparsity of a leaf of this shape can change by, at least."""
        return selection.unit(self, shape)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the pattern does not fit the shape."""
        selection.check(self, path, shape)

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Masked]:
        """One node for each array of the rule."""
        by = jnp.abs if self.score is scores.magnitude else None
        return selection.fit(self, partial(scores.evaluate, self.score), arrays, contexts, by)


def fixed(score: scores.Score) -> Any:
    """The field of a subclass whose score is not for the user to choose."""
    # A factory, since a function that stands in the class would be bound as a method of it.
    return dataclasses.field(default_factory=lambda: score, init=False, repr=False)
