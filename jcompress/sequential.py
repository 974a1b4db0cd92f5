"""Compression layer by layer, each fitted to what the compressed layers before it give."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import jax

from jcompress import apply, core, rules
from jcompress.core import PyTree
from jcompress.rules import Plan
from jcompress.trace import calibrate, observe


def compress_sequentially(
    fn: Callable[..., Any],
    params: PyTree,
    batches: Iterable[Any],
    plan: Plan,
    step: Any = None,
    key: jax.Array | None = None,
    **options: Any,
) -> PyTree:
    """Compress the parameters in the order in which data meets them, each with statistics of what it will meet.

    Statistics of the dense model describe activations that the compressed model never sees. Here parameters are
    taken by their level, the number of planned parameters on the longest way from the arguments to their first
    product; before each level the batches run through the model with all lower levels compressed, as in
    layer-by-layer quantization (Frantar et al. 2022, arXiv:2210.17323). Queries, keys and values share a level. A
    model costs one pass over the batches for each level whose methods need statistics. Layers stacked for ``scan`` are
    one parameter, and meet what the dense layers before them in the stack give.

    Args:
      fn: called as ``fn(params, *batch)``.
      params: a pytree of arrays.
      batches: read once a level, so a list or another iterable that can be read again.
      plan: from :func:`jcompress.plan`. A method that decides for several leaves waits for the last of their levels.
      step: as in :func:`jcompress.compress`.
      key: as in :func:`jcompress.compress`.
      **options: of :func:`jcompress.calibrate`: ``loss``, ``progress`` and the like.

    Returns:
      A pytree like ``params``, with nodes.

    Raises:
      ValueError: for batches that can be read only once, and as ``calibrate`` and ``compress`` do.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> fn = lambda params, x: jnp.tanh(x @ params["a"]) @ params["b"]
      >>> params = {"a": jnp.ones((2, 4)), "b": jnp.ones((4, 1))}
      >>> plan = jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=0.5))])
      >>> jc.compress_sequentially(fn, params, [jnp.ones((3, 2))], plan)["b"]
      Masked(values=float32[4,1], mask=bool[4,1])
    """
    if iter(batches) is batches:
        raise ValueError("compress_sequentially reads the batches once a level; found a generator, expected a list")
    dense = rules.leaves(params)
    apply.check_paths(dense, plan)
    nodes: dict[str, Any] = {}
    for paths in _by_level(_levels(fn, params, batches, plan), plan):
        part = Plan(
            {p: plan[p] for p in paths},
            {p: plan.groups[p] for p in paths},
            layouts=plan.layouts,
            shardings=plan.shardings,
        )
        stats = None
        if any(need.split(".")[0] == "stats" for need in core.needs(*part.values())):
            only = plan.replace({p: None for p in plan if p not in part})
            stats = calibrate(fn, rules.rebuild(params, dense), batches, only, key=key, **options)
        nodes |= apply.compress({p: dense[p] for p in paths}, part, step, key, stats)
        dense |= core.materialize({p: nodes[p] for p in paths})
    return apply.rebuilt(params, nodes)


def _levels(fn: Callable[..., Any], params: PyTree, batches: Iterable[Any], plan: Plan) -> dict[str, int]:
    """How many planned parameters data has met, at most, when it meets each; 0 for those it does not meet."""
    batch = next(iter(batches), None)
    if batch is None:
        raise ValueError("compress_sequentially: found no batch, expected at least one")
    named = {path: () for path, method in plan.items() if method is not None}
    args = batch if isinstance(batch, tuple) else (batch,)
    found = jax.eval_shape(lambda p, *a: observe(fn, p, *a, statistics=named)[1], params, *args)
    return {path: found.levels.get(path, 0) for path in named}


def _by_level(levels: dict[str, int], plan: Plan) -> list[list[str]]:
    """The paths to compress at each level; what is decided together goes with the last of them."""
    found: dict[int, list[str]] = {}
    for unit in plan.units(levels):
        found.setdefault(max(levels[path] for path in unit), []).extend(unit)
    return [found[level] for level in sorted(found)]
