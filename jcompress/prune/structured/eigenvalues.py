"""Scores of units from kernels in their spectral form."""

from __future__ import annotations

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.formats import Spectral
from jcompress.layers import units
from jcompress.layers.groups import Group


def spectral(params: PyTree, groups: Mapping[str, Group]) -> dict[str, jax.Array]:
    """The magnitude of each unit's eigenvalue, ``|lambda|`` (Buffoni et al. 2021, arXiv:2108.00940).

    Read from the :class:`jcompress.formats.Spectral` nodes that write a unit; where several do, their eigenvalues are
    added. A unit of eigenvalue zero is not silent if those it reads have eigenvalues of their own, so cut it, as
    ``jc.trace.mask`` and ``jc.shrink`` do, and do not only zero the number. Works under ``jit``.

    Args:
      params: a pytree with ``Spectral`` nodes, as ``jc.factorize.Spectrum`` gives them.
      groups: from ``jc.trace.coupling`` of the materialized parameters.

    Returns:
      ``{name: float32 (size,)}`` for each prunable group that such a node writes.

    Raises:
      ValueError: if no prunable group is written by a ``Spectral`` node.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jc.factorize.Spectrum()(jnp.array([[3.0, 0.0], [4.0, 2.0]])), "b": jnp.ones((2, 1))}
      >>> groups = jc.trace.coupling(lambda p, x: x @ p["a"] @ p["b"], jc.materialize(params), jnp.ones((3, 2)))
      >>> structured.spectral(params, groups)["a[1]"].tolist()
      [5.0, 2.0]
    """
    found, scores = units.leaves(params), dict[str, jax.Array]()
    for name, group in units.prunable(groups).items():
        for path, axis in group.producers:
            node = found.get(path)
            if isinstance(node, Spectral) and axis == node.vectors.ndim - 1:
                values = jnp.abs(node.outputs.astype(jnp.float32))
                added = units.totals(values, values.ndim - 1, group.maps[path, axis], group.size)
                scores[name] = scores.get(name, jnp.zeros(group.size, jnp.float32)) + added
    if not scores:
        raise ValueError(
            f"spectral: none of the {len(groups)} groups is written by a Spectral node and may be cut; compress the "
            "kernels with jc.factorize.Spectrum() first"
        )
    return scores
