"""How far a compressed leaf moves the model: by its weights, its outputs, the curvature of a loss, or the loss."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core, rules
from jcompress.core import Context, PyTree
from jcompress.layers import matrices
from jcompress.numeric.damping import met

Measure = Callable[[str, jax.Array, jax.Array], Any]
"""``measure(path, dense, compressed)``, an error of one leaf that adds up over leaves."""


def weight_error(path: str, w: jax.Array, value: jax.Array) -> jax.Array:
    """``||value - w||_F**2``.

    Args:
      path: not read; all measures take it.
      w: the dense array.
      value: what it became, of the same shape.

    Returns:
      A float32 scalar.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.budget.weight_error("w", jnp.zeros(2), jnp.array([3.0, 4.0])))
      25.0
    """
    return jnp.square(value.astype(jnp.float32) - w.astype(jnp.float32)).sum()


def output_error(stats: Mapping[str, Any], *, relative: bool = False) -> Measure:
    """What the outputs of a leaf's products move on calibration data: ``tr(dW^T gram dW)``, summed and squared.

    Layers or experts that no data reached count as if their inputs had the mean energy of the others.

    Args:
      stats: from ``jc.calibrate``, with ``gram``; the same data for all leaves, so that they compare.
      relative: over ``tr(W^T gram W)``, for leaves whose outputs are scaled away by a norm after them.

    Returns:
      A measure, which raises for a leaf that has no ``gram``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.ones((2, 1))}
      >>> stats = jc.calibrate(lambda p, x: x @ p["w"], params, [jnp.array([[1.0, 2.0], [0.0, 1.0]])])
      >>> float(jc.budget.output_error(stats)("w", params["w"], jnp.array([[1.0], [0.0]])))
      5.0
    """

    def measure(path: str, w: jax.Array, value: jax.Array) -> jax.Array:
        layer, gram = matrices.of(w, Context(stats=stats.get(path), path=path), "gram")
        gram = met(gram)
        moved = matrices.moved(layer.of(value.astype(jnp.float32) - w.astype(jnp.float32)).matrix(), gram).sum()
        if not relative:
            return moved
        return moved / jnp.maximum(matrices.moved(layer.matrix(), gram).sum(), jnp.finfo(jnp.float32).tiny)

    return measure


def curvature_error(curvature: Mapping[str, Any]) -> Measure:
    """``h ||dW||_F**2`` with one number ``h`` a leaf, as HAWQ ranks leaves (Dong et al. 2019, arXiv:1905.03696).

    Args:
      curvature: ``{path: h}``: the Hessian's largest eigenvalue, from :func:`top_eigenvalues`, or its mean trace, which
        HAWQ-V2 takes (arXiv:1911.03852): the mean of ``stats[path].hessian_diagonal``.

    Returns:
      ``measure(path, w, value)``, for :func:`options` and :func:`mixed`.

    Raises:
      ValueError: when it is asked for a path without a curvature.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> measure = jc.budget.curvature_error({"w": 2.0})
      >>> float(measure("w", jnp.zeros(2), jnp.ones(2)))
      4.0
    """

    def measure(path: str, w: jax.Array, value: jax.Array) -> jax.Array:
        if path not in curvature:
            raise ValueError(f"{path}: there is no curvature for it; keep it out of the plans, or give one")
        return jnp.maximum(curvature[path], 0) * weight_error(path, w, value)

    return measure


def loss_change(loss: Callable[..., Any], params: PyTree, *batch: Any) -> Measure:
    """``L(with this leaf compressed) - L(params)``: one forward pass for each leaf and option, compiled once.

    Args:
      loss: ``loss(params, *batch)``, a scalar.
      params: the dense parameters.
      *batch: data.

    Returns:
      ``measure(path, w, value)``, for :func:`options` and :func:`mixed`.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.array([1.0, 2.0])}
      >>> measure = jc.budget.loss_change(lambda p, x: (p["w"] * x).sum(), params, jnp.ones(2))
      >>> float(measure("w", params["w"], jnp.array([1.0, 3.0])))
      1.0
    """
    dense = rules.leaves(params)
    run = jax.jit(lambda arrays, batch: loss(rules.rebuild(params, arrays), *batch))
    base = run(dense, batch)

    def measure(path: str, w: jax.Array, value: jax.Array) -> jax.Array:
        return run({**dense, path: value.astype(dense[path].dtype)}, batch) - base

    return measure


def by_loss(loss: Callable[..., Any], params: PyTree, tree: PyTree, *batch: Any, measure: Measure) -> Measure:
    """A measure in units of a loss: one forward pass a leaf says what a unit of it costs there.

    Each compressed leaf of ``tree`` is put into ``params`` alone; what it adds to the loss, over what the measure says
    of it, is the price of the leaf: near a minimum both grow with the square of the change. So a cheap measure, such as
    ``output_error(stats, relative=True)``, ranks many options of leaves that matter unlike.

    Args:
      loss: ``loss(params, *batch)``, a scalar that the dense parameters make least, such as the divergence from their
        own outputs.
      params: the dense parameters.
      tree: the same with some leaves compressed, about as far as they will be.
      *batch: data.
      measure: of one leaf.

    Returns:
      ``measure(path, w, value)``, for :func:`options` and :func:`mixed`, of leaves that ``tree`` has compressed.

    Raises:
      ValueError: when it is asked for a leaf that ``tree`` keeps dense.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"a": jnp.zeros(2), "b": jnp.zeros(2)}
      >>> def loss(p):
      ...     return 3 * (p["a"] ** 2).sum() + (p["b"] ** 2).sum()
      >>> tree = {"a": jc.formats.Masked(jnp.ones(2), jnp.ones(2, bool)), "b": jnp.zeros(2)}
      >>> measure = jc.budget.by_loss(loss, params, tree, measure=jc.budget.weight_error)
      >>> float(measure("a", params["a"], jnp.array([2.0, 0.0])))
      12.0
    """
    dense, change = rules.leaves(params), loss_change(loss, params, *batch)
    tiny, prices = float(jnp.finfo(jnp.float32).tiny), {}
    for path, node in rules.paths(tree):
        if core.is_node(node):
            value = core.dense(node)
            prices[path] = jnp.maximum(change(path, dense[path], value), 0) / jnp.maximum(
                measure(path, dense[path], value), tiny
            )

    def priced(path: str, w: jax.Array, value: jax.Array) -> jax.Array:
        if path not in prices:
            raise ValueError(f"{path}: tree keeps it dense, so its price is not known; compress it there")
        return prices[path] * measure(path, w, value)

    return priced


def measure_of(name: str, stats: Mapping[str, Any] | None) -> Measure:
    """A measure by name.

    ``"weight"`` is :func:`weight_error`, ``"output"`` and ``"relative"`` are :func:`output_error`, and ``"trace"`` is
    :func:`curvature_error` with the mean of ``hessian_diagonal``.

    Args:
      name: ``"weight"``, ``"output"``, ``"relative"`` or ``"trace"``.
      stats: from ``jc.calibrate``; ``"weight"`` needs none.

    Returns:
      ``measure(path, w, value)``, the error of one compressed leaf.

    Raises:
      ValueError: for another name, or without the statistics that it needs.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.budget.measure_of("weight", None)("w", jnp.zeros(2), jnp.ones(2)))
      2.0
    """
    if name == "weight":
        return weight_error
    if name not in ("output", "relative", "trace"):
        raise ValueError(f"measure={name!r} is unknown; use 'output', 'relative', 'weight', 'trace' or a function")
    if stats is None:
        raise ValueError(f"measure={name!r} needs stats=jc.calibrate(fn, params, batches)")
    if name == "trace":
        known = {path: s.hessian_diagonal for path, s in stats.items() if s.hessian_diagonal is not None}
        return curvature_error({path: jnp.mean(h) for path, h in known.items()})
    return output_error(stats, relative=name == "relative")


def top_eigenvalues(
    loss: Callable[..., Any], params: PyTree, *batch: Any, key: jax.Array, steps: int = 30
) -> dict[str, float]:
    """The eigenvalue of largest magnitude of the Hessian of each leaf by itself, by power iteration.

    ``v <- H v / ||H v||``, then ``v^T H v``, with Hessian-vector products as the ``jvp`` of the gradient in one leaf
    (HAWQ; Dong et al. 2019, arXiv:1905.03696). The error falls by ``|l_2 / l_1|**2`` a step. Compiled once a leaf.

    Args:
      loss: ``loss(params, *batch)``, a scalar, twice differentiable.
      params: a pytree of arrays.
      *batch: data.
      key: for the first vectors.
      steps: products a leaf.

    Returns:
      ``{path: eigenvalue}`` of all trainable leaves.

    Raises:
      ValueError: for fewer than one step.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> loss = lambda p: (jnp.array([1.0, 5.0]) * p["a"]**2).sum() / 2 + p["b"]**2
      >>> found = jc.budget.top_eigenvalues(loss, {"a": jnp.ones(2), "b": jnp.ones(())}, key=jax.random.key(0))
      >>> {path: round(value, 3) for path, value in found.items()}
      {'a': 5.0, 'b': 2.0}
    """
    if steps < 1:
        raise ValueError(f"top_eigenvalues: steps={steps} must be positive")
    leaves = rules.leaves(params)

    def one(path: str, key: jax.Array) -> jax.Array:
        def of_leaf(w: jax.Array, arrays: dict[str, jax.Array], batch: tuple) -> jax.Array:
            return loss(rules.rebuild(params, {**arrays, path: w}), *batch)

        def iterated(arrays: dict[str, jax.Array], batch: tuple) -> jax.Array:
            w = arrays[path]

            def product(v: jax.Array) -> jax.Array:
                return jax.jvp(lambda w: jax.grad(of_leaf)(w, arrays, batch), (w,), (v.astype(w.dtype),))[1]

            def step(_: Any, state: tuple[jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
                v = state[0] / jnp.maximum(jnp.linalg.norm(state[0].ravel()), jnp.finfo(jnp.float32).tiny)
                moved = product(v).astype(jnp.float32)
                return moved, jnp.vdot(v, moved)

            start = jax.random.normal(key, w.shape, jnp.float32)
            return jax.lax.fori_loop(0, steps, step, (start, jnp.zeros((), jnp.float32)))[1]

        return jax.jit(iterated)(leaves, batch)

    keys = dict(zip(leaves, jax.random.split(key, len(leaves)), strict=True))
    return {path: float(one(path, keys[path])) for path, x in leaves.items() if core.is_trainable(x)}
