"""Attention maps that layers share."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from jcompress.nn.kernels import array, lecun_normal, param, share


def map_divergence(p: jax.Array, q: jax.Array) -> jax.Array:
    """The mean Jensen-Shannon divergence of two attention maps, in nats, from 0 to log 2.

    ``KL(p || m) / 2 + KL(q || m) / 2`` with ``m = (p + q) / 2``, over all rows.

    Args:
      p: probabilities (..., keys).
      q: likewise.

    Returns:
      A float32 scalar.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> round(float(jc.nn.map_divergence(jnp.array([1.0, 0.0]), jnp.array([0.0, 1.0]))), 4)
      0.6931
    """
    p, q = p.astype(jnp.float32), q.astype(jnp.float32)
    middle = (p + q) / 2

    def apart(x: jax.Array) -> jax.Array:
        return jnp.sum(jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x / middle, 1)), 0), axis=-1)

    return jnp.mean(apart(p) + apart(q)) / 2


def attention_owners(maps: Sequence[jax.Array], threshold: float) -> tuple[int, ...]:
    """Which layer's attention map each layer may take: neighbours whose maps diverge little (Xiao et al. 2019).

    From the first layer on, a layer takes the map of the block of layers before it while it diverges from all of their
    maps by less than the threshold; else a new block begins. Reads values, so it works outside ``jit`` only.

    Args:
      maps: for each layer, probabilities (..., queries, keys) on some data.
      threshold: in nats, between 0, where only equal maps are shared, and log 2.

    Returns:
      For each layer the number of the layer that owns its map: itself, or one before.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.nn.attention_owners([jnp.eye(2), jnp.eye(2), jnp.eye(2)[::-1]], 0.1)
      (0, 0, 2)

    Reference: arXiv:1906.11024.
    """
    owners: list[int] = []
    for i, map_ in enumerate(maps):
        block = [j for j, owner in enumerate(owners) if owner == owners[-1]]
        near = bool(block) and all(float(map_divergence(maps[j], map_)) <= threshold for j in block)
        owners.append(owners[-1] if near else i)
    return tuple(owners)


class SharedAttention(nnx.Module):
    """Multi-head attention whose map may be another layer's (Xiao et al. 2019, arXiv:1906.11024).

    Without queries and keys of its own a layer has half the numbers, and computes values and outputs only. Give it the
    map of the layer that :func:`attention_owners` names.

    Args:
      features: of what comes and goes.
      heads: how many; they divide the features.
      shares: whether the map is given, so that there are no queries and keys.
      kernel_init: of the kernels (features, features).
      param_dtype: of the parameters.
      rngs: with a stream ``params``.

    Raises:
      ValueError: for heads that do not divide the features, or a map that is missing or not wanted.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from flax import nnx
      >>> first = jc.nn.SharedAttention(8, 2, rngs=nnx.Rngs(0))
      >>> second = jc.nn.SharedAttention(8, 2, shares=True, rngs=nnx.Rngs(1))
      >>> y, map_ = first(jnp.ones((3, 5, 8)))
      >>> second(y, map_)[0].shape, map_.shape
      ((3, 5, 8), (3, 2, 5, 5))
    """

    def __init__(
        self,
        features: int,
        heads: int,
        shares: bool = False,
        *,
        kernel_init: Any = lecun_normal,
        param_dtype: Any = jnp.float32,
        rngs: nnx.Rngs,
    ) -> None:
        self.width = share("SharedAttention", "features", features, heads)
        shape = (features, features)
        self.query = None if shares else param(rngs, kernel_init, shape, param_dtype)
        self.key = None if shares else param(rngs, kernel_init, shape, param_dtype)
        self.value = param(rngs, kernel_init, shape, param_dtype)
        self.out = param(rngs, kernel_init, shape, param_dtype)
        self.heads, self.shares = heads, shares

    def __call__(
        self, x: jax.Array, attention: jax.Array | None = None, mask: jax.Array | None = None
    ) -> tuple[jax.Array, jax.Array]:
        """What goes, (..., positions, features), and the map, (..., heads, positions, positions).

        Args:
          x: (..., positions, features).
          attention: the map of another layer, where this one shares.
          mask: boolean, broadcast to the map; True attends.
        """
        if self.shares != (attention is not None):
            wants = "the map of another layer" if self.shares else "no map, it makes its own"
            raise ValueError(f"SharedAttention: shares={self.shares} expects {wants}")
        if attention is None:
            logits = jnp.einsum("...qhd,...khd->...hqk", self._split(x, self.query), self._split(x, self.key))
            logits = logits / np.sqrt(self.width)
            attention = jax.nn.softmax(logits if mask is None else jnp.where(mask, logits, -jnp.inf), axis=-1)
        y = jnp.einsum("...hqk,...khd->...qhd", attention, self._split(x, self.value))
        return y.reshape(x.shape) @ array(self.out), attention

    def _split(self, x: jax.Array, kernel: Any) -> jax.Array:
        return (x @ array(kernel)).reshape(*x.shape[:-1], self.heads, self.width)
