"""Masks drawn at random in proportion to a score."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jcompress.core import Context
from jcompress.formats import Masked
from jcompress.numeric import scaling
from jcompress.prune import scores
from jcompress.prune.masks import selection
from jcompress.prune.masks.scored import ByScore


def sampled(score: scores.Score) -> scores.Score:
    """The score ``s / e`` with ``e`` exponential: its largest are a sample without replacement, in proportion to ``s``.

    The weight drawn first is each with probability ``s / sum s``, the next in proportion among the rest, and so on
    (Efraimidis & Spirakis 2006; the same order as of ``log s`` plus Gumbel noise). What ``score`` reads, and a key.

    Args:
      score: one that is not negative.

    Returns:
      A score.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> score = jc.prune.sampled(jc.prune.scores.magnitude)
      >>> score(jnp.array([0.0, 1.0]), jc.Context(key=jax.random.key(0))).argmax().item()
      1
    """

    @scores.reads(*scores.needs(score), "key")
    def drawn(w: jax.Array, context: Context) -> jax.Array:
        noise = jnp.zeros_like(w, jnp.float32) + jax.random.exponential(context.key, w.shape, jnp.float32)
        return score(w, context).astype(jnp.float32) / jnp.maximum(noise, jnp.finfo(jnp.float32).tiny)

    return drawn


@dataclasses.dataclass(frozen=True)
class Sampled(ByScore):
    """Keep weights drawn without replacement in proportion to their score: pruning as sketching.

    A sample keeps small weights now and then that a threshold never would, and with ``reweight`` the pruned matrix is
    an unbiased sketch of the dense one, ``E[W'] x = W x``: each kept weight is divided by the probability that it was
    kept given the others, ``1 - exp(-s / t)``, where ``t`` is the largest ``s / e`` that was cut. The number kept is
    exact. Bar & Giryes 2023, arXiv:2305.17559, prune at initialization so; estimators of this kind: Cohen & Kaplan
    2007.

    Attributes:
      sparsity: the fraction of zeros, as for :class:`Magnitude`.
      scope: ``"leaf"``, ``"output"`` or ``"global"``.
      pattern: :class:`NM`, :class:`Block` or :class:`Shared`, or None for unstructured; not with ``reweight``.
      score: of weights, not negative: a function as in :mod:`jcompress.prune.scores`.
      reweight: divide by the probabilities. With a scope of ``"leaf"`` or ``"global"``.

    Raises:
      ValueError: for a sparsity outside [0, 1], ``reweight`` with a pattern or by outputs, or without a key.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w, key = {"w": jnp.ones((8, 8))}, jax.random.key(0)
      >>> small = jc.compress(w, jc.plan(w, [("w", jc.prune.Sampled(sparsity=0.75))]), key=key)
      >>> int(small["w"].mask.sum())
      16
    """

    reweight: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.reweight and (self.pattern is not None or self.scope == "output"):
            found = f"pattern={self.pattern}" if self.pattern is not None else "scope='output'"
            raise ValueError(f"Sampled: reweight=True needs one draw of single weights, found {found}; leave one out")

    @property
    def needs(self) -> tuple[str, ...]:
        """What the score reads, and a key."""
        return scores.needs(sampled(self.score))

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Masked]:
        """One node for each array of the rule."""
        seen = scaling.comparable(arrays, self.joint)
        keys = [scores.evaluate(sampled(self.score), w, c) for w, c in zip(seen, contexts, strict=True)]
        keys = [k if c.where is None else jnp.where(c.where, k, 0) for k, c in zip(keys, contexts, strict=True)]
        masks = selection.masks_of(self, keys, contexts)
        values = list(arrays)
        if self.reweight:
            cut = [jnp.max(jnp.where(mask, 0, k), initial=0) for mask, k in zip(masks, keys, strict=True)]
            cut = [jnp.max(jnp.stack(cut))] * len(cut) if self.joint else cut
            chances = [_inverse_probability(self.score(w, c), t) for w, c, t in zip(seen, contexts, cut, strict=True)]
            values = [scaling.inside((w * chance).astype(w.dtype)) for w, chance in zip(arrays, chances, strict=True)]
        return [Masked(jnp.where(mask, w, jnp.zeros_like(w)), mask) for w, mask in zip(values, masks, strict=True)]


def _inverse_probability(score: jax.Array, cut: jax.Array) -> jax.Array:
    """One over the probability that ``score / e`` exceeds ``cut``."""
    score = score.astype(jnp.float32)
    chance = -jnp.expm1(-score / jnp.where(cut > 0, cut, 1))
    return jnp.where((cut > 0) & (chance > 0), 1 / jnp.where(chance > 0, chance, 1), 1)
