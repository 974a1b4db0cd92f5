"""What a cut model costs, as functions of the units that stay."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

import jax.numpy as jnp
import numpy as np

from jcompress import core, rules
from jcompress.core import PyTree
from jcompress.layers.groups import Group

Keep = Mapping[str, np.ndarray]
CostOfKeep = Callable[[Keep], float]


def parameter_count(params: PyTree, groups: Mapping[str, Group]) -> CostOfKeep:
    """The number of parameters that stay, without any tracing.

    Args:
      params: a pytree of arrays, or their shapes.
      groups: from ``jc.trace.coupling``, or by hand.

    Returns:
      ``cost(keep)``, for :func:`netadapt`. Multiply-adds are counted by ``groups.multiply_adds``.

    Returns:
      ``count(keep) -> float``; ``{}`` keeps all.

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
