"""From scores of units to the units that stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.layers import units
from jcompress.layers.groups import Groups
from jcompress.numeric.threshold import keep_largest
from jcompress.prune.masks import selection

Scope = Literal["group", "global"]
Normalize = Literal["mean", "max", "norm"]


def keep(
    scores: Mapping[str, jax.Array],
    groups: Groups,
    sparsity: Any,
    scope: Scope = "group",
    multiple_of: int = 1,
    at_least: int = 1,
    normalize: Normalize | None = None,
) -> dict[str, jax.Array]:
    """Keep the units of the highest scores.

    Counts are exact, ``n - round(sparsity * n)``, and ties go to the lower index. NaN counts as the largest score.
    Works under ``jit`` and ``vmap``, with traced scores and a traced sparsity.

    Args:
      scores: ``{name: (size,)}``; groups that it does not name are left alone.
      groups: from ``jc.trace.coupling``.
      sparsity: the fraction of units to cut, in [0, 1]; for ``scope="group"`` also ``{name: fraction}``.
      scope: ``"group"``, that fraction of each group, or ``"global"``, of all their units together.
      multiple_of: sizes are rounded up to a multiple of it, 8 or 128 say, though not past the size of the group.
      at_least: units that stay in each group, whatever their scores.
      normalize: what the scores of a group are divided by first, so that groups compare under a global scope: their
        ``"mean"``, ``"max"`` or Euclidean ``"norm"`` (as Molchanov et al. 2017, arXiv:1611.06440, do).

    Returns:
      ``{name: bool (size,)}``, True where a unit stays: for ``jc.trace.mask`` and ``jc.shrink``.

    Raises:
      ValueError: for a group that is unknown or cannot be cut, scores of another size, a sparsity outside [0, 1], or
        an unknown choice.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> groups, scores = {"hidden": jc.trace.Group(size=4)}, {"hidden": jnp.array([3.0, 1.0, 2.0, 4.0])}
      >>> structured.keep(scores, groups, sparsity=0.5)["hidden"].tolist()
      [True, False, False, True]
    """
    _check(scope, multiple_of, at_least, normalize)
    fractions = _fractions(scores, sparsity, scope)
    normal = {name: _normalized(_checked(name, x, groups), normalize) for name, x in scores.items()}
    counts: Mapping[str, Any]
    if scope == "group":
        counts = {name: selection.kept(x.size, fractions[name]) for name, x in normal.items()}
    else:
        counts = _global_counts(normal, sparsity, at_least)
    return {
        name: keep_largest([x], _rounded(counts[name], x.size, multiple_of, at_least))[0] for name, x in normal.items()
    }


def _check(scope: str, multiple_of: int, at_least: int, normalize: str | None) -> None:
    if scope not in ("group", "global"):
        raise ValueError(f"keep: scope={scope!r} is unknown; use 'group' or 'global'")
    if normalize not in (None, "mean", "max", "norm"):
        raise ValueError(f"keep: normalize={normalize!r} is unknown; use 'mean', 'max', 'norm' or None")
    if multiple_of < 1 or at_least < 0:
        raise ValueError(f"keep: multiple_of={multiple_of} must be positive, and at_least={at_least} not negative")


def _fractions(scores: Mapping[str, jax.Array], sparsity: Any, scope: str) -> dict[str, Any]:
    """The sparsity of each group."""
    if isinstance(sparsity, Mapping):
        if scope == "global":
            raise ValueError("keep: a sparsity for each group goes with scope='group'; a global scope takes one number")
        if set(sparsity) != set(scores):
            raise ValueError(
                f"keep: found a sparsity for {sorted(sparsity)}, expected one for each of {sorted(scores)}"
            )
    fractions = dict(sparsity) if isinstance(sparsity, Mapping) else dict.fromkeys(scores, sparsity)
    for name, fraction in fractions.items():
        if core.is_concrete(fraction):
            selection.check_sparsity(f"{name}: keep", fraction)
    return fractions


def _checked(name: str, x: jax.Array, groups: Groups) -> jax.Array:
    size = units.find(groups, name).size
    if jnp.shape(x) != (size,):
        raise ValueError(f"{name}: found scores of shape {jnp.shape(x)}, expected ({size},), one for each unit")
    return jnp.asarray(x, jnp.float32)


def _normalized(x: jax.Array, normalize: Normalize | None) -> jax.Array:
    if normalize is None:
        return x
    by = jnp.mean(x) if normalize == "mean" else jnp.max(x) if normalize == "max" else jnp.linalg.norm(x)
    return x / jnp.where(by == 0, 1, by)


def _rounded(count: Any, size: int, multiple_of: int, at_least: int) -> Any:
    """The count raised to the least allowed, then to a multiple, and held to the size."""
    if not isinstance(count, int):
        count = jnp.maximum(count, min(at_least, size)).astype(jnp.uint32)
        return jnp.minimum((count + (multiple_of - 1)) // multiple_of * multiple_of, size)
    return min(-(-max(count, min(at_least, size)) // multiple_of) * multiple_of, size)


def _global_counts(scores: dict[str, jax.Array], sparsity: Any, at_least: int) -> dict[str, jax.Array]:
    """How many units of each group are among the highest of all, once each group has its least."""
    forced = [keep_largest([x], min(at_least, x.size))[0] for x in scores.values()]
    least = sum(min(at_least, x.size) for x in scores.values())
    # Those that stay in any case go below all others, so that the rest of the count is spent on the others.
    low = jnp.finfo(jnp.float32).min
    others = [jnp.where(f, -jnp.inf, jnp.maximum(x, low)) for x, f in zip(scores.values(), forced, strict=True)]
    total = selection.kept(sum(x.size for x in scores.values()), sparsity)
    rest = max(total - least, 0) if isinstance(total, int) else jnp.maximum(total, least) - jnp.uint32(least)
    chosen = keep_largest(others, rest)
    return {name: jnp.sum(f | c, dtype=jnp.uint32) for name, f, c in zip(scores, forced, chosen, strict=True)}
