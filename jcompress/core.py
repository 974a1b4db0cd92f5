"""The one noun of the library, a compressed parameter, and the verbs that need to know nothing else.

A :class:`Compressed` node is a pytree that stands where one array stood. Inside a node, float leaves of 16 bits
or more are trainable; integers, booleans and 8- or 4-bit floats are held.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar, Protocol, TypeVar, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.numeric import packing

PyTree = Any
Schedule = Callable[[Any], Any]
_Node = TypeVar("_Node", bound="Compressed")


class Compressed:
    """A pytree node that stands where one array stood: the protocol of all formats.

    A format is a frozen dataclass registered with ``jax.tree_util.register_dataclass``. It says how to
    ``materialize`` and how to ``project``; where it narrows or skips what it stores, ``widths`` and ``support``
    say so, and its size, its file and its projection all follow from these two.

    A field may hold another node in place of an array, so nodes nest.
    """

    elementwise: ClassVar[tuple[str, ...]] = ()
    """Fields laid out like the dense array: a mask around this node stores their kept entries only."""
    linear: ClassVar[bool] = True
    """Whether ``project`` costs linear time, so that an optimizer step can afford it."""

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        """The dense array this node stands for, differentiable in its trainable leaves."""
        raise NotImplementedError

    def project(self: _Node, w: jax.Array, where: jax.Array | None = None) -> _Node:
        """The same node with its trainable leaves refitted to ``w``, its held leaves fixed.

        Args:
          w: the array to approximate in least squares, of the shape that ``materialize`` gives.
          where: entries that count; the others may take any value. All of them by default.

        Old trainable leaves are never read, so they may be ``None``.
        """
        raise NotImplementedError

    def finalize(self) -> Compressed:
        """The form that is stored: what exists only for training is resolved."""
        return self

    def support(self) -> dict[str, jax.Array]:
        """For a field whose entries do not all matter: where they do. The rest is neither read nor stored."""
        return {}

    def widths(self) -> dict[str, int]:
        """For a field stored in fewer bits an element than its dtype has: how many."""
        return {}

    def nbits(self) -> int:
        """The exact number of bits stored. Reads the values of masks, so it works outside ``jit`` only."""
        return sum(part.nbits for part in parts(self))

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every format is a dataclass
        values = [(f, getattr(self, f.name)) for f in fields]
        told = [(f, x) for f, x in values if x is not None and not (f.metadata.get("static") and x == f.default)]
        shown = [f"{f.name}={_short(x)}" for f, x in told]
        return f"{type(self).__name__}({', '.join(shown)})"


def _short(x: Any) -> str:
    if isinstance(x, (Compressed, type(None), str)):
        return repr(x)
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{jnp.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"
    if isinstance(x, tuple):
        return f"({', '.join(map(_short, x))})"
    return str(x)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Context:
    """What may be known about a leaf when a method is fitted to it.

    Attributes:
      step: the training step, for hyperparameters that are schedules.
      key: a PRNG key of this leaf's own.
      stats: what ``calibrate`` gathered for this leaf.
      grad: the gradient of this leaf.
      previous: the node that was fitted last time.
      where: entries of the array that matter, when a mask stands around it.
      path: the path of the leaf, for error messages.
    """

    step: Any = 0
    key: Any = None
    stats: Any = None
    grad: Any = None
    previous: Any = None
    where: Any = None
    path: str = dataclasses.field(default="array", metadata={"static": True})


@runtime_checkable
class Method(Protocol):
    """A frozen dataclass of hyperparameters, called with an array and its context, that gives a node.

    Three things are optional. ``needs`` names what must be in the context (``"key"``, ``"grad"``,
    ``"stats.gram"``). ``check(path, shape, dtype)`` raises for a leaf that the method cannot take, when the plan
    is made. ``joint`` is True if the method decides for all leaves of a rule at once; then
    ``fit(arrays, contexts)`` gives a list of nodes.
    """

    def __call__(self, w: jax.Array, context: Context = ..., /) -> Any:
        """The node for one array."""
        ...


def fit(method: Method, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Any]:
    """Apply a method to the leaves of one rule: together if it decides for all at once, else one by one."""
    for context in contexts:
        for need in getattr(method, "needs", ()):
            _require(method, need, context)
    if is_joint(method):
        return method.fit(arrays, contexts)  # type: ignore[attr-defined]  # joint methods have it
    return [method(w, context) for w, context in zip(arrays, contexts, strict=True)]


@dataclasses.dataclass(frozen=True)
class _Label:
    """A path for error messages. All are equal, so leaves of one shape are traced once."""

    path: str = dataclasses.field(compare=False)


def compiled(call: Callable[[Any, jax.Array, Context], Any]) -> Callable[..., Any]:
    """A method's ``__call__`` under ``jit``: compiled once for all leaves of one shape, the method a constant of it.

    A method with a hyperparameter that has no hash, an array for one, is called as it is.
    """

    @functools.partial(jax.jit, static_argnums=(0, 1))
    def traced(method: Any, label: _Label, w: jax.Array, context: Context) -> Any:
        return call(method, w, dataclasses.replace(context, path=label.path))

    @functools.wraps(call)
    def method_call(self: Any, w: jax.Array, context: Context = Context(), /) -> Any:
        try:
            hash(self)
        except TypeError:
            return call(self, w, context)
        return traced(self, _Label(context.path), w, dataclasses.replace(context, path=""))

    return method_call


_HINTS = {
    "key": "pass key=jax.random.key(...)",
    "grad": "pass grads= to the optimizer's update",
    "stats": "pass stats=jc.calibrate(fn, params, batches, plan=plan)",
}


def _require(method: Method, need: str, context: Context) -> None:
    first, *rest = need.split(".")
    found = getattr(context, first)
    for name in rest:
        found = None if found is None else getattr(found, name, None)
    if found is None:
        raise ValueError(f"{context.path}: {type(method).__name__} needs {need!r}, which is missing; {_HINTS[first]}")


def method_repr(method: Any) -> str:
    """The name of a method, its first hyperparameter, and the others that differ from the defaults."""
    fields = [f for f in dataclasses.fields(method) if f.repr]
    shown = [f for i, f in enumerate(fields) if _differs(getattr(method, f.name), None if i == 0 else f.default)]
    return f"{type(method).__name__}({', '.join(f'{f.name}={_shown(getattr(method, f.name))}' for f in shown)})"


def _differs(value: Any, default: Any) -> bool:
    return value is not default and (not is_concrete(value) or np.ndim(value) > 0 or value != default)


def _shown(hyperparameter: Any) -> str:
    if callable(hyperparameter) and not dataclasses.is_dataclass(hyperparameter):
        return "<schedule>"
    return repr(hyperparameter)


def is_joint(method: Method) -> bool:
    """Whether ``method`` decides for all leaves of a rule at once."""
    return bool(getattr(method, "joint", False))


def needs(*methods: Method) -> tuple[str, ...]:
    """All that the methods need in the context."""
    return tuple(dict.fromkeys(need for method in methods for need in getattr(method, "needs", ())))


def check(method: Method, path: str, shape: tuple[int, ...], dtype: Any) -> None:
    """Raise if ``method`` cannot take an array of this shape and dtype."""
    if hasattr(method, "check"):
        method.check(path, shape, dtype)


def value_at(hyperparameter: Any, step: Any) -> Any:
    """A hyperparameter's value: schedules are called with the step, everything else is returned."""
    return hyperparameter(step) if callable(hyperparameter) else hyperparameter


def is_concrete(x: Any) -> bool:
    """Whether the value of ``x`` can be read now, outside ``jit`` and abstract evaluation."""
    return not isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct))


def is_node(x: Any) -> bool:
    """Whether ``x`` is a compressed parameter."""
    return isinstance(x, Compressed)


def dense(x: Any, *, key: jax.Array | None = None) -> Any:
    """The array that ``x`` stands for, where ``x`` is a node or already an array."""
    return x.materialize(key=key) if is_node(x) else x


def materialize(tree: PyTree, key: jax.Array | None = None) -> PyTree:
    """Replace every node by the dense array it stands for, nested nodes innermost first.

    Args:
      tree: any pytree; leaves that are not nodes are returned as they are.
      key: for nodes that sample. Each node gets a key of its own; without one, a node gives its mean or
        test-time value.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.array([[1.0, -3.0], [0.5, 2.0]])
      >>> plan = jc.plan({"w": w}, [("w", jc.prune.Magnitude(sparsity=0.5))])
      >>> jc.materialize(jc.compress({"w": w}, plan))["w"].tolist()
      [[0.0, -3.0], [0.0, 2.0]]
    """
    leaves, treedef = jax.tree.flatten(tree, is_leaf=is_node)
    keys = [None] * len(leaves) if key is None else [jax.random.fold_in(key, i) for i in range(len(leaves))]
    return jax.tree.unflatten(treedef, [dense(x, key=k) for x, k in zip(leaves, keys, strict=True)])


def finalize(tree: PyTree) -> PyTree:
    """Turn training forms into storage forms, innermost first; storage forms stay as they are."""

    def inner(x: Any) -> Any:
        if not is_node(x):
            return x
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return dataclasses.replace(x, **{k: finalize(v) for k, v in fields.items() if _has_node(v)}).finalize()

    return jax.tree.map(inner, tree, is_leaf=is_node)


def _has_node(x: Any) -> bool:
    return any(is_node(y) for y in jax.tree.leaves(x, is_leaf=is_node))


def is_trainable(x: Any) -> bool:
    """The one rule: floats of 16 bits or more train; integers, booleans, keys and 8- or 4-bit floats are held."""
    dtype = jnp.result_type(x)
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and dtype.itemsize >= 2


def split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Separate the leaves an optimizer may touch from the rest.

    Returns:
      ``(train, held)``: two trees of the structure of ``tree``, with ``None`` where the other has a leaf.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jnp.ones((4, 4))}
      >>> small = jc.compress(w, jc.plan(w, [("w", jc.quantize.Int(bits=8))]))
      >>> train, held = jc.split(small)
      >>> train["w"]
      Quantized(scale=float32[1,4], bits=8)
      >>> bool((jc.materialize(jc.merge(train, held))["w"] == w["w"]).all())
      True
    """
    train = jax.tree.map(lambda x: x if is_trainable(x) else None, tree)
    held = jax.tree.map(lambda x: None if is_trainable(x) else x, tree)
    return train, held


def merge(train: PyTree, held: PyTree) -> PyTree:
    """Put together again what :func:`split` separated.

    Raises:
      ValueError: if the two trees are not halves of one.
    """
    try:
        return jax.tree.map(lambda t, h: h if t is None else t, train, held, is_leaf=lambda x: x is None)
    except ValueError as error:
        raise ValueError(f"merge needs the two halves that one split gave, and these differ: {error}") from None


@dataclasses.dataclass(frozen=True)
class Part:
    """One array as it is stored: which of its entries, and in how many bits each.

    Attributes:
      name: the fields that lead to the array inside its node, joined by ``/``.
      array: the array, on its device still.
      width: bits an element.
      where: the entries stored, or ``None`` for all.
      code: for a boolean array, how it is coded; then ``width`` is that of the code.
    """

    name: str
    array: Any
    width: int
    where: np.ndarray | None = None
    code: packing.MaskCode | None = None

    @property
    def nbits(self) -> int:
        """The exact number of bits."""
        if self.code is not None:
            return self.code.nbits
        return self.width * (int(self.array.size) if self.where is None else int(self.where.sum()))


def dtype_bits(dtype: Any) -> int:
    """Bits that a number of this dtype takes where it is stored: 4 for int4, though memory spends 8."""
    dtype = jnp.dtype(dtype)
    if dtype == jnp.bool_:
        return 1
    if jnp.issubdtype(dtype, jnp.floating):
        return int(jnp.finfo(dtype).bits)
    return int(jnp.iinfo(dtype).bits) if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def parts(node: Compressed, where: np.ndarray | None = None, prefix: str = "") -> Iterator[Part]:
    """The arrays of a node as they are stored, nested nodes in place."""
    support, widths = node.support(), node.widths()
    for field in dataclasses.fields(node):  # type: ignore[arg-type]  # every format is a dataclass
        x, name = getattr(node, field.name), prefix + field.name
        if field.metadata.get("static") or x is None:
            continue
        inner = where if field.name in node.elementwise else None
        if field.name in support:
            mask = np.asarray(support[field.name])
            inner = mask if inner is None else mask & inner
        for suffix, y in _entries(x):
            yield from _parts(y, name + suffix, inner, widths.get(field.name))


def _entries(x: Any) -> list[tuple[str, Any]]:
    return [(f"/{i}", y) for i, y in enumerate(x)] if isinstance(x, tuple) else [("", x)]


def _parts(x: Any, name: str, where: np.ndarray | None, width: int | None) -> Iterator[Part]:
    if is_node(x):
        yield from parts(x, where, name + "/")
        return
    x = _without_key_type(x)
    if where is not None:
        where = np.broadcast_to(where, x.shape)
    if jnp.result_type(x) == jnp.bool_ and where is None:
        code = packing.mask_code(np.asarray(x))
        yield Part(name, x, packing.mask_count(code)[1], code=code)
    else:
        yield Part(name, x, width or dtype_bits(x.dtype), where)


def nbits(tree: PyTree) -> int:
    """The exact number of bits that ``tree`` takes when it is saved: nodes as they say, arrays by their dtype.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = {"w": jnp.ones((64, 32))}
      >>> jc.nbits(w), jc.nbits(jc.compress(w, jc.plan(w, [("w", jc.quantize.Int(bits=4))])))
      (65536, 9216)
    """
    return sum(leaf_nbits(x) for x in jax.tree.leaves(tree, is_leaf=is_node))


def leaf_nbits(x: Any) -> int:
    """The exact number of stored bits of one node or one array; Python scalars stand in the manifest, for nothing."""
    if is_node(x):
        return x.nbits()
    if isinstance(x, (bool, int, float, complex, str)):
        return 0
    x = _without_key_type(x)
    return int(x.size) * dtype_bits(x.dtype)


def _without_key_type(x: Any) -> Any:
    """PRNG keys as the integers they are stored as."""
    return jax.random.key_data(x) if jnp.issubdtype(x.dtype, jax.dtypes.prng_key) else x
