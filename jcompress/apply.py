"""Putting a plan to work: once, or on every forward pass."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress import core, rules
from jcompress.core import Context, Layout, PyTree
from jcompress.formats import Masked, Sum
from jcompress.formats.arranged import restored
from jcompress.layers import observed, relaying
from jcompress.numeric.alike import each
from jcompress.numeric.counting import magnitude_bits, reduce_together
from jcompress.numeric.meshes import kept, on_any_mesh, on_its_mesh, typed_like
from jcompress.numeric.packing import Expected
from jcompress.numeric.processes import spans
from jcompress.numeric.surrogates import straight_through
from jcompress.rules import Plan


def compress(
    params: PyTree,
    plan: Plan,
    step: Any = None,
    key: jax.Array | None = None,
    stats: Mapping[str, Any] | None = None,
    *,
    grads: PyTree = None,
    previous: PyTree = None,
) -> PyTree:
    """Replace every array that the plan names by a compressed node.

    Works under ``jit``, ``vmap`` and sharding. What is not compressed is copied, so ``params`` may be donated.

    Leaves of 8- and 4-bit floats, as in float8 checkpoints, are fitted as bfloat16, which holds them exactly, and of
    that dtype are the arrays that their nodes stand for; a mask alone keeps their own. Complex leaves are taken by
    methods that have a meaning for them, and by :func:`jcompress.cartesian` of the others.

    Args:
      params: a pytree of arrays.
      plan: from :func:`jcompress.plan`, made for the same structure.
      step: the step at which hyperparameters that are schedules are read; needed where there are any.
      key: for methods that draw random numbers; each leaf gets its own, which depends on its path only.
      stats: ``{path: statistics}`` from calibration.
      grads: gradients, of the structure of ``params``.
      previous: the tree of nodes of the last time, for methods that start from it.

    Returns:
      A pytree like ``params``, with nodes.

    Raises:
      ValueError: if the plan was made for other paths, a leaf is compressed already, something that a method
        needs is missing, or, outside ``jit``, a leaf that is to be compressed, its statistics or the result holds NaN
        or infinity. Under ``jit`` values cannot be checked: there NaN counts as the largest magnitude.

    Outside ``jit`` a :class:`CalibrationWarning` tells of inputs that calibration never saw, for which the weights
    alone decide, and of a damping that had to be raised.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"kernel": jnp.arange(8.0).reshape(4, 2), "bias": jnp.zeros(2)}
      >>> plan = jc.plan(params, [("kernel", jc.prune.Magnitude(sparsity=0.5))])
      >>> jc.compress(params, plan)["kernel"]
      Masked(values=float32[4,2], mask=bool[4,2])
    """
    check_plan("compress", plan)
    leaves = rules.leaves(params)
    nodes = fit(leaves, plan, contexts_of(params, step, key, stats, grads, previous))
    _check_results(nodes, plan)
    return rebuilt(params, nodes)


def rebuilt(params: PyTree, nodes: Mapping[str, Any]) -> PyTree:
    """The tree with nodes in their places and copies of all else."""
    return rules.rebuild(
        params, {path: nodes[path] if path in nodes else _copy(x) for path, x in rules.leaves(params).items()}
    )


def _copy(x: Any) -> Any:
    """A copy that outlives the donation of the original: of arrays; what NumPy and Python hold stays what it is."""
    if core.is_node(x):
        return jax.tree.map(_copy, x)
    if isinstance(x, jax.Array):
        return jnp.copy(x)
    return x.copy() if isinstance(x, np.ndarray) else x


def check_plan(name: str, plan: Any) -> None:
    """Raise for what is no plan."""
    if not isinstance(plan, Plan):
        raise ValueError(
            f"{name}: found {plan!r} of type {type(plan).__name__}, expected a plan; make it with "
            "jc.plan(params, [('.*/kernel', method)])"
        )


def fit(leaves: Mapping[str, Any], plan: Plan, contexts: Mapping[str, Context]) -> dict[str, Any]:
    """The nodes of all leaves that the plan names."""
    check_paths(leaves, plan)
    return fit_units(plan.units(), plan, leaves, contexts)


def fit_units(
    units: list[list[str]],
    plan: Plan,
    arrays: Mapping[str, Any],
    contexts: Mapping[str, Context],
    prepare: Callable[[Any, Context], tuple[Any, Context]] = lambda w, context: (w, context),
) -> dict[str, Any]:
    """The nodes of many units, under ``jit`` in a loop over leaves that are alike.

    Args:
      units: of paths.
      plan: their methods.
      arrays: ``{path: array}``, or what an array is made from.
      contexts: ``{path: context}``.
      prepare: of these two gives the array and the context that the method is told.
    """
    alone = [unit[0] for unit in units if len(unit) == 1]

    def one(i: int, item: tuple[Any, Context]) -> Any:
        path, (w, context) = alone[i], item
        w, context = prepare(w, dataclasses.replace(context, step=contexts[path].step, path=path))
        return fit_unit([path], plan, {path: w}, {path: context})[path]

    items = [(arrays[path], dataclasses.replace(contexts[path], step=None, path="")) for path in alone]
    nodes = dict(zip(alone, each(one, items, list(map(plan.kind, alone))), strict=True))
    for unit in units:
        if len(unit) > 1:
            known = {path: prepare(arrays[path], contexts[path]) for path in unit}
            nodes |= fit_unit(unit, plan, {p: x[0] for p, x in known.items()}, {p: x[1] for p, x in known.items()})
    return {path: node for unit in units for path, node in core.settled({p: nodes[p] for p in unit}).items()}


def fit_unit(unit: list[str], plan: Plan, arrays: Mapping[str, Any], contexts: Mapping[str, Context]) -> dict[str, Any]:
    """The nodes of leaves that are decided together."""
    found = {path: _array(path, arrays[path]) for path in unit}
    own, methods = {path: contexts[path] for path in unit}, {path: plan[path] for path in unit}
    layouts = {path: _layout(plan, path, w, own[path]) for path, (w, _) in found.items()}

    def fitted(ws: dict[str, Any], contexts: dict[str, Context], methods: dict[str, Any]) -> dict[str, Any]:
        laid = [
            (ws[path], contexts[path]) if layout is None else relaying.seen(ws[path], contexts[path], layout)
            for path, layout in layouts.items()
        ]
        for path, (_, context) in zip(unit, laid, strict=True):
            if core.is_concrete(found[path][1]):
                observed.check(path, methods[path], context)
        nodes = core.fit(methods[unit[0]], [w for w, _ in laid], [context for _, context in laid])
        checked = {}
        for path, node in zip(unit, nodes, strict=True):
            _check_range(path, ws[path], found[path][1], node, methods[path])
            node = _foretold(_narrowed(node, arrays[path]), methods[path], contexts[path].step)
            checked[path] = _restored(path, ws[path], node, layouts[path])
        return checked

    def like(ws: dict[str, Any], *_: Any) -> dict[str, Any]:
        return {path: w if (own := layouts[path]) is None else _seen(w, own) for path, w in ws.items()}

    with on_its_mesh(found[unit[0]][0]), _on_one_host(methods, {path: w for path, (w, _) in found.items()}):
        nodes = on_any_mesh(fitted, like)({path: w for path, (w, _) in found.items()}, own, methods)
    return {path: kept(node, found[path][0]) for path, node in nodes.items()}


@contextlib.contextmanager
def _on_one_host(methods: Mapping[str, Any], arrays: Mapping[str, jax.Array]) -> Iterator[None]:
    """What fetches an array that no process holds whole says so, on all processes alike."""
    try:
        yield
    except RuntimeError as error:
        path = next((path for path, w in arrays.items() if spans(w)), None)
        if path is None or "non-addressable" not in str(error):
            raise
        raise ValueError(
            f"{path}: {methods[path]!r} computes on the host, and no process holds all of shape {arrays[path].shape}; "
            "copy it to all before: jax.device_put(w, NamedSharding(mesh, PartitionSpec()))"
        ) from None


def _seen(w: jax.Array, layout: Layout) -> list[Any]:
    """The array that a node is sharded like, first as its method sees it."""
    return [typed_like(jax.ShapeDtypeStruct(layout.seen(w.shape), w.dtype), w), w]


def _restored(path: str, w: jax.Array, node: Any, layout: Layout | None) -> Any:
    """The node of a leaf in its own order of axes."""
    if layout is None and w.ndim == 3 and -3 in getattr(node, "axes", ()):
        _warn_of_stack(path, w)
    return node if layout is None else restored(node, layout, w.shape[w.ndim - layout.ndim :])


def _narrowed(node: Any, leaf: Any) -> Any:
    """A mask alone computes nothing, so what is left of a leaf of 8- or 4-bit floats keeps its dtype."""
    dtype = jnp.result_type(core.native(leaf))
    if not isinstance(node, Masked) or core.is_node(node.values) or core.is_trainable(leaf):
        return node
    return dataclasses.replace(node, values=node.values.astype(dtype))


def _layout(plan: Plan, path: str, w: jax.Array, context: Context) -> Layout | None:
    """What the axes of a leaf are: the plan says it, or the statistics; else it is seen as it is."""
    found = plan.layouts.get(path) or relaying.layout_of(w.shape, context.stats)
    if found is not None:
        found.check(path, w.shape)
        core.check_laid_out(plan[path], path, found, w.shape, w.dtype)
    return found


def _warn_of_stack(path: str, w: jax.Array) -> None:
    """Tell of scales that stacked layers seem to share."""
    most = jnp.max(jnp.abs(w), axis=(1, 2), initial=0)
    if core.is_concrete(most) and float(most.max(initial=0)) > 4 * float(most.min(initial=jnp.inf)):
        warnings.warn(
            f"{path}: found magnitudes up to {float(most.min()):.3g} and {float(most.max()):.3g} along axis 0 of shape "
            f"{w.shape}, whose indices share scales; if they are stacked layers or experts, say so by "
            "jc.plan(..., layout=jc.trace.layout(fn, params, *args)), or use jc.stacked(method)",
            stacklevel=2,
        )


def _foretold(node: Any, method: Any, step: Any) -> Any:
    """The node with what its method says of its masks before there are values, for sizes from shapes alone."""
    if isinstance(node, Sum) and hasattr(method, "methods"):
        pairs = zip(node.terms, method.methods, strict=False)
        return dataclasses.replace(node, terms=tuple(_foretold(term, own, step) for term, own in pairs))
    for name in ("first", "method"):
        method = getattr(method, name, method)
    if not isinstance(node, Masked) or not hasattr(method, "sparsity"):
        return node
    pattern = getattr(method, "pattern", None)
    pattern = getattr(pattern, "pattern", None) or pattern
    fixed = getattr(pattern, "sparsity", None)
    if fixed is not None:
        return dataclasses.replace(node, expected=Expected(1 - fixed, getattr(pattern, "m", None)))
    sparsity: Any = method.sparsity
    if callable(sparsity):
        with jax.ensure_compile_time_eval():  # a step that is known gives a number under jit too
            sparsity = sparsity(step) if step is not None and core.is_concrete(step) else None
    known = sparsity is not None and core.is_concrete(sparsity)
    expected = Expected(1 - float(sparsity)) if known else Expected()
    return dataclasses.replace(node, expected=expected)


def _check_range(path: str, w: jax.Array, largest: jax.Array, node: Any, method: Any) -> None:
    """Raise where a method went to the end of what the leaf's dtype holds, or beyond, as it can next to it only."""
    most = float(jnp.finfo(w.dtype).max)
    if not core.is_concrete(largest) or float(largest) <= most / 16:
        return
    end, value = most * (1 - 2.0**-10), jnp.abs(core.dense(node))
    inside = jnp.isfinite(value).all() & ((value >= end).sum() <= (jnp.abs(w) >= end).sum())
    if core.is_concrete(inside) and not bool(inside):
        raise ValueError(
            f"{path}: found magnitudes up to {float(largest):.3g}, and {method!r} goes to {most:.3g} or beyond, the "
            f"greatest number of {w.dtype}; divide the leaf by a power of two, or keep it dense"
        )


def _check_results(nodes: Mapping[str, Any], plan: Plan) -> None:
    """Raise for what is no number among what methods gave; under ``jit`` nothing can be seen."""
    whole = core.untie(dict(nodes))  # a node may have no arrays but those that it refers to
    known = {path: x for path, x in nodes.items() if all(map(core.is_concrete, jax.tree.leaves(whole[path])))}
    found = {path: _extent(node) for path, node in known.items()}
    found = jax.device_get({path: x for path, x in found.items() if core.is_concrete(x)})
    for path, largest in found.items():
        if not np.isfinite(largest) or (_is_far(largest, known[path]) and not _is_finite(core.dense(whole[path]))):
            raise ValueError(
                f"{path}: {plan[path]!r} gave NaN or infinite values, from a leaf whose own are finite; look at its "
                "hyperparameters and statistics, or keep the leaf dense"
            )


@jax.jit
def _extent(node: Any) -> jax.Array:
    """The largest magnitude among the numbers of a node; NaN if one of them is NaN or infinite."""
    numbers = [x for x in map(jnp.asarray, jax.tree.leaves(node)) if jnp.issubdtype(x.dtype, jnp.inexact)]
    # Narrow floats have no test of their own, nor are they promoted.
    wide = [x.astype(jnp.float32) if x.dtype.itemsize < 2 else x for x in numbers]
    return jnp.max(jnp.array([_largest(x) for x in wide]), initial=0)


def _is_far(largest: Any, node: Any) -> bool:
    """Whether products of numbers so large may be none, though they are."""
    floats = {x.dtype for x in jax.tree.leaves(node) if core.is_trainable(x)}
    most = min((float(jnp.finfo(dtype).max) for dtype in floats), default=1.0)
    return core.is_node(node) and float(largest) > most ** (1 / 8)


def _is_finite(x: jax.Array) -> bool:
    finite = jnp.isfinite(x).all()
    return not core.is_concrete(finite) or bool(finite)


def check_paths(leaves: Iterable[str], plan: Plan) -> None:
    """Raise unless the plan was made for these leaves."""
    found, planned = set(leaves), set(plan)
    if found != planned:
        extra, missing = sorted(found - planned), sorted(planned - found)
        raise ValueError(
            f"the plan was made for other parameters: not in the plan {extra[:3]}, "
            f"not in the parameters {missing[:3]}; {_advice(found, planned)}"
        )


def _advice(found: set[str], planned: set[str]) -> str:
    """What to do where one of two trees is a part of the other."""
    if found and (found < planned or _lies_in(found, planned)):
        return "these are a part of the parameters, so plan for the part: jc.plan(part, rules)"
    if planned and (planned < found or _lies_in(planned, found)):
        return (
            "the plan is that of a part, so plan for all of them: jc.plan(params, rules), which serves inside "
            "optax.masked and optax.partition too"
        )
    return "make it anew with jc.plan(params, rules)"


def _lies_in(part: set[str], whole: set[str]) -> bool:
    """Whether the paths of a subtree are among those of a tree."""
    first = min(part)
    prefixes = [path.removesuffix(first) for path in whole if path.endswith(f"/{first}")]
    return any(all(prefix + path in whole for path in part) for prefix in prefixes)


def _array(path: str, x: Any) -> tuple[jax.Array, jax.Array]:
    """A leaf as an array of JAX, all of it finite as far as can be seen, and its largest magnitude."""
    if isinstance(x, core.Reference):
        raise ValueError(f"{path}: stands for {x.owner}, whose array it has none of; compress {x.owner} in its place")
    if core.is_node(x):
        raise ValueError(
            f"{path}: found a {type(x).__name__} node where an array was expected; materialize it first, or compose "
            "methods with jc.chain"
        )
    if isinstance(x, jax.ShapeDtypeStruct):
        raise ValueError(
            f"{path}: found the shape of an array, expected its values; for shapes and sizes alone use "
            "jax.eval_shape(lambda params: jc.compress(params, plan), params)"
        )
    x = core.widened(jnp.asarray(core.native(x)))
    largest = _largest(x)
    if core.is_concrete(largest) and not bool(jnp.isfinite(largest)):
        raise ValueError(
            f"{path}: found {int((~jnp.isfinite(x)).sum())} NaN or infinite values, expected finite ones; mend them, "
            "or keep the leaf dense"
        )
    return x, largest


@jax.jit
def _largest(x: jax.Array) -> jax.Array:
    """The largest magnitude; NaN if one of them is NaN or infinite."""
    # Of the bits, which are ordered as magnitudes are: a maximum of floats may pass over NaN between devices, and of
    # floats of 16 bits a CPU would write out a copy of 32.
    parts = (x.real, x.imag) if jnp.iscomplexobj(x) else (x,)
    found = [_of_bits(y) for y in parts if y.size]
    largest = jnp.hypot(*found) if len(found) > 1 else found[0] if found else jnp.zeros((), x.dtype)
    return jnp.where(jnp.isfinite(largest), largest, jnp.nan)


def _of_bits(x: jax.Array) -> jax.Array:
    bits = magnitude_bits(x)
    # One of two: a single reduction XLA would, on a CPU, take of bits that it writes out.
    most, _ = reduce_together([bits, bits], [bits.dtype.type(0), ~bits.dtype.type(0)], [jax.lax.max, jax.lax.min])
    unsigned = jnp.dtype(f"uint{8 * x.dtype.itemsize}")
    return jax.lax.bitcast_convert_type((most - 1).astype(unsigned), x.dtype)


def contexts_of(
    params: PyTree, step: Any = None, key: Any = None, stats: Any = None, grads: PyTree = None, previous: PyTree = None
) -> dict[str, Context]:
    """What each leaf's method is told, by path."""
    found = rules.leaves(params)
    grad = {} if grads is None else rules.beside(params, grads)
    node = {} if previous is None else rules.beside(params, previous)
    return {
        path: Context(
            step=step,
            key=rules.key_of(key, path),
            stats=None if stats is None else stats.get(path),
            grad=grad.get(path),
            previous=node.get(path),
            path=path,
        )
        for path in found
    }


def simulate(
    params: PyTree,
    plan: Plan,
    step: Any = None,
    key: jax.Array | None = None,
    stats: Mapping[str, Any] | None = None,
    grads: PyTree = None,
) -> PyTree:
    """Dense parameters with the values that compression would give, and the gradients of the originals.

    The forward pass sees exactly ``materialize(compress(params, plan))``; the backward pass is the identity, so
    ``params`` can be trained while the network meets the compressed values (quantization-aware training; Jacob et
    al. 2018, arXiv:1712.05877).

    Args:
      params: a pytree of arrays.
      plan: from :func:`jcompress.plan`.
      step: as in :func:`compress`.
      key: as in :func:`compress`; also drawn from by nodes that sample.
      stats: as in :func:`compress`.
      grads: as in :func:`compress`.

    Returns:
      A pytree like ``params``, of arrays.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([[0.1, 1.0]])}
      >>> plan = jc.plan(params, [("w", jc.prune.Magnitude(sparsity=0.5))])
      >>> jax.grad(lambda p: jc.simulate(p, plan)["w"].sum())(params)["w"].tolist()
      [[1.0, 1.0]]
    """
    check_plan("simulate", plan)
    leaves = {path: core.native(x) for path, x in rules.paths(params)}
    still = {path: jax.lax.stop_gradient(x) if plan.get(path) is not None else x for path, x in leaves.items()}
    nodes = fit(still, plan, contexts_of(params, step, key, stats, grads))
    values = core.materialize(nodes, key=key)
    seen = {path: straight_through(leaves[path], value) for path, value in values.items()}
    return core.untie(rules.rebuild(params, seen))
