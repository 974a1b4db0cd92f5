"""What a cut model costs, as functions of the units that stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.trace import Groups, cost, shrink

Keep = Mapping[str, np.ndarray]
CostOfKeep = Callable[[Keep], float]


def multiply_adds(fn: Callable[..., Any], params: PyTree, *args: Any) -> CostOfKeep:
    """The multiply-adds of ``jc.shrink(fn, params, keep, *args)``, as ``jc.trace.cost`` counts them.

    Only how many units stay matters, so each combination of sizes is traced once.

    Args:
      fn: any JAX function that can be shrunk.
      params: a pytree of arrays.
      *args: example arguments; their batch size is part of the count.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> count = jc.budget.multiply_adds(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((10, 3)))
      >>> count({}), count({"up[1]": jnp.arange(8) < 4})
      (400.0, 200.0)
    """
    known: dict[tuple, float] = {}

    def count(keep: Keep) -> float:
        sizes = tuple(sorted((name, int(np.sum(kept))) for name, kept in keep.items()))
        if sizes not in known:
            small_fn, small = shrink(fn, params, keep, *args) if keep else (fn, params)
            known[sizes] = float(cost(small_fn, small, *args).total.multiply_adds)
        return known[sizes]

    return count


def parameter_count(params: PyTree, groups: Groups) -> CostOfKeep:
    """The number of parameters that stay, without any tracing.

    Args:
      params: a pytree of arrays, or their shapes.
      groups: from ``jc.trace.coupling``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"up": jnp.ones((3, 8)), "down": jnp.ones((8, 2))}
      >>> groups = jc.trace.coupling(lambda p, x: x @ p["up"] @ p["down"], params, jnp.ones((10, 3)))
      >>> jc.budget.parameter_count(params, groups)({"up[1]": jnp.arange(8) < 4})
      20.0
    """
    shapes = {path: jnp.shape(core.dense(x)) for path, x in rules.paths(params)}

    def count(keep: Keep) -> float:
        stays = {path: [np.ones(n, bool) for n in shape] for path, shape in shapes.items()}
        for name, kept in keep.items():
            for (path, axis), index in groups[name].maps.items():
                stays[path][axis] &= np.where(index < 0, True, np.asarray(kept)[np.maximum(index, 0)])
        return float(sum(math.prod(int(axis.sum()) for axis in axes) for axes in stays.values()))

    return count
