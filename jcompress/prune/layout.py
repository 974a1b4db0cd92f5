"""A leaf as a matrix over what it contracts, beside the statistics of what it meets."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from jcompress.core import Context
from jcompress.formats import Masked
from jcompress.prune.structured.contraction import Contraction, contraction


def of(w: jax.Array, context: Context, field: str) -> tuple[Contraction, jax.Array]:
    """The layout of a leaf as float32 (layers, k, outputs), and one statistic for its layers: (layers, k, ...).

    Raises:
      ValueError: if the statistic is of another shape than the leaf needs; the message names the path.
    """
    path, stat = context.path, context.stats
    if not stat.axes:
        raise ValueError(f"{path}: the statistics name no contracted axes, so their layout is unknown; calibrate anew")
    layer = contraction(path, stat.axes[0], path, {path: w}, {path: stat}, field)
    value = jnp.asarray(getattr(stat, field), jnp.float32)
    kept = 2 if field == "gram" else 1
    return layer, value.reshape(-1, *value.shape[value.ndim - kept :])


def spread(layer: Contraction, features: jax.Array) -> jax.Array:
    """One number for each input feature, (layers, k), in a shape that broadcasts to the leaf's."""
    w = layer.w
    if layer.split > 1:
        wide = jnp.repeat(features.T, w.shape[-1] // layer.split, axis=-1)
        return wide.reshape(w.shape)
    sizes = [n if i < layer.lead or i in layer.axes else 1 for i, n in enumerate(w.shape)]
    assert math.prod(sizes) == features.size
    return features.reshape(sizes)


def visible(layer: Contraction, context: Context) -> jax.Array:
    """Which entries a mask around the leaf shows, laid out as the matrix."""
    if context.where is None:
        return jnp.ones(jax.eval_shape(layer.matrix).shape, jnp.bool_)
    shown = dataclasses.replace(layer, w=jnp.broadcast_to(context.where, layer.w.shape).astype(jnp.float32))
    return shown.matrix() > 0


def masked(layer: Contraction, values: jax.Array, mask: jax.Array) -> Masked:
    """A node from matrices of values and of the mask."""
    kept = dataclasses.replace(layer, w=jnp.zeros(layer.w.shape, jnp.bool_)).restore(mask)
    return Masked(jnp.where(kept, layer.restore(values), jnp.zeros_like(layer.w)), kept)
