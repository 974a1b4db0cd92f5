"""Budgets shared out over leaves: what a leaf can take, exact counts, and curves of losses."""

from __future__ import annotations

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from jcompress import core, rules
from jcompress.core import Method, PyTree
from jcompress.rules import Plan

Counts = dict[str, float]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A leaf that the plan compresses: its method, and how many weights change state together."""

    path: str
    shape: tuple[int, ...]
    method: Method
    unit: int
    dense: bool

    @property
    def size(self) -> int:
        """The number of weights."""
        return math.prod(self.shape)


Share = Callable[[list[Leaf], int], Counts]


def leaves(name: str, plan: Plan, sparsity: float, dense: str | Iterable[str]) -> list[Leaf]:
    """What the budget is shared by, once everything is known to have a sparsity to set."""
    check_sparsity(name, sparsity)
    patterns = [dense] if isinstance(dense, str) else list(dense)
    planned = [path for path, method in plan.items() if method is not None]
    for pattern in patterns:
        if not any(re.fullmatch(pattern, path) for path in planned):
            raise ValueError(f"{name}: dense={pattern!r} matches none of the planned paths, such as {planned[:3]}")
    found = []
    for path, method in plan.items():
        if method is None:
            continue
        if path not in plan.shapes:
            raise ValueError(f"{path}: the plan does not know the shape; make it with jc.plan(params, rules)")
        stays = any(re.fullmatch(pattern, path) for pattern in patterns)
        unit = 1 if stays else _unit(name, path, method, plan.shapes[path])
        found.append(Leaf(path, plan.shapes[path], method, unit, stays))
    if not found:
        raise ValueError(f"{name}: the plan compresses nothing, so there is no budget to share")
    return found


def check_sparsity(name: str, sparsity: float) -> None:
    """Raise for a sparsity outside [0, 1]."""
    if not 0 <= sparsity <= 1:
        raise ValueError(f"{name}: sparsity={sparsity} is outside [0, 1]; it is the fraction of zeros")


def _sparse(method: Any) -> Any:
    """The method whose sparsity counts: this one, or the first of those it is made of that has one; or None."""
    if hasattr(method, "sparsity"):
        return method
    return next((x for x in map(_sparse, core.wrapped(method)) if x is not None), None)


def _unit(name: str, path: str, method: Any, shape: tuple[int, ...]) -> int:
    """How many weights of a leaf the method decides together."""
    inner = _sparse(method)
    if inner is None:
        raise ValueError(
            f"{path}: {name} sets a sparsity, and {method!r} has none; keep it out of the plan with ({path!r}, None)"
        )
    if getattr(getattr(inner, "pattern", None), "sparsity", None) is not None:
        raise ValueError(
            f"{path}: {inner!r} has its sparsity fixed by the pattern; {name} cannot set it, keep it out of the plan"
        )
    return core.unit(method, shape)


def with_sparsity(method: Any, sparsity: float) -> Method:
    """The method with this sparsity for one leaf alone."""
    if not hasattr(method, "sparsity"):
        inner = _sparse(method)
        return _replaced(method, inner, with_sparsity(inner, sparsity))
    scoped = any(field.name == "scope" and field.init for field in dataclasses.fields(method))
    alone = {"scope": "leaf"} if scoped and method.scope == "global" else {}
    return dataclasses.replace(method, sparsity=sparsity, **alone)


def _replaced(method: Any, old: Any, new: Any) -> Any:
    """The method with ``new`` where ``old`` stands in it."""
    if method is old:
        return new
    if isinstance(method, tuple):
        return tuple(_replaced(x, old, new) for x in method)
    fields = {name: _replaced(getattr(method, name), old, new) for name in getattr(method, "wraps", ())}
    return dataclasses.replace(method, **fields) if fields else method


def spent(name: str, plan: Plan, leaves: list[Leaf], sparsity: float, share: Share) -> Plan:
    """The plan in which the leaves keep in all what the sparsity leaves them, shared out as ``share`` says."""
    total = sum(leaf.size for leaf in leaves)
    held = sum(leaf.size for leaf in leaves if leaf.dense)
    free = [leaf for leaf in leaves if not leaf.dense]
    stay = total - round(sparsity * total)
    if stay < held:
        raise ValueError(
            f"{name}: a sparsity of {sparsity:g} keeps {stay} of {total} weights, and {held} are kept dense; lower it, "
            "or keep less dense"
        )
    counts = rounded(share(free, stay - held), free, stay - held)
    changes: dict[str, Method | None] = {leaf.path: None for leaf in leaves if leaf.dense}
    for leaf in free:
        changes[leaf.path] = with_sparsity(leaf.method, 1 - counts[leaf.path] / leaf.size if leaf.size else 0.0)
    return plan.replace(changes)


def capped(weights: Counts, leaves: list[Leaf], kept: int) -> Counts:
    """Counts in proportion to the weights that sum to ``kept``; no leaf keeps more than it has."""
    counts, open_leaves = Counts(), list(leaves)
    left = float(kept)
    while open_leaves:
        total = sum(weights[leaf.path] for leaf in open_leaves)
        scale = left / total if total else 0.0
        full = [leaf for leaf in open_leaves if weights[leaf.path] * scale > leaf.size]
        for leaf in full or open_leaves:
            counts[leaf.path] = float(leaf.size) if full else weights[leaf.path] * scale
        if not full:
            break
        left -= sum(leaf.size for leaf in full)
        open_leaves = [leaf for leaf in open_leaves if leaf not in full]
    return counts


def rounded(wanted: Counts, leaves: list[Leaf], kept: int) -> dict[str, int]:
    """Whole units by largest remainder, that sum to ``kept`` or as near below as the units allow."""
    counts = {leaf.path: int(wanted[leaf.path] / leaf.unit + 1e-9) * leaf.unit for leaf in leaves}
    left = kept - sum(counts.values())
    remainders = {leaf.path: (wanted[leaf.path] - counts[leaf.path]) / leaf.unit for leaf in leaves}
    order = sorted(leaves, key=lambda leaf: -remainders[leaf.path])
    progress = True
    while left > 0 and progress:
        progress = False
        for leaf in order:
            if leaf.unit <= left and counts[leaf.path] + leaf.unit <= leaf.size:
                counts[leaf.path] += leaf.unit
                left, progress = left - leaf.unit, True
    return counts


def values(name: str, leaves: list[Leaf], tree: PyTree) -> dict[str, np.ndarray]:
    """Arrays by path on the host, once they are known to fit."""
    given = rules.leaves(tree)
    found = {}
    for leaf in leaves:
        x = given.get(leaf.path)
        if x is None or np.shape(x) != leaf.shape:
            shown = "none" if x is None else f"shape {np.shape(x)}"
            raise ValueError(f"{leaf.path}: {name} needs an array of shape {leaf.shape}, found {shown}")
        found[leaf.path] = np.asarray(x).astype(np.float64)
    return found


def ranked(scores: Mapping[str, np.ndarray]) -> Share:
    """What each leaf has of the largest scores of all; ties go to the earlier leaf."""

    def share(free: list[Leaf], kept: int) -> Counts:
        flat = np.concatenate([np.zeros(0), *[scores[leaf.path].ravel() for leaf in free]])
        owner = np.repeat(np.arange(len(free)), [leaf.size for leaf in free])
        largest = np.argsort(-flat, kind="stable")[:kept]
        counts = np.bincount(owner[largest], minlength=len(free))
        return {leaf.path: float(n) for leaf, n in zip(free, counts, strict=True)}

    return share


def adaptive(w: np.ndarray) -> np.ndarray:
    """Each square over the sum of those that are no smaller, as sorted; equal ones by their index."""
    squares = np.square(w).ravel()
    order = np.argsort(squares, kind="stable")
    remaining = np.cumsum(squares[order][::-1])[::-1]
    found = np.zeros_like(squares)
    found[order] = squares[order] / np.where(remaining > 0, remaining, 1)
    return found.reshape(w.shape)


@dataclasses.dataclass(frozen=True)
class Segment:
    """A stretch of one leaf's curve: how many weights it cuts, and the loss for each."""

    path: str
    cut: float
    slope: float


def hull(leaf: Leaf, losses: Mapping[float, float] | None) -> tuple[float, list[Segment]]:
    """The weights that are cut at least, and the convex curve under the measured losses from there on."""
    points = sorted((float(s), float(y)) for s, y in (losses or {}).items())
    if len(points) < 2 or not np.isfinite(points).all() or points[0][0] < 0 or points[-1][0] > 1:
        raise ValueError(
            f"{leaf.path}: by_sensitivity needs finite losses at two sparsities in [0, 1] or more, found {losses}; "
            "measure them with jc.budget.scan"
        )
    lower: list[tuple[float, float]] = []
    for x, y in points:
        while len(lower) > 1 and _turns_down(lower[-2], lower[-1], (x, y)):
            lower.pop()
        lower.append((x, y))
    segments = [
        Segment(leaf.path, (b[0] - a[0]) * leaf.size, (b[1] - a[1]) / ((b[0] - a[0]) * max(leaf.size, 1)))
        for a, b in itertools.pairwise(lower)
    ]
    return lower[0][0] * leaf.size, segments


def _turns_down(a: tuple[float, float], b: tuple[float, float], c: tuple[float, float]) -> bool:
    """Whether the middle point lies on or above the line between the others."""
    return (b[1] - a[1]) * (c[0] - a[0]) >= (c[1] - a[1]) * (b[0] - a[0])


def cheapest(curves: Mapping[str, tuple[float, list[Segment]]]) -> Share:
    """Cut along the segments of least slope first."""

    def share(free: list[Leaf], kept: int) -> Counts:
        counts = {leaf.path: leaf.size - curves[leaf.path][0] for leaf in free}
        left = sum(counts.values()) - kept
        segments = sorted((s for leaf in free for s in curves[leaf.path][1]), key=lambda s: s.slope)
        most = sum(s.cut for s in segments)
        if not -0.5 <= left <= most + 0.5:
            raise ValueError(
                f"by_sensitivity: the budget cuts {left:.0f} weights beyond the smallest sparsities measured, of "
                f"{most:.0f} up to the largest; measure losses at smaller or larger sparsities"
            )
        for segment in segments:
            cut = min(segment.cut, max(left, 0.0))
            counts[segment.path], left = counts[segment.path] - cut, left - cut
        return counts

    return share
