"""From scores of units to the units that stay."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.layers import units
from jcompress.layers.groups import Group
from jcompress.numeric.threshold import keep_largest
from jcompress.prune.masks import selection
from jcompress.prune.structured import targets

Scores = jax.Array | np.ndarray
Scope = Literal["group", "global"]
Normalize = Literal["mean", "max", "norm"]


def keep(
    scores: Mapping[str, jax.Array],
    groups: Mapping[str, Group],
    sparsity: Any = None,
    scope: Scope = "group",
    multiple_of: int = 1,
    at_least: int = 1,
    normalize: Normalize | None = None,
    *,
    cost: Any = None,
    of: Literal["multiply_adds", "bytes"] | targets.CostOfSizes = "multiply_adds",
) -> dict[str, jax.Array]:
    """Keep the units of the highest scores: a fraction of them, or as many as a share of the cost allows.

    With ``sparsity`` counts are exact, ``n - round(sparsity * n)``. With ``cost`` units are taken in one order until
    the shrunk network costs that share of the whole one: by their scores with ``scope="global"``, and evenly from all
    groups with ``scope="group"``. Of all prefixes of the order the nearest to the target is chosen, so it is missed
    by less than one unit. Costs are counted exactly, products of two cut layers among them: what is met is what
    ``jc.trace.cost`` counts of the shrunk network.

    Ties go to the lower index. NaN counts as the largest score. Works under ``jit`` and ``vmap``, with traced scores, a
    traced sparsity or a traced cost; costs are then compared in float32.

    Args:
      scores: ``{name: (size,)}``; groups that it does not name are left alone.
      groups: from ``jc.trace.coupling``.
      sparsity: the fraction of units to cut, in [0, 1]; for ``scope="group"`` also ``{name: fraction}``.
      scope: ``"group"``, the same fraction of each group, or ``"global"``, of all their units together.
      multiple_of: sizes are rounded up to a multiple of it, 8 or 128 say, though not past the size of the group.
      at_least: units that stay in each group, whatever their scores.
      normalize: what the scores of a group are divided by first, so that groups compare under a global scope: their
        ``"mean"``, ``"max"`` or Euclidean ``"norm"`` (as Molchanov et al. 2017, arXiv:1611.06440, do).
      cost: the share of the cost that stays, in (0, 1], in place of ``sparsity``.
      of: which cost: ``"multiply_adds"`` or ``"bytes"`` of the function that the groups were read off, or a function of
        ``{name: kept units}`` that gives a number, such as a latency that is measured.

    Returns:
      ``{name: bool (size,)}``, True where a unit stays: for ``jc.trace.mask`` and ``jc.shrink``.

    Raises:
      ValueError: for a group that is unknown or cannot be cut, scores of another size, a sparsity or a cost out of
        range, a cost that cannot be met (the message says what can), or an unknown choice.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> groups, scores = {"hidden": jc.trace.Group(size=4)}, {"hidden": jnp.array([3.0, 1.0, 2.0, 4.0])}
      >>> structured.keep(scores, groups, sparsity=0.5)["hidden"].tolist()
      [True, False, False, True]
      >>> params = {"up": jnp.array([[3.0, 1.0, 2.0, 4.0]]), "down": jnp.ones((4, 1))}
      >>> groups = jc.trace.coupling(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((2, 1)))
      >>> structured.keep(structured.l1(params, groups), groups, cost=0.75)["up[1]"].tolist()
      [True, False, True, True]
    """
    _check(scope, multiple_of, at_least, normalize)
    if (sparsity is None) == (cost is None):
        raise ValueError(f"keep: found sparsity={sparsity} and cost={cost}, expected one of the two")
    normal = {name: _normalized(_checked(name, x, groups), normalize) for name, x in scores.items()}
    # jit sorts the names of scores; the order in which ties fall must not depend on it.
    normal = {name: normal[name] for name in groups if name in normal}
    counts: Mapping[str, Any]
    if cost is not None:
        counts = _counts_for_cost(normal, groups, cost, of, scope, multiple_of, at_least)
    elif scope == "group":
        fractions = _fractions(scores, sparsity)
        counts = {name: selection.kept(x.size, fractions[name]) for name, x in normal.items()}
    else:
        _check_global(sparsity)
        counts = _global_counts(normal, sparsity, at_least)
    return {name: _top(x, _rounded(counts[name], x.size, multiple_of, at_least)) for name, x in normal.items()}


def _top(x: Scores, count: Any) -> jax.Array:
    """The mask of the largest; groups are short, so a sort compiles and runs faster than a threshold is found."""
    rank = targets.places(x)
    return jnp.asarray(rank < (count if isinstance(count, int) else jnp.asarray(count).astype(jnp.int32)))


def _counts_for_cost(
    scores: dict[str, Scores],
    groups: Mapping[str, Group],
    cost: Any,
    of: str | targets.CostOfSizes,
    scope: Scope,
    multiple_of: int,
    at_least: int,
) -> dict[str, Any]:
    if core.is_concrete(cost) and not 0 < float(cost) <= 1:
        raise ValueError(f"keep: cost={cost} is outside (0, 1]; it is the share that stays")
    if scope == "global":
        order = targets.shared_order(scores)
    else:
        order = targets.even_order({name: x.size for name, x in scores.items()})

    def round_to(count: Any, size: int) -> Any:
        return _rounded(count, size, multiple_of, at_least)

    return targets.sizes_for(order, targets.model(groups, of), cost, round_to)


def _check(scope: str, multiple_of: int, at_least: int, normalize: str | None) -> None:
    if scope not in ("group", "global"):
        raise ValueError(f"keep: scope={scope!r} is unknown; use 'group' or 'global'")
    if normalize not in (None, "mean", "max", "norm"):
        raise ValueError(f"keep: normalize={normalize!r} is unknown; use 'mean', 'max', 'norm' or None")
    if multiple_of < 1 or at_least < 0:
        raise ValueError(f"keep: multiple_of={multiple_of} must be positive, and at_least={at_least} not negative")


def _check_global(sparsity: Any) -> None:
    if isinstance(sparsity, Mapping):
        raise ValueError("keep: a sparsity for each group goes with scope='group'; a global scope takes one number")
    if core.is_concrete(sparsity):
        selection.check_sparsity("keep", sparsity)


def _fractions(scores: Mapping[str, jax.Array], sparsity: Any) -> dict[str, Any]:
    """The sparsity of each group."""
    if isinstance(sparsity, Mapping) and set(sparsity) != set(scores):
        raise ValueError(f"keep: found a sparsity for {sorted(sparsity)}, expected one for each of {sorted(scores)}")
    fractions = dict(sparsity) if isinstance(sparsity, Mapping) else dict.fromkeys(scores, sparsity)
    for name, fraction in fractions.items():
        if core.is_concrete(fraction):
            selection.check_sparsity(f"{name}: keep", fraction)
    return fractions


def _checked(name: str, x: jax.Array, groups: Mapping[str, Group]) -> Scores:
    size = units.find(groups, name).size
    if jnp.shape(x) != (size,):
        raise ValueError(f"{name}: found scores of shape {jnp.shape(x)}, expected ({size},), one for each unit")
    # Many small groups: what can be read now is chosen among on the host, without a dispatch for each step.
    return np.asarray(x, np.float32) if core.is_concrete(x) else jnp.asarray(x, jnp.float32)


def _normalized(x: Scores, normalize: Normalize | None) -> Scores:
    if normalize is None:
        return x
    xp: Any = np if isinstance(x, np.ndarray) else jnp
    found = xp.where(
        x == -xp.inf, xp.float32(0), x
    )  # -inf says that a unit must go; its group has a scale all the same
    by = xp.mean(found) if normalize == "mean" else xp.max(found) if normalize == "max" else xp.linalg.norm(found)
    return x / xp.where(by == 0, xp.float32(1), by)


def _rounded(count: Any, size: int, multiple_of: int, at_least: int) -> Any:
    """The count raised to the least allowed, then to a multiple, and held to the size."""
    if not isinstance(count, int):
        count = jnp.maximum(jnp.asarray(count), min(at_least, size)).astype(jnp.uint32)
        return jnp.minimum((count + (multiple_of - 1)) // multiple_of * multiple_of, size)
    return min(-(-max(count, min(at_least, size)) // multiple_of) * multiple_of, size)


def _global_counts(scores: dict[str, Scores], sparsity: Any, at_least: int) -> dict[str, jax.Array]:
    """How many units of each group are among the highest of all, once each group has its least."""
    forced = [keep_largest([jnp.asarray(x)], min(at_least, x.size))[0] for x in scores.values()]
    least = sum(min(at_least, x.size) for x in scores.values())
    # Those that stay in any case go below all others, so that the rest of the count is spent on the others.
    low = jnp.finfo(jnp.float32).min
    others = [jnp.where(f, -jnp.inf, jnp.maximum(x, low)) for x, f in zip(scores.values(), forced, strict=True)]
    total = selection.kept(sum(x.size for x in scores.values()), sparsity)
    rest = max(total - least, 0) if isinstance(total, int) else jnp.maximum(total, least) - jnp.uint32(least)
    chosen = keep_largest(others, rest)
    return {name: jnp.sum(f | c, dtype=jnp.uint32) for name, f, c in zip(scores, forced, chosen, strict=True)}
