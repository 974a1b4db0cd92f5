"""From scores to masks: how many to keep, in which pattern, decided for each leaf or for all together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context
from jcompress.formats import Masked
from jcompress.prune.patterns import NM
from jcompress.prune.threshold import keep_largest

Scope = Literal["leaf", "global"]


class Selection(Protocol):
    """What every method that chooses a mask by scores has: these three hyperparameters."""

    @property
    def sparsity(self) -> Any:
        """The fraction of zeros."""

    @property
    def scope(self) -> Scope:
        """For each leaf, or for all together."""

    @property
    def pattern(self) -> NM | None:
        """What the mask must follow."""


def validate(method: Selection) -> None:
    """Raise for hyperparameters that contradict themselves. To be called when a method is made."""
    name = type(method).__name__
    if method.scope not in ("leaf", "global"):
        raise ValueError(f"{name}: scope={method.scope!r} is unknown; use 'leaf' or 'global'")
    if method.sparsity is None and method.pattern is None:
        raise ValueError(f"{name} needs a sparsity, the fraction of zeros, or a pattern that fixes it")
    if method.sparsity is None or callable(method.sparsity) or not core.is_concrete(method.sparsity):
        return
    check_sparsity(name, method.sparsity)
    if method.pattern is not None and abs(float(method.sparsity) - method.pattern.sparsity) > 1e-6:
        raise ValueError(
            f"{name}: sparsity={method.sparsity} disagrees with {method.pattern}, which fixes it at "
            f"{method.pattern.sparsity:g}; leave sparsity out"
        )


def check_sparsity(name: str, sparsity: Any) -> None:
    """Raise for a sparsity outside [0, 1]."""
    if not np.all((np.asarray(sparsity) >= 0) & (np.asarray(sparsity) <= 1)):
        raise ValueError(f"{name}: sparsity={sparsity} is outside [0, 1]; it is the fraction of zeros")


def check(method: Selection, path: str, shape: tuple[int, ...]) -> None:
    """Raise if an array of this shape cannot take the method's pattern."""
    if method.pattern is not None:
        method.pattern.check(path, shape)


def kept(size: int, sparsity: Any) -> int | jax.Array:
    """How many of ``size`` stay: ``size - round(sparsity * size)``, exact for a sparsity known now.

    A traced sparsity is rounded in float32, so past 2**24 parameters its count may be off by ``size * 2**-24``.
    """
    if core.is_concrete(sparsity):
        return size - round(float(sparsity) * size)
    return jnp.uint32(size) - jnp.round(sparsity.astype(jnp.float32) * size).astype(jnp.uint32)


def fit(
    method: Selection,
    score: Callable[[jax.Array, Context], jax.Array],
    arrays: Sequence[jax.Array],
    contexts: Sequence[Context],
) -> list[Masked]:
    """Mask each array to its entries of the highest scores.

    Entries that a mask around the array hides go first and count as zeros.
    """
    scores = [
        score(w, c) if c.where is None else jnp.where(c.where, score(w, c), -jnp.inf)
        for w, c in zip(arrays, contexts, strict=True)
    ]
    masks = _masks(method, scores, contexts)
    return [Masked(jnp.where(mask, w, jnp.zeros_like(w)), mask) for w, mask in zip(arrays, masks, strict=True)]


def _masks(method: Selection, scores: list[jax.Array], contexts: Sequence[Context]) -> list[jax.Array]:
    if method.pattern is not None:
        for x, context in zip(scores, contexts, strict=True):
            method.pattern.check(context.path, x.shape)
        return [method.pattern.mask(x) for x in scores]
    sparsity = core.value_at(method.sparsity, contexts[0].step)
    if core.is_concrete(sparsity):
        check_sparsity(f"{contexts[0].path}: {type(method).__name__}", sparsity)
    if method.scope == "global":
        return keep_largest(scores, kept(sum(x.size for x in scores), sparsity))
    return [keep_largest([x], kept(x.size, sparsity))[0] for x in scores]
