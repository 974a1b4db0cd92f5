"""Slicing what goes with parameters, such as the state of an optimizer, where they were cut."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.trace.core import walk
from jcompress.trace.coupled import factors

Axes = Mapping[int, np.ndarray]
Shape = tuple[int, ...]


def sliced(x: Any, axes: Axes) -> Any:
    """The positions that stay; of a shape, the shape that does."""
    if isinstance(x, jax.ShapeDtypeStruct):
        return jax.eval_shape(lambda y: sliced(y, axes), x)
    for axis, index in axes.items():
        x = walk.take(x, index, axis)
    return x


class Cutter:
    """Slices trees that go with parameters.

    Args:
      shapes: of the parameters before they were cut, by path, in the order of the tree.
      axes: for each that got smaller, the positions that stay on each axis.
    """

    def __init__(self, shapes: Mapping[str, Shape], axes: Mapping[str, Axes]) -> None:
        self.shapes, self.axes = dict(shapes), axes
        self.names = {tuple(path.split("/")): path for path in shapes}
        self.errors: list[str] = []

    def tree(self, tree: PyTree, like: PyTree | None) -> PyTree:
        """The tree with each leaf sliced, or an error that names those that cannot be."""
        self.errors = []
        given = rules.paths(tree, is_leaf=factors.is_factored)
        goals = [None] * len(given) if like is None else self._same(tree, like)
        leaves = [
            self._factored(path, x, goal) if factors.is_factored(x) else self._leaf(path, x)
            for (path, x), goal in zip(given, goals, strict=True)
        ]
        found = jax.tree.unflatten(jax.tree.structure(tree, is_leaf=_stops), leaves)
        if not self.errors and like is not None:
            self._compare(found, like)
        if self.errors:
            more = [f"and {len(self.errors) - 8} more"] if self.errors[8:] else []
            raise ValueError("\n".join([*self.errors[:8], *more]))
        return found

    def _same(self, tree: PyTree, like: PyTree) -> list[Any]:
        found, expected = (str(jax.tree.structure(x)) for x in (like, tree))
        if found != expected:
            raise ValueError(f"like: found {found}, expected {expected}")
        return [x for _, x in rules.paths(like, is_leaf=factors.is_factored)]

    def _compare(self, found: PyTree, like: PyTree) -> None:
        for (path, x), (_, goal) in zip(rules.paths(found), rules.paths(like), strict=True):
            if jnp.shape(x) != jnp.shape(goal):
                self.errors.append(
                    f"{path}: found shape {jnp.shape(x)} after the cut, expected {jnp.shape(goal)}, as in like=; start "
                    "it anew for the small parameters"
                )

    def _leaf(self, path: str, x: Any) -> Any:
        if core.is_node(x):
            return self._node(path, x)
        shape = tuple(getattr(x, "shape", ()))
        if not shape:
            return x
        name, rest = self._named(path.split("/"), shape)
        if name is None:
            return self._nameless(path, x, shape)
        axes = self._axes(shape, name, rest)
        if axes is None:
            self.errors.append(
                f"{path}: found shape {shape}, which goes with {name} of shape {self.shapes[name]}, and nothing tells "
                "along which of its axes; start it anew for the small parameters"
            )
        return sliced(x, axes or {})

    def _node(self, path: str, x: Any) -> Any:
        name, _ = self._named(path.split("/"), None)
        if name is None or name in self.axes:
            self.errors.append(
                f"{path}: found a {type(x).__name__} node, expected an array; materialize it, and cut that"
            )
        return x

    def _named(self, parts: Sequence[str], shape: Shape | None) -> tuple[str | None, Sequence[str]]:
        """The parameter whose path is part of this one, and what stands behind it.

        Optimizers may know a subtree of the parameters only: then the end of the path must do.
        """
        for length in range(len(parts), 0, -1):
            for start in range(len(parts) - length, -1, -1):
                if name := self.names.get(tuple(parts[start : start + length])):
                    return name, parts[start + length :]
        for length in range(len(parts), 0, -1):
            ends = [name for path, name in self.names.items() if path[-length:] == tuple(parts[-length:])]
            fits = [name for name in ends if shape is None or self.shapes[name] == shape]
            if ends:
                return (fits[0], ()) if len(fits) == 1 else (None, ())
        return None, ()

    def _axes(self, shape: Shape, name: str, rest: Sequence[str]) -> Axes | None:
        """Which positions stay on which axes of a leaf that goes with a parameter; None if that cannot be told."""
        full, axes = self.shapes[name], self.axes.get(name, {})
        small = tuple(len(axes[a]) if a in axes else n for a, n in enumerate(full))
        if not axes or shape == small or (shape != full and math.prod(shape) <= 1):
            return {}
        if len(rest) == 1 and rest[0].isdigit() and int(rest[0]) < len(full) and shape == (full[int(rest[0])],) != full:
            return {0: axes[int(rest[0])]} if int(rest[0]) in axes else {}  # an accumulator for each axis
        if len(shape) == len(full) and all(n in (1, m) for n, m in zip(shape, full, strict=True)):
            return {a: index for a, index in axes.items() if shape[a] != 1 or full[a] == 1}
        lead = len(shape) - len(full)
        if lead > 0 and shape[lead:] == full:  # a memory of several
            return {lead + a: index for a, index in axes.items()}
        return _of_rest(shape, full, axes)

    def _nameless(self, path: str, x: Any, shape: Shape) -> Any:
        """A leaf that no path tells of: parameters side by side in one vector, or nothing of theirs."""
        for names in self._subtrees():
            if shape[-1] == sum(math.prod(self.shapes[name]) for name in names):
                return sliced(x, {len(shape) - 1: self._positions(names)})
        if jnp.issubdtype(jnp.result_type(x), jnp.inexact) and self._may_be_some(shape[-1]):
            self.errors.append(
                f"{path}: found shape {shape}, as long as some parameters side by side, and nothing tells which; start "
                "it anew for the small parameters"
            )
        return x

    def _subtrees(self) -> list[list[str]]:
        """The paths of all parameters, and those below each prefix."""
        found: dict[tuple[str, ...], list[str]] = {}
        for parts, name in self.names.items():
            for n in range(len(parts)):
                found.setdefault(parts[:n], []).append(name)
        return list(found.values())

    def _positions(self, names: Sequence[str]) -> np.ndarray:
        """Where the entries that stay are among those of some parameters side by side."""
        found, start = [], 0
        for name in names:
            where = np.arange(math.prod(self.shapes[name])).reshape(self.shapes[name])
            for axis, index in self.axes.get(name, {}).items():
                where = np.take(where, index, axis)
            found.append(start + where.reshape(-1))
            start += math.prod(self.shapes[name])
        return np.concatenate(found)

    def _may_be_some(self, n: int) -> bool:
        """Whether some parameters, one that was cut among them, have so many entries together."""
        cut = [math.prod(self.shapes[name]) for name in self.axes]
        if not cut or n < min(cut) or n > 1 << 22:
            return bool(cut) and n > 1 << 22
        sums = [1, 0]  # bit i: i entries can be had, without and with one that was cut
        for name, shape in self.shapes.items():
            without, with_cut = (x << math.prod(shape) for x in sums)
            sums = (
                [sums[0], sums[1] | with_cut | without]
                if name in self.axes
                else [sums[0] | without, sums[1] | with_cut]
            )
            sums = [x & ((1 << (n + 1)) - 1) for x in sums]
        return bool(sums[1] >> n & 1)

    def _factored(self, path: str, state: Any, like: Any) -> Any:
        values = [dict(rules.paths(tree)) for tree in (state.v_row, state.v_col, state.v)]
        names = {key: self._named([*path.split("/"), *key.split("/")], None)[0] for key in values[2]}
        full = {key: None if name is None else self.shapes[name] for key, name in names.items()}
        told = {key: jnp.shape(x) for key, x in rules.paths(like.v)} if like is not None else None
        least = factors.threshold(values[2], full)
        found: list[dict[str, Any]] = [{}, {}, {}]
        for key, name in names.items():
            each = tuple(value[key] for value in values)
            if name is not None and name in self.axes:
                small = tuple(len(self.axes[name].get(a, range(n))) for a, n in enumerate(self.shapes[name]))
                wanted = least(small) if told is None else told[key] != small
                each = self._factors(f"{path}/{key}".strip("/"), each, name, wanted)
            for part, x in zip(found, each, strict=True):
                part[key] = x
        trees = [
            jax.tree.unflatten(jax.tree.structure(tree), [part[key] for key, _ in rules.paths(tree)])
            for tree, part in zip((state.v_row, state.v_col, state.v), found, strict=True)
        ]
        return state._replace(v_row=trees[0], v_col=trees[1], v=trees[2])

    def _factors(self, path: str, each: tuple, name: str, is_factored: bool | None) -> tuple:
        full, axes = self.shapes[name], self.axes[name]
        if factors.fits(each, full) and is_factored is not None:
            make = lambda *x: factors.cut(x, full, lambda v: sliced(v, axes), is_factored)  # noqa: E731
            abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in each)
            return tuple(jax.eval_shape(make, *each) if abstract else make(*each))
        found = [jnp.shape(x) for x in each]
        self.errors.append(
            f"{path}: found factors of shapes {found[0]} and {found[1]}, of {name} with shape {full}; "
            "whether the optimizer factors the new shape is not known; pass like=optimizer.init(small_params)"
        )
        return each


def _of_rest(shape: Shape, full: Shape, axes: Axes) -> Axes | None:
    """Of a statistic over some axes of a parameter, where only one choice of the others fits."""
    choices: list[Axes] = []
    for kept in _choices(shape, full):
        found = {i: axes[a] for i, a in enumerate(kept) if a in axes}
        if not any(_same(found, other) for other in choices):
            choices.append(found)
    return choices[0] if len(choices) == 1 else None


def _choices(shape: Shape, full: Shape, start: int = 0) -> list[tuple[int, ...]]:
    """The increasing axes of ``full`` that have these lengths."""
    if not shape:
        return [()]
    return [
        (a, *rest) for a in range(start, len(full)) if full[a] == shape[0] for rest in _choices(shape[1:], full, a + 1)
    ]


def _same(a: Axes, b: Axes) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[i], b[i]) for i in a)


def _stops(x: Any) -> bool:
    return core.is_node(x) or factors.is_factored(x)
