"""Every reading of a model: what it must give, compared with something that knows nothing of it, and what it says."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments.zoo import oracles
from experiments.zoo.model import Model

PyTree = Any
Found = dict[str, Any]

TOLERANCE = 1e-4  # of float32, relative to the largest value, through as many layers as these models have
RANK = 3
UNUSED = ("in no product with an activation", "not used")  # a bias, a table of positions, an average's first value


class WrongError(AssertionError):
    """A reading gave something else than what is right."""


def read_coupling(model: Model) -> Found:
    """The shrunk function equals the masked one, its gradients too, when every free group loses two units in five."""
    groups = jc.trace.coupling(model.fn, model.params, *model.args)
    free = {name: groups[name] for name in groups.prunable}
    rng = np.random.default_rng(0)
    keep = {name: _keep(group.size, rng) for name, group in free.items()}
    masked = jc.trace.mask(model.params, groups, keep)
    small_fn, small = jc.shrink(model.fn, model.params, keep, *model.args)
    whole = _with_gradient(model.fn)
    (value, gradient), (before, _) = whole(masked, *model.args), whole(model.params, *model.args)
    small_value, small_gradient = _with_gradient(small_fn)(small, *model.args)
    _check(not free or difference(before, value) > 1e-3, "the masks change nothing, so that nothing is compared")
    error = difference(small_value, value)
    gradient_error = difference(small_gradient, small_fn.cut(gradient))
    _check(error < TOLERANCE, f"shrunk differs from masked by {error:.2g}")
    _check(gradient_error < 10 * TOLERANCE, f"gradients of shrunk differ from those of masked by {gradient_error:.2g}")
    _check(_size(small) < _size(model.params) or not free, "nothing was cut")
    return {
        "groups": len(groups),
        "prunable": len(free),
        "shrunk_to": round(_size(small) / _size(model.params), 3),
        "shrunk_error": error,
        "gradient_error": gradient_error,
        "unread_primitives": dict(groups.unread),
    }


def _keep(size: int, rng: np.random.Generator) -> np.ndarray:
    keep = np.zeros(size, bool)
    keep[rng.permutation(size)[: max(1, round(0.6 * size))]] = True
    return keep


def _with_gradient(fn: Callable[..., Any]) -> Callable[..., tuple[PyTree, PyTree]]:
    """The outputs, and the gradient of something in which each of them counts."""

    def loss(params: PyTree, *args: Any) -> tuple[jax.Array, PyTree]:
        out = fn(params, *args)
        floats = [x for x in jax.tree.leaves(out) if jnp.issubdtype(x.dtype, jnp.inexact)]
        return sum(jnp.mean(jnp.cos(3 * x.real + i)) for i, x in enumerate(floats)), out

    def both(params: PyTree, *args: Any) -> tuple[PyTree, PyTree]:
        (_, out), gradient = jax.value_and_grad(loss, has_aux=True)(params, *args)
        return out, gradient

    return jax.jit(both)


def read_cost(model: Model) -> Found:
    """The multiply-adds are those of all products of the jaxpr."""
    cost = jc.trace.cost(model.fn, model.params, *model.args)
    found, right = cost.total.multiply_adds, oracles.multiply_adds(model.fn, model.params, *model.args)
    _check(right is None or abs(found - right) <= 1e-6 * right, f"{found} multiply-adds, and the products have {right}")
    counted = jax.jit(model.fn).lower(model.params, *model.args).cost_analysis() or {}
    return {
        "multiply_adds": found,
        "cost_checked": right is not None,
        "flops": cost.flops,
        "xla_flops": counted.get("flops"),  # a loop's body once, where cost counts every step
        "cost_notes": list(cost.notes),
    }


def read_statistics(model: Model) -> Found:
    """Gram matrices are the sums of x x^T over what the parameters meet."""
    stats = jc.calibrate(model.fn, model.params, [model.args])
    right = oracles.Uses(model.fn, model.params, *model.args).grams()
    compared, worst = 0, 0.0
    for path, gram in right.items():
        if path not in stats or stats[path].gram is None or stats[path].others:
            continue
        error = difference(stats[path].gram.reshape(gram.shape), gram)
        _check(error < TOLERANCE, f"{path}: the Gram matrix is off by {error:.2g}")
        compared, worst = compared + 1, max(worst, error)
    shapes = {path: np.shape(x) for path, x in jc.paths(model.params)}
    matrices = [path for path, shape in shapes.items() if len(shape) > 1]
    return {
        "matrices": len(matrices),
        **_known("calibrated", matrices, stats, {**stats.notes, **stats.unread}),
        "grams_compared": compared,
        "gram_error": worst,
    }


def _known(name: str, matrices: list[str], found: Mapping[str, Any], why: Mapping[str, str]) -> Found:
    """How many matrices are known, and why the others are not, unless there is nothing to know."""
    missing = {path: why.get(path, "?") for path in matrices if path not in found}
    told = {path: reason for path, reason in missing.items() if reason not in UNUSED}
    return {name: sum(path in found for path in matrices), f"not_{name}": told}


def read_layout(model: Model) -> Found:
    """Layouts, from shapes alone, contract the axes over which a product sums."""
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), (model.params, *model.args))
    layouts = jc.trace.layout(model.fn, *shapes)
    right = oracles.Uses(model.fn, model.params, *model.args).axes
    for path, (axes, ndim) in right.items():
        if path in layouts:
            found = tuple(a + ndim for a in layouts[path].contracted)
            _check(found == axes, f"{path}: the layout contracts axes {found}, the product {axes}")
    matrices = [path for path, x in jc.paths(model.params) if np.ndim(x) > 1]
    return {**_known("layouts", matrices, layouts, layouts.unread), "layouts_compared": len(right)}


def compressed(model: Model) -> tuple[PyTree, dict[str, str]]:
    """Matrices take eight bits, a low rank and half of the weights in turn, under the layout that was read."""
    layouts = jc.trace.layout(model.fn, model.params, *model.args)
    methods = {"int8": jc.quantize.Int(bits=8), "svd": jc.factorize.SVD(rank=RANK)}
    methods["magnitude"] = jc.prune.Magnitude(sparsity=0.5)
    names, rules = {}, []
    for i, (path, x) in enumerate((p, x) for p, x in jc.paths(model.params) if np.ndim(x) > 1 and p in layouts):
        seen = layouts[path].seen(np.shape(x))
        name = list(methods)[i % 3]
        names[path] = "int8" if name == "svd" and (layouts[path].window or min(seen[-2:]) <= RANK) else name
        rules.append((path.replace("[", r"\[").replace("]", r"\]"), methods[names[path]]))
    plan = jc.plan(model.params, [*rules, (".*", None)], layout=layouts)
    return jc.compress(model.params, plan), names


def read_compression(model: Model) -> Found:
    """Rounding stays within half a step of each output's scale, low rank is the best one, half of the weights stay."""
    tree, names = compressed(model)
    layouts = jc.trace.layout(model.fn, model.params, *model.args)
    before, after = dict(jc.paths(model.params)), dict(jc.paths(jc.materialize(tree)))
    for path, name in names.items():
        w, v = (np.asarray(x[path], np.float64) for x in (before, after))
        _check(np.isfinite(v).all(), f"{path}: {name} gives values that are not finite")
        {"int8": _check_int8, "svd": _check_svd, "magnitude": _check_magnitude}[name](path, w, v, layouts[path])
    ratio = 8 * sum(4 * np.size(x) for x in before.values()) / jc.nbits(tree)
    return {"compressed": len(names), "bytes_ratio": round(ratio, 2)}


def _check_int8(path: str, w: np.ndarray, v: np.ndarray, layout: jc.Layout) -> None:
    if layout.groups > 1:
        return  # axes do not show them
    step = np.abs(w).max(layout.contracted, keepdims=True) / 127
    worst = np.max(np.abs(w - v) - 0.5 * step)
    _check(
        worst <= 1e-5 * np.abs(w).max(), f"{path}: eight bits with a scale an output are off by more than half a step"
    )


def _check_svd(path: str, w: np.ndarray, v: np.ndarray, layout: jc.Layout) -> None:
    if layout.groups > 1:
        return
    order = (*layout.batch, *layout.inputs, *layout.outputs)
    front = tuple(range(-w.ndim, -layout.ndim))
    inputs = int(np.prod([w.shape[a] for a in layout.inputs]))
    lead = [w.shape[a] for a in (*front, *layout.batch)]
    a, b = (x.transpose(*front, *order).reshape(*lead, inputs, -1) for x in (w, v))
    best = np.sqrt((np.linalg.svd(a, compute_uv=False)[..., RANK:] ** 2).sum(-1))
    error = np.sqrt(((a - b) ** 2).sum((-2, -1)))
    worst = np.max(np.abs(error - best)) / np.linalg.norm(w)
    _check(worst < 1e-4, f"{path}: rank {RANK} is off by {worst:.2g} more than the best one")


def _check_magnitude(path: str, w: np.ndarray, v: np.ndarray, layout: jc.Layout) -> None:
    zero = v == 0
    _check(abs(int(zero.sum()) - w.size / 2) <= 1, f"{path}: {zero.mean():.3f} of the weights are zero, expected half")
    _check(bool((v[~zero] == w[~zero]).all()), f"{path}: a weight that stays has changed")
    _check(np.abs(w[zero]).max() <= np.abs(w[~zero]).min(), f"{path}: a weight went that is larger than one that stays")


def read_execution(model: Model) -> Found:
    """The function on compressed parameters equals the function on what they stand for."""
    tree, _ = compressed(model)
    fast = jc.accelerate(model.fn)
    found = jax.jit(fast)(tree, *model.args)
    right = jax.jit(model.fn)(jc.materialize(tree), *model.args)
    error = difference(found, right)
    _check(error < TOLERANCE, f"accelerate differs from the dense function by {error:.2g}")
    rows = [row for row in fast.report(tree, *model.args).rows if row.path in _nodes(tree)]
    dense = [row for row in rows if row.how.startswith("dense") and row.how != "dense: a factor"]
    return {
        "execution_error": error,
        "fast_rows": len(rows) - len(dense),
        "dense_rows": len(dense),
        "dense_why": _tally(row.how for row in dense),
    }


def _nodes(tree: PyTree) -> set[str]:
    return {path for path, x in jc.paths(tree) if hasattr(x, "materialize")}


def _tally(words: Any) -> dict[str, int]:
    found: dict[str, int] = {}
    for word in words:
        found[word] = found.get(word, 0) + 1
    return found


READINGS: Mapping[str, Callable[[Model], Found]] = {
    "coupling": read_coupling,
    "cost": read_cost,
    "calibrate": read_statistics,
    "layout": read_layout,
    "compress": read_compression,
    "accelerate": read_execution,
}


def difference(found: PyTree, right: PyTree) -> float:
    """The largest one, relative to the largest value of its leaf, or to a thousandth of the largest of all leaves.

    A leaf of zeros but for rounding, such as the gradient of the bias of keys, has no relative error of its own.
    """
    pairs = list(zip(jax.tree.leaves(found), jax.tree.leaves(right), strict=True))
    pairs = [(np.asarray(a, np.complex128), np.asarray(b, np.complex128)) for a, b in pairs if np.size(b)]
    for a, b in pairs:
        _check(a.shape == b.shape, f"shape {a.shape}, expected {b.shape}")
    largest = [float(np.abs(b).max()) for _, b in pairs]
    scales = [max(x, 1e-3 * max(largest), 1e-12) for x in largest]
    errors = [float(np.abs(a - b).max()) / scale for (a, b), scale in zip(pairs, scales, strict=True)]
    return max((x if np.isfinite(x) else np.inf for x in errors), default=0.0)


def _size(tree: PyTree) -> int:
    return sum(np.size(x) for x in jax.tree.leaves(tree))


def _check(holds: bool, what: str) -> None:
    if not holds:
        raise WrongError(what)
