"""The one noun of the library, a compressed parameter, and the verbs that need to know nothing else.

A :class:`Compressed` node is a pytree that stands where one array stood. Inside a node, float leaves of 16 bits
or more are trainable; integers, booleans and 8- or 4-bit floats are held.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core.axes import Relaying
from jcompress.numeric import packing
from jcompress.numeric.meshes import on_any_mesh, typed_like
from jcompress.numeric.processes import spans, whole

PyTree = Any
_Node = TypeVar("_Node", bound="Compressed")


class Compressed:
    """A pytree node that stands where one array stood: the protocol of all formats.

    A format is a frozen dataclass registered with ``jax.tree_util.register_dataclass``. It says how to
    ``materialize`` and how to ``project``; where it narrows or skips what it stores, ``widths`` and ``support``
    say so, and its size, its file and its projection all follow from these two.

    A field may hold another node in place of an array, so nodes nest.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> node = jc.quantize.Int(bits=4)(jnp.ones((8, 2)))
      >>> isinstance(node, jc.Compressed), node.shape, node.nbits()
      (True, (8, 2), 128)
    """

    elementwise: ClassVar[tuple[str, ...]] = ()
    """Fields laid out like the dense array: a mask around this node stores their kept entries only."""
    linear: ClassVar[bool] = True
    """Whether ``project`` costs linear time, so that an optimizer step can afford it."""
    exact: ClassVar[bool] = True
    """Whether ``project`` leaves an array where it is that the held leaves can stand for."""

    def __init_subclass__(cls) -> None:
        for name, like in (("materialize", _made_of), ("project", _target), ("finalize", None), ("support", None)):
            if name in vars(cls):
                setattr(cls, name, on_any_mesh(vars(cls)[name], like))

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

    @classmethod
    def project_together(
        cls, nodes: Sequence[Any], ws: Sequence[jax.Array], wheres: Sequence[jax.Array | None]
    ) -> list[Any]:
        """:meth:`project` of nodes of this format, parts of which one of them owns for all; by default each alone."""
        return [node.project(w, where) for node, w, where in zip(nodes, ws, wheres, strict=True)]

    def shown(self, name: str, where: Any) -> Any:
        """Which entries of a field are stored where a mask around the node shows ``where``; None for all."""
        return where if name in self.elementwise else None

    def seen(self, w: jax.Array) -> Any:
        """The array, or shapes of it in other orders of axes, that fields are sharded like on explicit mesh axes."""
        return w

    def made_of(self) -> list[Any]:
        """What the dense array is sharded like on explicit mesh axes: its fields, and nodes as what they stand for."""
        fields = [getattr(self, f.name) for f in dataclasses.fields(self)]  # type: ignore[arg-type]  # as below
        leaves = [x for x in jax.tree.leaves(fields, is_leaf=is_node) if is_node(x) or isinstance(x, jax.Array)]
        return [typed_like(x._dense, x.made_of()) if is_node(x) else x for x in leaves]

    def finalize(self) -> Compressed:
        """The form that is stored: what exists only for training is resolved."""
        return self

    def opened(self) -> Compressed:
        """The node as methods and products know it: what only holds it in less memory is taken off."""
        return self

    def relaid(self: _Node, relaying: Relaying, /) -> _Node | None:
        """The node for an array whose axes are laid out anew; None if it has no such form and is to be wrapped."""
        return None

    def support(self) -> dict[str, jax.Array]:
        """For a field whose entries do not all matter: where they do. The rest is neither read nor stored."""
        return {}

    def widths(self) -> dict[str, int]:
        """For a field stored in fewer bits an element than its dtype has: how many."""
        return {}

    def trellises(self) -> dict[str, int]:
        """For a field whose codes follow a trellis along the last axis: how many states that has."""
        return {}

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the dense array."""
        return self._dense.shape

    @property
    def dtype(self) -> Any:
        """The dtype of the dense array."""
        return self._dense.dtype

    @property
    def ndim(self) -> int:
        """The number of axes of the dense array."""
        return len(self.shape)

    @property
    def size(self) -> int:
        """The number of elements of the dense array."""
        return math.prod(self.shape)

    @property
    def _dense(self) -> jax.ShapeDtypeStruct:
        """What the dense array is, from shapes alone."""
        try:
            return jax.eval_shape(type(self).materialize, self)
        except Exception as error:  # half of a node, which misses leaves, has neither shape nor dtype
            raise AttributeError(f"{self!r} stands for no array: {error}") from None

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """The dense values, for NumPy."""
        return np.asarray(self.materialize(), dtype)

    def __jax_array__(self) -> jax.Array:
        """The dense values, for ``jnp.asarray`` and the other functions of ``jax.numpy``."""
        return self.materialize()

    def nbits(self) -> int:
        """The exact number of bits stored. Reads the values of masks, so it works outside ``jit`` only."""
        return sum(part.nbits for part in parts(self))

    def __repr__(self) -> str:
        fields = dataclasses.fields(self)  # type: ignore[arg-type]  # every format is a dataclass
        values = [(f, getattr(self, f.name)) for f in fields]
        told = [(f, x) for f, x in values if x is not None and not (f.metadata.get("static") and x == f.default)]
        shown = [f"{f.name}={_short(x)}" for f, x in told]
        return f"{type(self).__name__}({', '.join(shown)})"


def _target(node: Any, w: jax.Array, where: Any = None) -> Any:
    """What a projection is sharded like."""
    return node.seen(w)


def _made_of(node: Any, **_: Any) -> list[Any]:
    return node.made_of()


def _short(x: Any) -> str:
    if isinstance(x, (Compressed, type(None), str)):
        return repr(x)
    if hasattr(x, "dtype") and hasattr(x, "shape"):
        return f"{jnp.dtype(x.dtype).name}[{','.join(map(str, x.shape))}]"
    if isinstance(x, tuple):
        return f"({', '.join(map(_short, x))})"
    return str(x)


def is_concrete(x: Any) -> bool:
    """Whether the value of ``x`` can be read now, outside ``jit`` and abstract evaluation."""
    return not isinstance(x, (jax.core.Tracer, jax.ShapeDtypeStruct))


def is_node(x: Any) -> bool:
    """Whether ``x`` is a compressed parameter."""
    return isinstance(x, Compressed)


def dense(x: Any, *, key: jax.Array | None = None) -> Any:
    """The array that ``x`` stands for, where ``x`` is a node or already an array."""
    return x.materialize(key=key) if is_node(x) else x


def refitted(field: Any, w: jax.Array, where: jax.Array | None = None) -> Any:
    """A field of a node for another array: that array, or the node that stands there projected onto it."""
    return field.project(w, where) if is_node(field) else w


def finalized(tree: PyTree) -> PyTree:
    """See :func:`jcompress.finalize`: of a tree without references."""

    def inner(x: Any) -> Any:
        if not is_node(x):
            return x
        x = x.opened()
        fields = {f.name: getattr(x, f.name) for f in dataclasses.fields(x)}
        return dataclasses.replace(x, **{k: finalized(v) for k, v in fields.items() if _has_node(v)}).finalize()

    return jax.tree.map(inner, tree, is_leaf=is_node)


def _has_node(x: Any) -> bool:
    return any(is_node(y) for y in jax.tree.leaves(x, is_leaf=is_node))


def opened(tree: PyTree) -> PyTree:
    """The tree with packed nodes as they were, as :func:`jcompress.unpack` says."""
    return jax.tree.map(lambda x: x.opened() if is_node(x) else x, tree, is_leaf=is_node)


def native(x: Any) -> Any:
    """An array as JAX can read it: NumPy's in this machine's byte order, all else as it is."""
    return x.astype(x.dtype.newbyteorder("=")) if isinstance(x, np.ndarray) and not x.dtype.isnative else x


def widened(x: jax.Array) -> jax.Array:
    """Floats of 8 and 4 bits, which no product takes, as bfloat16, which holds them exactly; all else as it is."""
    narrow = jnp.issubdtype(x.dtype, jnp.floating) and dtype_bits(x.dtype) < 16
    return x.astype(jnp.bfloat16) if narrow else x


def is_trainable(x: Any) -> bool:
    """The one rule: floats of 16 bits or more train; integers, booleans, keys and 8- or 4-bit floats are held."""
    dtype = jnp.result_type(native(x))
    return bool(jnp.issubdtype(dtype, jnp.inexact)) and dtype.itemsize >= 2


def split(tree: PyTree) -> tuple[PyTree, PyTree]:
    """Separate the leaves an optimizer may touch from the rest.

    Args:
      tree: any pytree of arrays and nodes.

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

    Args:
      train: the leaves that train, or others of their structure, such as updated ones.
      held: the rest.

    Returns:
      The tree that was split.

    Raises:
      ValueError: if the two trees are not halves of one.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> train, held = jc.split({"w": jc.quantize.Int(bits=8)(jnp.ones((4, 4)))})
      >>> jc.merge(train, held)["w"]
      Quantized(codes=int8[4,4], scale=float32[1,4], bits=8)
    """

    def either(path: Any, t: Any, h: Any) -> Any:
        if t is not None and h is not None:
            raise ValueError(f"{jax.tree_util.keystr(path, simple=True, separator='/')}: both halves hold a leaf")
        return h if t is None else t

    try:
        return jax.tree_util.tree_map_with_path(either, train, held, is_leaf=lambda x: x is None)
    except ValueError as error:
        raise ValueError(f"merge needs the two halves that one split gave, and found others: {error}") from None


@dataclasses.dataclass(frozen=True)
class Part:
    """One array as it is stored: which of its entries, and in how many bits each.

    Attributes:
      name: the fields that lead to the array inside its node, joined by ``/``.
      array: the array, on its device still.
      width: bits an element.
      where: the entries stored, or ``None`` for all. A mask that spans processes stays where it is.
      code: for a boolean array, how it is coded; then ``width`` is that of the code.
      states: of the trellis that codes follow along the last axis; 0 for none.
    """

    name: str
    array: Any
    width: int
    where: Any = None
    code: packing.MaskCode | None = None
    states: int = 0

    @functools.cached_property
    def nbits(self) -> int:
        """The exact number of bits."""
        if self.code is not None:
            return self.code.nbits
        if isinstance(self.where, packing.Expected):
            return self.width * self.where.count(int(self.array.size))
        return self.width * (int(self.array.size) if self.where is None else _count(self.where))


def _count(where: Any) -> int:
    """How many entries a mask shows. Rows are counted where they are, if the mask spans processes."""
    rows = jnp.sum(where, axis=-1, dtype=jnp.uint32) if spans(where) and where.ndim else where
    return int(whole(rows).sum(dtype=np.int64))


def dtype_bits(dtype: Any) -> int:
    """Bits that a number of this dtype takes where it is stored: 4 for int4, though memory spends 8."""
    dtype = jnp.dtype(dtype)
    dtype = dtype if dtype.isnative else dtype.newbyteorder("=")
    if dtype == jnp.bool_:
        return 1
    if jnp.issubdtype(dtype, jnp.floating):
        return int(jnp.finfo(dtype).bits)
    return int(jnp.iinfo(dtype).bits) if jnp.issubdtype(dtype, jnp.integer) else 8 * dtype.itemsize


def parts(node: Compressed, where: np.ndarray | None = None, prefix: str = "", *, coded: bool = True) -> Iterator[Part]:
    """The arrays of a node as they are stored, nested nodes in place; masks are given a code, or not, for speed."""
    abstract = any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(node))
    support = jax.eval_shape(lambda node: node.support(), node) if abstract else node.support()
    widths, trellises = node.widths(), node.trellises()
    for field in dataclasses.fields(node):  # type: ignore[arg-type]  # every format is a dataclass
        x, name = getattr(node, field.name), prefix + field.name
        if field.metadata.get("static") or x is None:
            continue
        inner = node.shown(field.name, where)
        if field.name in support:
            inner = _both(node, support[field.name], inner)
        for suffix, y in _entries(x):
            known = getattr(node, "expected", packing.Expected())
            for part in _parts(y, name + suffix, inner, widths.get(field.name), coded, known):
                yield dataclasses.replace(part, states=trellises.get(field.name, part.states))


def _entries(x: Any) -> list[tuple[str, Any]]:
    return [(f"/{i}", y) for i, y in enumerate(x)] if isinstance(x, tuple) else [("", x)]


def _both(node: Compressed, mask: Any, where: Any) -> Any:
    """Where both masks keep. Of masks without values the one that keeps less counts."""
    if not isinstance(mask, jax.ShapeDtypeStruct):
        mask = mask if spans(mask) else np.asarray(mask)
        return mask if where is None else mask & where
    found = [getattr(node, "expected", packing.Expected()), where]
    known = [x for x in found if isinstance(x, packing.Expected) and x.density is not None]
    return min(known, key=lambda x: x.density or 0.0, default=packing.Expected())


def _parts(x: Any, name: str, where: Any, width: int | None, coded: bool, expected: packing.Expected) -> Iterator[Part]:
    if is_node(x):
        yield from parts(x, where, name + "/", coded=coded)
        return
    x = _without_key_type(x)
    if where is not None and not isinstance(where, packing.Expected):
        where = where if where.shape == x.shape else np.broadcast_to(whole(where), x.shape)
    if isinstance(x, jax.ShapeDtypeStruct) and x.dtype == jnp.bool_ and where is None:
        yield Part(name, x, 1, code=packing.MaskCode("bits", x.shape, expected.nbits(x.shape)))
    elif coded and x.dtype == jnp.bool_ and where is None:
        code = packing.mask_code(whole(x))
        yield Part(name, x, packing.mask_count(code)[1], code=code)
    else:
        yield Part(name, x, width or dtype_bits(x.dtype), where)


def nbits(tree: PyTree) -> int:
    """The exact number of bits of a tree of nodes, arrays and shapes, as :func:`jcompress.nbits` says."""
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
