"""Paths, and plans made from ordered rules."""

from __future__ import annotations

import re
import zlib
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core
from jcompress.core import Layout, Method, PyTree
from jcompress.core.naming import children as children
from jcompress.core.naming import closest, paths
from jcompress.core.naming import is_box as is_box
from jcompress.core.naming import is_variable as is_variable

Rule = tuple[str, Method | None]


def leaves(tree: PyTree) -> dict[str, Any]:
    """``{path: leaf}``, in the order of :func:`paths`; compressed nodes are leaves.

    Raises:
      ValueError: if two leaves have one path.
    """
    return dict(paths(tree))


def rebuild(tree: PyTree, changes: Mapping[str, Any], like: PyTree = None) -> PyTree:
    """The tree with other leaves at some paths.

    Args:
      tree: any pytree; nodes count as leaves.
      changes: ``{path: leaf}``, or a node, or anything else that is to stand there.
      like: a tree of the same structure whose paths count, where those of ``tree`` say nothing: the parameters for
        the updates of an optimizer.
    """
    found, treedef = jax.tree.flatten(tree, is_leaf=core.is_node)
    names = [path for path, _ in paths(tree if like is None else like)]
    return jax.tree.unflatten(treedef, [changes.get(p, x) for p, x in zip(names, found, strict=True)])


def beside(params: PyTree, tree: PyTree) -> dict[str, Any]:
    """``{path: what stands there}`` in a tree of the structure of ``params``: gradients, updates, old nodes."""
    treedef: Any = jax.tree.structure(params, is_leaf=core.is_node)
    return dict(zip([path for path, _ in paths(params)], treedef.flatten_up_to(tree), strict=True))


def key_of(key: jax.Array | None, path: str) -> Any:
    """A key of this path's own, whatever else is in the tree; None without a key."""
    return None if key is None else jax.random.fold_in(key, zlib.crc32(path.encode()) & 0x7FFFFFFF)


def kind(path: str) -> str:
    """What paths of leaves that are sharded alike have in common: all but numbers, as of layers.

    Under ``jit`` arrays do not tell how they are sharded. With a single device all paths are of one kind.
    """
    return "" if jax.device_count() == 1 else re.sub(r"\d+", "0", path)


def matching(params: PyTree | Mapping[str, Any], match: str, name: str = "match") -> dict[str, Any]:
    """``{path: leaf}`` of the leaves whose whole path a regular expression matches.

    Raises:
      ValueError: if it matches none; the message names paths that are close.
    """
    known = leaves(params)
    found = {path: x for path, x in known.items() if _pattern(match).fullmatch(path)}
    if not found:
        raise ValueError(f"{name}: {match!r} matches no parameter; {closest(match, known)}")
    return found


class Plan(Mapping):
    """``{path: method}`` for the leaves of one tree of parameters; ``None`` keeps a leaf dense.

    A plan is a value: print it, look a path up, or change entries with :meth:`replace`. Leaves with the same
    group number fell under the same rule, and a method with a global scope decides for them together.

    Attributes:
      groups: ``{path: number}``.
      shapes: ``{path: shape}``, where known.
      layouts: ``{path: Layout}``, where known.
      shardings: ``{path: sharding}`` of leaves that are spread over devices, where known.
      notes: what is worth telling about the rules.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.ones(4), "b": jnp.ones(4)}
      >>> plan = jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0.5))])
      >>> plan.replace({"a": None})["a"] is None, list(plan), plan["b"].sparsity
      (True, ['a', 'b'], 0.5)
    """

    def __init__(
        self,
        methods: Mapping[str, Method | None],
        groups: Mapping[str, int] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        notes: Sequence[str] = (),
        layouts: Mapping[str, Layout] | None = None,
        shardings: Mapping[str, Any] | None = None,
    ) -> None:
        self._methods = dict(methods)
        self.groups = dict(groups) if groups is not None else _numbered(self._methods)
        self.shapes = dict(shapes or {})
        self.notes = tuple(notes)
        self.layouts = dict(layouts or {})
        self.shardings = dict(shardings or {})

    def __getitem__(self, path: str) -> Method | None:
        return self._methods[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def replace(self, changes: Mapping[str, Method | None]) -> Plan:
        """A plan with other methods at some paths.

        Leaves that get equal methods in one call form a group of their own, as under a rule.
        """
        for path, method in changes.items():
            if path not in self._methods:
                raise ValueError(f"{path}: not in the plan; {closest(path, self._methods)}")
            _check_method(path, method)
            if method is not None and path in self.shapes:
                _check_fit(method, path, self.shapes[path], jnp.float32, self.layouts.get(path))
        groups = {**self.groups, **_numbered(changes, max(self.groups.values(), default=0) + 1)}
        return Plan({**self._methods, **changes}, groups, self.shapes, self.notes, self.layouts, self.shardings)

    def units(self, among: Iterable[str] | None = None) -> list[list[str]]:
        """The paths that are decided together: all of a rule whose method decides for all at once, else each alone.

        Args:
          among: some of the paths; all that are compressed by default.
        """
        found: dict[Any, list[str]] = {}
        for path in self if among is None else among:
            method = self._methods.get(path)
            if method is not None or among is not None:
                found.setdefault(self.groups[path] if core.is_joint(method) else path, []).append(path)
        return list(found.values())

    def kind(self, path: str) -> Hashable:
        """What leaves of one shape must have in common to be treated in one loop: rule, layout and sharding."""
        return self.groups[path], self.layouts.get(path), self.shardings.get(path), kind(path)

    def _laid_out(self, path: str) -> str:
        found = self.layouts.get(path)
        return f"  {found}" if found is not None and self._methods.get(path) is not None and not found.plain else ""

    def __repr__(self) -> str:
        named = sum(m is not None for m in self._methods.values())
        return f"Plan({named} of {len(self)} leaves compressed)"

    def __str__(self) -> str:
        rows = [
            (p, "x".join(map(str, self.shapes.get(p, ()))), "dense" if m is None else repr(m)) for p, m in self.items()
        ]
        rows.insert(0, ("path", "shape", "method"))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}{self._laid_out(a)}" for a, b, c in rows]
        return "\n".join([*lines, *self.notes])


def _numbered(methods: Mapping[str, Method | None], first: int = 0) -> dict[str, int]:
    """A number for each path; paths of equal methods have the same."""
    kinds: list[Method | None] = []
    numbers = {}
    for path, method in methods.items():
        number = next((i for i, kind in enumerate(kinds) if core.same(method, kind)), len(kinds))
        kinds += [method] * (number == len(kinds))
        numbers[path] = first + number
    return numbers


def plan(params: PyTree, rules: Iterable[Rule], layout: Mapping[str, Layout] | None = None) -> Plan:
    """Decide what happens to each leaf: the first rule whose pattern matches the whole path wins.

    Args:
      params: the parameters, or their shapes as ``jax.eval_shape`` gives them.
      rules: ordered pairs of a regular expression, matched with ``re.fullmatch`` against paths such as
        ``block/0/kernel``, and a method, or ``None`` to keep a leaf dense. Leaves that no rule matches stay dense.
      layout: ``{path or pattern: Layout}``, what the axes of leaves are in the products that use them, as
        :func:`jcompress.trace.layout` reads it. The first pattern that matches counts. For others statistics say it,
        or they are (in, out) and (window..., in, out).

    Returns:
      A :class:`Plan`.

    Raises:
      ValueError: if a rule or a layout matches no leaf, a method cannot take a leaf that it is given, or a leaf is
        compressed already. The message names the path and the fix.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
      >>> print(jc.plan(params, [(".*/bias", None), (".*", jc.quantize.Int(bits=4))]))
      path          shape  method
      dense/bias    4      dense
      dense/kernel  8x4    Int(bits=4)
    """
    ordered = _checked(rules)
    found = paths(params)
    layouts = _layouts(found, layout or {})
    methods: dict[str, Method | None] = {}
    groups: dict[str, int] = {}
    matched, won = [0] * len(ordered), [0] * len(ordered)
    for path, leaf in found:
        _check_leaf(path, leaf)
        hits = [i for i, (pattern, _) in enumerate(ordered) if pattern.fullmatch(path)]
        for i in hits:
            matched[i] += 1
        methods[path], groups[path] = None, -1
        if hits:
            won[hits[0]] += 1
        if hits and not isinstance(leaf, core.Reference):  # its owner's method is its own
            methods[path], groups[path] = ordered[hits[0]][1], hits[0]
            _check_compressible(path, leaf, methods[path], layouts.get(path))
    known = [path for path, _ in found]
    for i, (pattern, _) in enumerate(ordered):
        if not matched[i]:
            raise ValueError(f"rule {i} {pattern.pattern!r} matches no parameter; {closest(pattern.pattern, known)}")
    notes = [
        f"rule {i} {p.pattern!r}: earlier rules took all of its leaves"
        for i, (p, _) in enumerate(ordered)
        if not won[i]
    ]
    notes += [f"{path}: stands for {x.owner}" for path, x in found if isinstance(x, core.Reference)]
    shapes = {path: jnp.shape(x) for path, x in found if not core.is_node(x)}
    shardings = {path: sharding for path, x in found if (sharding := _spread(x)) is not None}
    return Plan(methods, groups, shapes, notes, layouts, shardings)


def _spread(leaf: Any) -> Any:
    """The sharding of a leaf that is known to be on several devices."""
    sharding = None if isinstance(leaf, jax.core.Tracer) else getattr(leaf, "sharding", None)
    return sharding if len(getattr(sharding, "device_set", ())) > 1 else None


def _layouts(found: list[tuple[str, Any]], layout: Mapping[str, Layout]) -> dict[str, Layout]:
    """The layout of each leaf that one is given for."""
    if not isinstance(layout, Mapping) or not all(isinstance(x, Layout) for x in layout.values()):
        raise ValueError(
            f"found layout={layout!r}, expected a mapping of paths to layouts, such as "
            "jc.trace.layout(fn, params, *args) or {'.*/weight': jc.Layout(inputs=1, outputs=0)}"
        )
    known = dict(found)
    chosen: dict[str, Layout] = {}
    for pattern, value in layout.items():
        matched = [pattern] if pattern in known else [path for path in known if _pattern(pattern).fullmatch(path)]
        if not matched:
            raise ValueError(f"layout {pattern!r} matches no parameter; {closest(pattern, known)}")
        for path in matched:
            if path not in chosen:
                value.check(path, jnp.shape(known[path]))
                chosen[path] = value
    return chosen


def _checked(rules: Iterable[Rule]) -> list[tuple[re.Pattern, Method | None]]:
    """The rules, each known to be a pair of a regular expression and a method."""
    if isinstance(rules, (Mapping, str)) or not isinstance(rules, Iterable):
        hint = "; write list(rules.items())" if isinstance(rules, Mapping) else ""
        raise ValueError(f"found a {type(rules).__name__} for rules, expected ordered pairs [(pattern, method)]{hint}")
    checked = []
    for i, rule in enumerate(rules):
        if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not isinstance(rule[0], str):
            raise ValueError(
                f"rule {i}: found {rule!r}, expected a pair (pattern, method), such as ('.*/kernel', None)"
            )
        _check_method(f"rule {i} {rule[0]!r}", rule[1])
        checked.append((_pattern(rule[0]), rule[1]))
    return checked


def _check_method(name: str, method: Any) -> None:
    if isinstance(method, type):
        raise ValueError(
            f"{name}: found the class {method.__name__}, expected a method made of it; {method.__name__}(...)"
        )
    if method is not None and not callable(method):
        raise ValueError(
            f"{name}: found {method!r} of type {type(method).__name__}, expected a method, such as "
            "jc.prune.Magnitude(sparsity=0.5), or None to keep leaves dense"
        )


def _pattern(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from None


def _check_leaf(path: str, leaf: Any) -> None:
    """Raise for what no verb can carry: text, objects, and floats wider than JAX knows."""
    if core.is_node(leaf) or isinstance(leaf, (bool, int, float, complex)):
        return
    dtype = getattr(leaf, "dtype", None)
    if dtype is None or (
        isinstance(dtype, np.dtype) and ((dtype.kind in "OSUVMm" and not _is_narrow(dtype)) or dtype.char in "gG")
    ):
        found = f"a {type(leaf).__name__}" if dtype is None else f"dtype {dtype}"
        raise ValueError(
            f"{path}: found {found}, expected an array of numbers; take it out of the parameters"
            + ("" if dtype is None else ", or cast it")
        )


def _is_narrow(dtype: np.dtype) -> bool:
    """Whether it is one of the small floats and integers that NumPy itself does not know."""
    try:
        return jnp.dtype(dtype).itemsize > 0 and jax.dtypes.issubdtype(dtype, np.number)
    except TypeError:
        return False


def _check_compressible(path: str, leaf: Any, method: Method | None, layout: Layout | None) -> None:
    if method is None:
        return
    if core.is_node(leaf):
        raise ValueError(
            f"{path}: found a {type(leaf).__name__} node where an array was expected; materialize it first, or compose "
            "methods with jc.chain"
        )
    dtype = jnp.result_type(core.native(leaf))
    if not jnp.issubdtype(dtype, jnp.inexact):
        raise ValueError(
            f"{path}: found dtype {dtype}, expected a float array; keep it dense with a rule ({path!r}, None) before"
        )
    core.check_real(method, path, dtype)
    _check_fit(method, path, jnp.shape(leaf), dtype, layout)


def _check_fit(method: Method, path: str, shape: tuple[int, ...], dtype: Any, layout: Layout | None) -> None:
    """Raise if a method cannot take a leaf of this shape, as far as its layout is known when the plan is made."""
    if layout is not None:
        core.check_laid_out(method, path, layout, shape, dtype)
    elif not any(need.startswith("stats") for need in core.needs(method)):
        core.check(method, path, shape, dtype)
