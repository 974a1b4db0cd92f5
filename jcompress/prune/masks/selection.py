"""From scores to masks: how many to keep, in which pattern, decided for each leaf or for all together."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Context
from jcompress.formats import Masked
from jcompress.numeric import scaling
from jcompress.numeric.counting import MOST, Count
from jcompress.numeric.threshold import keep_largest
from jcompress.prune.masks.patterns import NM, Pattern, Shared

Scope = Literal["leaf", "output", "global"]


class Selection(Protocol):
    """What every method that chooses a mask by scores has: these three hyperparameters."""

    @property
    def sparsity(self) -> Any:
        """The fraction of zeros."""

    @property
    def scope(self) -> Scope:
        """For each leaf, for each output of it, or for all leaves together."""

    @property
    def pattern(self) -> Pattern | None:
        """What the mask must follow."""


def validate(method: Selection) -> None:
    """Raise for hyperparameters that contradict themselves. To be called when a method is made."""
    name, pattern = type(method).__name__, method.pattern
    fixed = None if pattern is None else pattern.sparsity
    if method.scope not in ("leaf", "output", "global"):
        raise ValueError(f"{name}: scope={method.scope!r} is unknown; use 'leaf', 'output' or 'global'")
    if method.scope == "output" and fixed is None and pattern not in (None, Shared()):
        raise ValueError(
            f"{name}: scope='output' decides for single weights, found {pattern}; use scope='leaf' with it"
        )
    if method.sparsity is None and fixed is None:
        raise ValueError(f"{name} needs a sparsity, the fraction of zeros, or a pattern that fixes it")
    if method.sparsity is None or callable(method.sparsity) or not core.is_concrete(method.sparsity):
        return
    check_sparsity(name, method.sparsity)
    if fixed is not None and abs(float(method.sparsity) - fixed) > 1e-6:
        raise ValueError(
            f"{name}: sparsity={method.sparsity} disagrees with {pattern}, which fixes it at {fixed:g}; leave sparsity "
            "out"
        )


def is_joint(method: Selection) -> bool:
    """Whether all leaves of the rule are decided together."""
    if isinstance(method.pattern, Shared):
        return True
    return method.scope == "global" and (method.pattern is None or method.pattern.sparsity is None)


def unit(method: Selection, shape: tuple[int, ...]) -> int:
    """How many weights the sparsity of one leaf can change by, at least."""
    if method.scope == "output" and len(shape) > 1:
        return shape[-1]
    return 1 if method.pattern is None else method.pattern.unit(shape)


def check_sparsity(name: str, sparsity: Any) -> None:
    """Raise for a sparsity outside [0, 1]."""
    if not np.all((np.asarray(sparsity) >= 0) & (np.asarray(sparsity) <= 1)):
        raise ValueError(f"{name}: sparsity={sparsity} is outside [0, 1]; it is the fraction of zeros")


def check(method: Selection, path: str, shape: tuple[int, ...]) -> None:
    """Raise if an array of this shape cannot take the method's pattern."""
    if method.pattern is not None:
        method.pattern.check(path, shape)


def kept(size: int, sparsity: Any) -> Any:
    """How many of ``size`` stay: ``size - round(sparsity * size)``, exact for a sparsity known now.

    A traced sparsity is rounded in float32, so past 2**24 parameters its count may be off by ``size * 2**-24``.

    Returns:
      An integer, for a traced sparsity a uint32 scalar, and of more than 32 bits hold a count of two numbers.
    """
    if core.is_concrete(sparsity):
        return size - round(float(sparsity) * size)
    cut = Count.near(jnp.round(sparsity.astype(jnp.float32) * float(size)))
    left = Count.of(size).left_after(cut)
    return left if size >= MOST else left.within(0).low


def fit(
    method: Selection,
    score: Callable[[jax.Array, Context], jax.Array],
    arrays: Sequence[jax.Array],
    contexts: Sequence[Context],
    by: Callable[[jax.Array], jax.Array] | None = None,
) -> list[Masked]:
    """Mask each array to its entries of the highest scores.

    Entries that a mask around the array hides go first and count as zeros. Where the score is a function ``by`` of each
    entry alone it need not be written out. Other scores square, multiply or add up what they read, so they see the
    arrays in the units of :mod:`jcompress.numeric.scaling`.
    """
    is_plain = method.pattern is None and method.scope != "output" and not any(map(jnp.iscomplexobj, arrays))
    if by is not None and is_plain:
        masks = _decided(method, list(arrays), contexts, by)
    else:
        singly = by is not None and (method.pattern is None or isinstance(method.pattern, NM))
        seen = arrays if singly else scaling.comparable(arrays, is_joint(method))
        masks = masks_of(method, [score(w, c) for w, c in zip(seen, contexts, strict=True)], contexts)
    return [Masked(jnp.where(mask, w, np.zeros((), w.dtype)), mask) for w, mask in zip(arrays, masks, strict=True)]


def masks_of(method: Selection, scores: Sequence[jax.Array], contexts: Sequence[Context]) -> list[jax.Array]:
    """The masks of a rule's leaves, given their scores."""
    shown = [x if c.where is None else jnp.where(c.where, x, -jnp.inf) for x, c in zip(scores, contexts, strict=True)]
    return _masks(method, shown, contexts)


def _masks(method: Selection, scores: list[jax.Array], contexts: Sequence[Context]) -> list[jax.Array]:
    pattern = method.pattern
    if pattern is None:
        return _decided(method, scores, contexts)
    for x, context in zip(scores, contexts, strict=True):
        pattern.check(context.path, x.shape)
    units = [pattern.units(x) for x in scores]
    if isinstance(pattern, Shared):
        kept = _decided(method, [_total(units, contexts)], contexts[:1]) * len(scores)
    else:
        kept = _decided(method, units, contexts)
    return [pattern.spread(mask, x.shape) for mask, x in zip(kept, scores, strict=True)]


def _decided(
    method: Selection,
    scores: list[jax.Array],
    contexts: Sequence[Context],
    by: Callable[[jax.Array], jax.Array] | None = None,
) -> list[jax.Array]:
    """Which of the units stay; with ``by``, which of the entries, those that are hidden already last."""
    if method.pattern is not None and method.pattern.sparsity is not None:
        return [method.pattern.mask(x) for x in scores]
    sparsity = core.value_at(method.sparsity, contexts[0].step)
    if core.is_concrete(sparsity):
        check_sparsity(f"{contexts[0].path}: {type(method).__name__}", sparsity)
    among: list[jax.Array] | None = None
    if by is not None and any(c.where is not None for c in contexts):
        shown = [jnp.ones((), jnp.bool_) if c.where is None else c.where for c in contexts]
        among = [jnp.broadcast_to(where, x.shape) for where, x in zip(shown, scores, strict=True)]
    if method.scope == "global":
        return keep_largest(scores, kept(sum(x.size for x in scores), sparsity), among=among, by=by)
    if method.scope == "output":
        return [_by_output(x, sparsity, context) for x, context in zip(scores, contexts, strict=True)]
    each = [None] * len(scores) if among is None else [[mask] for mask in among]
    pairs = zip(scores, each, strict=True)
    return [keep_largest([x], kept(x.size, sparsity), among=mask, by=by)[0] for x, mask in pairs]


def _total(units: list[jax.Array], contexts: Sequence[Context]) -> jax.Array:
    for x, context in zip(units, contexts, strict=True):
        if x.shape != units[0].shape:
            raise ValueError(
                f"{context.path}: leaves that share one mask need as many units as one another, found {x.shape} and at "
                f"{contexts[0].path} {units[0].shape}; give them rules of their own"
            )
    return sum(units[1:], units[0])


def contracted(shape: tuple[int, ...], context: Context) -> tuple[int, ...]:
    """The axes that an output sums over: those of the statistics, else all but the last, of a vector the only one."""
    axes = tuple(getattr(context.stats, "axes", ()))
    return tuple(sorted(i % len(shape) for i in axes)) if axes else tuple(range(context.batch, max(len(shape) - 1, 1)))


def _by_output(scores: jax.Array, sparsity: Any, context: Context) -> jax.Array:
    """A threshold for the weights of each output."""
    if not scores.size:
        return jnp.zeros(scores.shape, jnp.bool_)
    axes = contracted(scores.shape, context)
    count = kept(math.prod(scores.shape[i] for i in axes), sparsity)

    def decide(x: jax.Array) -> jax.Array:
        return keep_largest([x], count)[0]

    for axis in range(scores.ndim):
        if axis not in axes:
            decide = jax.vmap(decide, in_axes=axis, out_axes=axis)
    return decide(scores)
