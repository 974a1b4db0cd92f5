"""New methods from old ones."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed, Context, Method
from jcompress.formats import Cartesian, Sum
from jcompress.numeric import scaling


@dataclasses.dataclass(frozen=True)
class Chain(Method):
    """See :func:`chain`."""

    first: Method
    then: Method

    wraps: ClassVar[tuple[str, ...]] = ("first", "then")

    @property
    def takes_complex(self) -> bool:  # type: ignore[override]  # it depends on the first part
        """Whether the first part does; the second sees what the first made of the leaf."""
        return core.takes_complex(self.first)

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the first part cannot take the leaf; the second sees what the first made of it."""
        core.check(self.first, path, shape, dtype)

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Any]:
        """One node for each array of the rule."""
        nodes = core.fit(self.first, arrays, contexts)
        found = [list(_trainable(node, context)) for node, context in zip(nodes, contexts, strict=True)]
        leaves = [pair for row in found for pair in row]
        if not leaves:
            return nodes
        inner = core.fit(self.then, [x for x, _ in leaves], [c for _, c in leaves])
        fitted = iter([core.tagged(node, "then") for node in inner])
        return [_with_trainable(node, fitted) for node in nodes]

    def __repr__(self) -> str:
        return f"chain({', '.join(map(repr, _flat(self)))})"


def chain(*methods: Method) -> Method:
    """Compress by the first method, then the trainable leaves of its result by the next, and so on.

    Nodes nest: ``chain(Magnitude(0.9), KMeans(16))`` gives a mask around a codebook, fitted to the kept weights and
    stored for them only; ``chain(SVD(8), Int(8))`` gives factors in 8 bits. The order matters: codes do not train, so
    ``chain(Int(8), Magnitude(0.5))`` would prune scales, whole outputs at once, where ``chain(Magnitude(0.5), Int(8))``
    prunes weights.

    Args:
      *methods: at least one.

    Returns:
      A method.

    Raises:
      ValueError: without a method.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> method = jc.chain(jc.prune.Magnitude(sparsity=0.5), jc.quantize.Int(bits=4))
      >>> method(jnp.ones((8, 4)))
      Masked(values=Quantized(codes=int8[8,4], scale=float32[1,4], bits=4), mask=bool[8,4])
    """
    if not methods:
        raise ValueError("chain needs at least one method")
    *rest, last = methods
    for method in reversed(rest):
        last = Chain(method, last)
    return last


def _flat(method: Any) -> list[Any]:
    return [method.first, *_flat(method.then)] if isinstance(method, Chain) else [method]


def _fields(node: Compressed) -> list[tuple[str, Any]]:
    fields = dataclasses.fields(node)  # type: ignore[arg-type]  # every format is a dataclass
    return [(f.name, getattr(node, f.name)) for f in fields if not f.metadata.get("static")]


def _trainable(node: Any, context: Context) -> Iterator[tuple[jax.Array, Context]]:
    """The trainable leaves of a node, each with what is known about it."""
    if not core.is_node(node):
        if node is not None and core.is_trainable(node):
            yield node, context
        return
    support = node.support()
    for i, (name, x) in enumerate(_fields(node)):
        alike = name in node.elementwise
        where = context.where if alike else None
        if name in support:
            where = support[name] if where is None else support[name] & where
        inner = Context(
            step=context.step,
            key=None if context.key is None else jax.random.fold_in(context.key, i),
            stats=context.stats if alike else None,
            grad=context.grad if alike else None,
            where=where,
            path=f"{context.path}/{name}",
            batch=context.batch if alike else 0,
        )
        for entry in x if isinstance(x, tuple) else (x,):
            yield from _trainable(entry, inner)


def _with_trainable(node: Any, leaves: Iterator[Any]) -> Any:
    """The node with its trainable leaves replaced, in the order of :func:`_trainable`."""
    if isinstance(node, tuple):
        return tuple(_with_trainable(x, leaves) for x in node)
    if not core.is_node(node):
        return next(leaves) if node is not None and core.is_trainable(node) else node
    return dataclasses.replace(node, **{name: _with_trainable(x, leaves) for name, x in _fields(node)})


@dataclasses.dataclass(frozen=True)
class Residual(Method):
    """See :func:`residual`."""

    methods: tuple[Method, ...]
    sweeps: int = 1

    wraps: ClassVar[tuple[str, ...]] = ("methods",)

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Sum]:
        """One node for each array of the rule."""
        arrays = list(map(core.widened, arrays))
        rest, terms = arrays, []
        for i, method in enumerate(self.methods):
            nodes = [core.tagged(node, i) for node in core.fit(method, rest, _of_term(contexts, i, i))]
            rest = [w - core.dense(node) for w, node in zip(rest, nodes, strict=True)]
            terms.append(nodes)
        for sweep in range(1, self.sweeps):
            for i, method in enumerate(self.methods):
                terms[i] = _nearer(method, arrays, contexts, terms, i, sweep)
        return [Sum(tuple(column)) for column in zip(*terms, strict=True)]

    def __repr__(self) -> str:
        sweeps = f", sweeps={self.sweeps}" if self.sweeps > 1 else ""
        return f"residual({', '.join(map(repr, self.methods))}{sweeps})"


def _of_term(contexts: Sequence[Context], i: int, draw: int) -> list[Context]:
    """What is known of the arrays of a term: a key of its own for each time it is fitted, and what it was before."""
    return [
        dataclasses.replace(
            c,
            key=None if c.key is None else jax.random.fold_in(c.key, draw),
            previous=c.previous.terms[i] if isinstance(c.previous, Sum) and i < len(c.previous.terms) else None,
        )
        for c in contexts
    ]


def _nearer(
    method: Method, arrays: Sequence[jax.Array], contexts: Sequence[Context], terms: list[list[Any]], i: int, sweep: int
) -> list[Any]:
    """The nodes of one term fitted anew to what all others leave, where that takes the sum nearer to the arrays."""
    others = [[core.dense(node) for node in column] for j, column in enumerate(terms) if j != i]
    rest = [w - sum(column) for w, column in zip(arrays, zip(*others, strict=True), strict=True)]
    found = [core.tagged(x, i) for x in core.fit(method, rest, _of_term(contexts, i, sweep * len(terms) + i))]
    return [_better(w, old, new) for w, old, new in zip(rest, terms[i], found, strict=True)]


def _better(w: jax.Array, old: Any, new: Any) -> Any:
    unit = scaling.unit([w])
    before, after = (jnp.sum(jnp.square(jnp.abs(unit.divide(w - core.dense(node))))) for node in (old, new))
    nearer = after < before
    if core.is_concrete(nearer):
        return new if bool(nearer) else old
    return jax.tree.map(lambda a, b: jnp.where(nearer, b, a), old, new)


def residual(*methods: Method, sweeps: int = 1) -> Method:
    """Fit each method to what the ones before it left over; the result is the sum.

    ``residual(Magnitude(0.99), Int(4))`` keeps outliers apart, ``residual(Int(4), SVD(8))`` corrects a quantized
    matrix by one of low rank, ``residual(SVD(8), Magnitude(0.95))`` is low rank + sparse.

    Args:
      *methods: at least two.
      sweeps: how often each is fitted: from the second time on to what all others leave, and kept where the squared
        error of the sum is less than before, so it is never more than after one pass.

    Returns:
      A method.

    Raises:
      ValueError: for fewer than two methods, or fewer than one sweep.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.ones((4, 4)).at[1, 2].set(100.0)
      >>> method = jc.residual(jc.prune.Magnitude(sparsity=15 / 16), jc.quantize.Int(bits=2))
      >>> bool((method(w).materialize() == w).all())
      True
    """
    if len(methods) < 2:
        raise ValueError("residual needs at least two methods")
    if sweeps < 1:
        raise ValueError(f"residual: sweeps={sweeps} must be at least 1")
    return Residual(methods, sweeps)


@dataclasses.dataclass(frozen=True)
class Stacked(Method):
    """See :func:`stacked`."""

    method: Method

    wraps: ClassVar[tuple[str, ...]] = ("method",)
    whole: ClassVar[bool] = True

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the leaf has no leading axis or the method cannot take one layer."""
        if not shape:
            raise ValueError(f"{path}: stacked needs a leading axis of layers, found a scalar; keep it dense")
        core.check(self.method, path, shape[1:], dtype)

    def unit(self, shape: tuple[int, ...]) -> int:
        """How many weights the sparsity of a leaf can change by: as many in each layer."""
        return shape[0] * core.unit(self.method, shape[1:])

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Any]:
        """One node for each array of the rule, its leaves stacked like the layers."""
        return core.over_layers(self.method, arrays, contexts)

    def __repr__(self) -> str:
        return f"stacked({self.method!r})"


def stacked(method: Method) -> Method:
    """Treat the leading axis as separate layers, as where layers are stacked for ``jax.lax.scan``.

    Each layer gets its own threshold, scale, codebook or factors, and the leaves of the node are stacked alike, so
    a slice of the node inside ``scan`` is the node of that layer.

    Args:
      method: any method. If it decides for several leaves at once, it does so layer by layer.

    Returns:
      A method.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.stack([jnp.ones((2, 2)), 100 * jnp.ones((2, 2))])
      >>> jc.stacked(jc.quantize.Int(bits=8, axis=None))(w).scale.shape
      (2, 1, 1)
    """
    return Stacked(method)


@dataclasses.dataclass(frozen=True)
class Parts(Method):
    """See :func:`cartesian`."""

    method: Method

    wraps: ClassVar[tuple[str, ...]] = ("method",)
    takes_complex: ClassVar[bool] = True

    def fit(self, arrays: Sequence[jax.Array], contexts: Sequence[Context]) -> list[Cartesian]:
        """One node for each array of the rule."""
        for w, context in zip(arrays, contexts, strict=True):
            if not jnp.iscomplexobj(w):
                raise ValueError(
                    f"{context.path}: found dtype {w.dtype}, and {self!r} is for complex arrays; leave it out"
                )
        parts = [x for w in arrays for x in (w.real, w.imag)]
        known = [part for context in contexts for part in _halves(context)]
        nodes = core.fit(self.method, parts, known)
        return [Cartesian(real, imag) for real, imag in zip(nodes[::2], nodes[1::2], strict=True)]

    def __repr__(self) -> str:
        return f"cartesian({self.method!r})"


def _halves(context: Context) -> Iterator[Context]:
    """What is known of the real parts of a complex array, and of the imaginary ones."""
    previous, grad = context.previous, context.grad
    for i, name in enumerate(("real", "imag")):
        yield dataclasses.replace(
            context,
            key=None if context.key is None else jax.random.fold_in(context.key, i),
            # Of a real change the Hermitian form of complex inputs is that of its real part.
            stats=jax.tree.map(jnp.real, context.stats),
            # JAX gives the conjugate: dL/dx - i dL/dy.
            grad=None if grad is None else (grad.real if i == 0 else -grad.imag),
            previous=getattr(previous, name) if isinstance(previous, Cartesian) else None,
            path=f"{context.path}/{name}",
        )


def cartesian(method: Method) -> Method:
    """Compress the real and the imaginary parts of complex arrays each by a method for real ones.

    ``W = X + i Y`` becomes ``X~ + i Y~``: squared errors add up, so what is best for both parts is best for the array.
    Pruning by magnitude and low rank need none of this: they take complex arrays as they are, and a weight that goes
    goes whole.

    Args:
      method: any method. If it decides for several leaves at once, it does so for the parts of all.

    Returns:
      A method for complex arrays.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> method = jc.chain(jc.prune.Magnitude(sparsity=0.5), jc.cartesian(jc.quantize.Int(bits=8, axis=None)))
      >>> method(jnp.array([[1 + 2j], [0.1j]])).materialize().round(2).tolist()
      [[(1+2j)], [0j]]
    """
    return Parts(method)
