"""Paths, and plans made from ordered rules."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Method, PyTree

Rule = tuple[str, Method | None]


def _key_name(key: Any) -> str:
    return jax.tree_util.keystr((key,), simple=True)


def _is_variable(x: Any) -> bool:
    """A Flax NNX variable: a box around one array, which paths should not show."""
    # Every version of Flax has the first; newer ones have `get_value`, older ones `raw_value`.
    return hasattr(type(x), "get_metadata") and (hasattr(type(x), "get_value") or hasattr(type(x), "raw_value"))


def paths(tree: PyTree, is_leaf: Callable[[Any], bool] | None = None) -> list[tuple[str, Any]]:
    """All leaves with their paths, such as ``block/0/kernel``; compressed nodes are leaves.

    Names are those of dictionary keys, sequence positions and fields. The ``value`` field of an NNX variable is
    left out, so the same rules serve linen dictionaries and NNX state.
    """
    boxed = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_variable)[0]
    boxes = {path for path, x in boxed if _is_variable(x)}

    def stop(x: Any) -> bool:
        return core.is_node(x) or (is_leaf is not None and is_leaf(x))

    found = []
    for path, leaf in jax.tree_util.tree_flatten_with_path(tree, is_leaf=stop)[0]:
        shown = path[:-1] if path[:-1] in boxes else path
        found.append(("/".join(map(_key_name, shown)), leaf))
    return found


class Plan(Mapping):
    """``{path: method}`` for the leaves of one tree of parameters; ``None`` keeps a leaf dense.

    A plan is a value: print it, look a path up, or change entries with :meth:`replace`. Leaves with the same
    group number fell under the same rule, and a method with a global scope decides for them together.
    """

    def __init__(
        self,
        methods: Mapping[str, Method | None],
        groups: Mapping[str, int] | None = None,
        shapes: Mapping[str, tuple[int, ...]] | None = None,
        notes: Sequence[str] = (),
    ) -> None:
        self._methods = dict(methods)
        self.groups = dict(groups) if groups is not None else dict.fromkeys(self._methods, 0)
        self.shapes = dict(shapes or {})
        self.notes = tuple(notes)

    def __getitem__(self, path: str) -> Method | None:
        return self._methods[path]

    def __iter__(self) -> Iterator[str]:
        return iter(self._methods)

    def __len__(self) -> int:
        return len(self._methods)

    def replace(self, changes: Mapping[str, Method | None]) -> Plan:
        """A plan with other methods at some paths.

        Leaves that get the same method object here form a group of their own.
        """
        for path in changes:
            if path not in self._methods:
                raise ValueError(f"{path}: not in the plan; {_closest(path, self._methods)}")
        groups, fresh = dict(self.groups), max(self.groups.values(), default=0) + 1
        numbers: dict[int, int] = {}
        for path, method in changes.items():
            if method is not None and path in self.shapes:
                core.check(method, path, self.shapes[path], jnp.float32)
            groups[path] = numbers.setdefault(id(method), fresh + len(numbers))
        return Plan({**self._methods, **changes}, groups, self.shapes, self.notes)

    def __repr__(self) -> str:
        named = sum(m is not None for m in self._methods.values())
        return f"Plan({named} of {len(self)} leaves compressed)"

    def __str__(self) -> str:
        rows = [
            (p, "x".join(map(str, self.shapes.get(p, ()))), "dense" if m is None else repr(m)) for p, m in self.items()
        ]
        rows.insert(0, ("path", "shape", "method"))
        widths = [max(len(row[i]) for row in rows) for i in range(2)]
        lines = [f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c}" for a, b, c in rows]
        return "\n".join([*lines, *self.notes])


def plan(params: PyTree, rules: Iterable[Rule]) -> Plan:
    """Decide what happens to each leaf: the first rule whose pattern matches the whole path wins.

    Args:
      params: the parameters, or their shapes as ``jax.eval_shape`` gives them.
      rules: ordered pairs of a regular expression, matched with ``re.fullmatch`` against paths such as
        ``block/0/kernel``, and a method, or ``None`` to keep a leaf dense. Leaves that no rule matches stay dense.

    Returns:
      A :class:`Plan`.

    Raises:
      ValueError: if a rule matches no leaf, a method cannot take a leaf that it is given, or a leaf is compressed
        already. The message names the path and the fix.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"dense": {"kernel": jnp.ones((8, 4)), "bias": jnp.ones(4)}}
      >>> print(jc.plan(params, [(".*/bias", None), (".*", jc.quantize.Int(bits=4))]))
      path          shape  method
      dense/bias    4      dense
      dense/kernel  8x4    Int(bits=4)
    """
    leaves = paths(params)
    compiled = [(_pattern(p), method) for p, method in rules]
    methods: dict[str, Method | None] = {}
    groups: dict[str, int] = {}
    matched, won = [0] * len(compiled), [0] * len(compiled)
    for path, leaf in leaves:
        hits = [i for i, (pattern, _) in enumerate(compiled) if pattern.fullmatch(path)]
        for i in hits:
            matched[i] += 1
        methods[path], groups[path] = None, -1
        if hits:
            won[hits[0]] += 1
            methods[path], groups[path] = compiled[hits[0]][1], hits[0]
            _check_leaf(path, leaf, methods[path])
    known = [path for path, _ in leaves]
    for i, (pattern, _) in enumerate(compiled):
        if not matched[i]:
            raise ValueError(f"rule {i} {pattern.pattern!r} matches no parameter; {_closest(pattern.pattern, known)}")
    notes = [
        f"rule {i} {compiled[i][0].pattern!r}: earlier rules took all of its leaves" for i, n in enumerate(won) if not n
    ]
    return Plan(methods, groups, {path: jnp.shape(x) for path, x in leaves if not core.is_node(x)}, notes)


def _pattern(pattern: str) -> re.Pattern:
    try:
        return re.compile(pattern)
    except re.error as error:
        raise ValueError(f"rule {pattern!r} is not a regular expression: {error}") from None


def _closest(name: str, known: Iterable[str]) -> str:
    known = list(known)
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3) or known[:3]
    return f"there are {len(known)} paths, such as {', '.join(map(repr, near))}" if known else "there are no parameters"


def _check_leaf(path: str, leaf: Any, method: Method | None) -> None:
    if method is None:
        return
    if core.is_node(leaf):
        raise ValueError(
            f"{path}: found a {type(leaf).__name__} node where an array was expected; materialize it first, or compose "
            "methods with jc.chain"
        )
    dtype = jnp.result_type(leaf)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(
            f"{path}: found dtype {dtype}, expected a float array; keep it dense with a rule ({path!r}, None) before"
        )
    core.check(method, path, jnp.shape(leaf), dtype)
