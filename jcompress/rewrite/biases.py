"""Biases corrected for what compression did to the mean outputs."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from jcompress import core
from jcompress.core import PyTree
from jcompress.layers import consumers, units


def correct_biases(
    dense: PyTree, compressed: PyTree, stats: Mapping[str, Any], biases: Mapping[str, str] | None = None
) -> PyTree:
    """Shift biases so that mean outputs stay what they were, ``b <- b + (W_dense - W_compressed)' mean(x)``.

    For any compression that keeps shapes: pruned, quantized, factorized (Nagel et al. 2019, arXiv:1906.04721). The mean
    is that of calibration, so it is exact for layers whose inputs have not changed; layer after layer, calibrate the
    compressed model in between.

    Args:
      dense: the parameters before.
      compressed: those after; nodes stay nodes, and of kernels only the difference is read.
      stats: ``{path: statistics}``; of these ``sum``, ``count`` and ``axes`` are read.
      biases: ``{path of a kernel: path of its bias}``; by default the leaf named ``bias`` or ``b`` beside each kernel
        that has statistics.

    Returns:
      ``compressed`` with new biases.

    Raises:
      ValueError: for statistics or a bias that do not fit, or a bias that is compressed itself.

    Example:
      >>> import types, jax.numpy as jnp
      >>> from jcompress.prune import structured
      >>> before = {"kernel": jnp.array([[1.0], [2.0]]), "bias": jnp.zeros(1)}
      >>> after = {"kernel": jnp.array([[0.0], [2.0]]), "bias": jnp.zeros(1)}
      >>> stats = {"kernel": types.SimpleNamespace(sum=jnp.array([6.0, 1.0]), count=2, axes=(-2,))}
      >>> structured.correct_biases(before, after, stats)["bias"].tolist()
      [3.0]
    """
    old, new = units.leaves(dense), units.leaves(compressed)
    biases = _beside(old, stats) if biases is None else biases
    for path, target in biases.items():
        if target not in new or core.is_node(new[target]):
            raise ValueError(f"{target}: found no dense bias for {path} in the compressed tree; keep it dense")
        layer = consumers.contraction(path, stats[path].axes[0], path, old, stats, "sum")
        change = dataclasses.replace(layer, w=layer.w - units.leaf(new, path, path)).matrix()
        mean = jnp.reshape(layer.stat.sum, change.shape[:2]) / jnp.maximum(jnp.reshape(layer.stat.count, (-1, 1)), 1)
        moved = jnp.einsum("lk,lkn->ln", mean.astype(jnp.float32), change, precision="highest")
        if moved.size != new[target].size:
            raise ValueError(f"{target}: found shape {new[target].shape}, expected {layer.outputs}, that of {path}")
        new[target] = (new[target] + moved.reshape(new[target].shape)).astype(new[target].dtype)
    return units.replace(compressed, new)


def _beside(found: Mapping[str, Any], stats: Mapping[str, Any]) -> dict[str, str]:
    """The bias of each kernel that has statistics, where there is one."""
    biases = {}
    for path in stats:
        for name in ("bias", "b"):
            other = "/".join([*path.split("/")[:-1], name])
            if other in found and other != path and getattr(stats[path], "sum", None) is not None:
                biases[path] = other
    return biases
