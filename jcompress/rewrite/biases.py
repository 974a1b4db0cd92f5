"""Biases corrected for what compression did to the mean outputs."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jcompress import core
from jcompress.core import PyTree
from jcompress.layers import consumers, matrices, units
from jcompress.layers.groups import Group


def correct_biases(
    before: PyTree, after: PyTree, stats: Mapping[str, Any], groups: Mapping[str, Group] | None = None
) -> PyTree:
    """Shift biases so that mean outputs stay what they were, ``b <- b + (W_dense - W_compressed)' mean(x)``.

    For any compression that keeps shapes: pruned, quantized, factorized (Nagel et al. 2019, arXiv:1906.04721). The mean
    is that of calibration, so it is exact for layers whose inputs have not changed; layer after layer, calibrate the
    compressed model in between.

    Args:
      before: the dense parameters.
      after: what became of them; nodes stay nodes, and of kernels only the difference is read.
      stats: from ``jc.calibrate(fn, before, batches, statistics=("sum", "count"))``.
      groups: from ``jc.trace.coupling``, or by hand, for kernels without a leaf named ``bias`` or ``b`` beside them:
        where one kernel alone writes a group, the running mean of the batch norm behind it, or a vector that is named
        as a bias.

    Returns:
      ``after`` with other biases. A kernel without a bias, or without statistics, is left as it is.

    Raises:
      ValueError: if no kernel has both statistics and a bias, if statistics lack the sum, or for a bias that is not of
        its outputs' shape or is compressed itself.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"kernel": jnp.array([[1.0], [0.4]]), "bias": jnp.zeros(1)}
      >>> after = jc.compress(params, jc.plan(params, [("kernel", jc.quantize.Int(bits=2))]))
      >>> fn = lambda p, x: x @ p["kernel"] + p["bias"]
      >>> stats = jc.calibrate(fn, params, [jnp.array([[1.0, 5.0], [3.0, 5.0]])], statistics=("sum", "count"))
      >>> jc.rewrite.correct_biases(params, after, stats)["bias"].tolist()
      [2.0]
    """
    old, new = units.leaves(before), units.leaves(after)
    shifts = {path: consumers.shift_of(path, old, groups or {}) for path in old if path in stats and stats[path].axes}
    if not any(shifts.values()):
        raise ValueError(
            f"correct_biases: no kernel has both statistics and a bias, among {', '.join(old) or 'no leaves'}; pass "
            "groups= that say which vector shifts which kernel's outputs"
        )
    for path, shift in shifts.items():
        if shift is None:
            continue
        target, sign = shift
        if target not in new or core.is_node(new[target]):
            raise ValueError(f"{target}: found no dense bias for {path} in the compressed tree; keep it dense")
        layer = matrices.contraction(path, units.leaf(old, path, path), stats[path], "sum")
        change = layer.of(layer.w - units.leaf(new, path, path)).matrix()
        mean = jnp.reshape(layer.stat.sum, change.shape[:2]) / jnp.maximum(jnp.reshape(layer.stat.count, (-1, 1)), 1)
        moved = jnp.einsum("lk,lkn->ln", mean.astype(jnp.float32), change, precision="highest")
        if moved.size != new[target].size:
            raise ValueError(f"{target}: found shape {new[target].shape}, expected {layer.outputs}, that of {path}")
        new[target] = (new[target] + sign * moved.reshape(new[target].shape)).astype(new[target].dtype)
    return units.replace(after, new)
