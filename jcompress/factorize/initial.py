"""Factors to train from scratch."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed, Context, Method
from jcompress.factorize.svd import SVD
from jcompress.formats import LowRank, TensorNetwork


def spectral_init(
    key: jax.Array,
    shape: tuple[int, ...],
    rank: int | float | Method,
    init: Callable[..., jax.Array] = jax.nn.initializers.lecun_normal(),
    dtype: Any = jnp.float32,
) -> LowRank | TensorNetwork:
    """A node in factors for a layer that is trained from scratch, as large as the dense layer would begin.

    ``U_r sqrt(S_r)`` and ``sqrt(S_r) V_r^T`` of a dense initialization (Khodak et al. 2021, arXiv:2105.01029), times
    what makes up for the singular values left out: the sum of squares of the product is that of the dense array, so
    activations keep their variance. Any other factorization is fitted and scaled alike, its factors sharing the scale.

    Args:
      key: PRNG key.
      shape: of the dense array (..., in, out), as ``init`` takes it.
      rank: the rank, the share of the numbers that is kept, in (0, 1), or a method that gives factors, such as
        ``jc.factorize.Tucker(ranks=0.3)``.
      init: the dense initialization, ``init(key, shape, dtype)``.
      dtype: of the factors.

    Returns:
      A ``LowRank`` node, or what the method gives.

    Raises:
      ValueError: for a rank above the limit, or a method that gives no plain factors.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> node = jc.factorize.spectral_init(jax.random.key(0), (256, 128), rank=0.25)
      >>> node.u.shape, node.v.shape, round(float(node.materialize().std() * 256**0.5), 1)
      ((256, 21), (21, 128), 1.0)
    """
    method = rank if isinstance(rank, Method) else SVD(rank=rank)
    drawn, inner = jax.random.split(key)
    w = init(drawn, shape, jnp.float32)
    (node,) = core.fit(method, [w], [Context(key=inner, path="spectral_init")])
    if not isinstance(node, (LowRank, TensorNetwork)) or any(map(core.is_node, _factors(node))):
        raise ValueError(
            f"spectral_init: {method!r} gives {node!r}, expected LowRank or TensorNetwork with arrays for factors"
        )
    return _as_large(node, w, jnp.dtype(dtype))


def _factors(node: Compressed) -> tuple[Any, ...]:
    return node.factors if isinstance(node, TensorNetwork) else (node.u, node.v)  # type: ignore[attr-defined]


def _as_large(node: Any, w: jax.Array, dtype: Any) -> Any:
    """The node whose array has the norm of ``w``."""
    size = jnp.linalg.norm(node.materialize().ravel())
    ratio = jnp.where(size > 0, jnp.linalg.norm(w.ravel()) / jnp.where(size > 0, size, 1), 1)
    found = _factors(node)
    scaled = tuple((x * ratio ** (1 / len(found))).astype(dtype) for x in found)
    if isinstance(node, TensorNetwork):
        return dataclasses.replace(node, factors=scaled)
    return LowRank(*scaled)
