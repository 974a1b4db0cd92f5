"""Units that the others of their group represent."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.layers import units
from jcompress.layers.groups import Group
from jcompress.layers.units import Members


def geometric_median(
    params: PyTree, groups: Mapping[str, Group], members: Members = "kernels", match: str = ".*"
) -> dict[str, jax.Array]:
    """The sum of distances to all other units, ``s_j = sum_k ||w_j - w_k||``; the smallest is the most replaceable.

    A unit near the geometric median of its group is represented by the others, whatever its norm (He et al. 2019,
    arXiv:1811.00250). The distance is that of all weights of the chosen members together.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      members: as for :func:`importance`.
      match: as for :func:`importance`.

    Returns:
      ``{name: float32 (size,)}``; larger is less replaceable.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.array([[0.0, 4.0, 9.0]])}
      >>> hidden = jc.trace.Group(size=3, producers=(("a", 1),))
      >>> structured.geometric_median(params, {"hidden": hidden})["hidden"].tolist()
      [13.0, 9.0, 14.0]
    """
    found = units.leaves(params)
    scores = {}
    for name, group in units.prunable(groups).items():
        rows = units.rows(name, group, units.chosen(name, group, members, match, found), found)
        scores[name] = jnp.sum(jnp.sqrt(units.distances(rows)), axis=1)
    return scores
