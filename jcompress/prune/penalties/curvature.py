"""A penalty on curvature: flat minima lose less when weights are rounded or pruned."""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jcompress.core import PyTree


def hessian_square_norm(
    loss: Callable[[PyTree], jax.Array], params: PyTree, key: jax.Array, samples: int = 1
) -> jax.Array:
    """An unbiased estimate of the squared Frobenius norm of the Hessian, ``||H||_F**2 = E ||H z||**2``.

    z has independent signs (Hutchinson 1990). Each sample costs one Hessian-vector product, a ``jvp`` of the gradient;
    the estimate can be differentiated in ``params``. As a penalty, ``(1 - c) * loss + c * sqrt(estimate)``, it trains
    networks that lose less in quantization to a few bits (curvature-aware training; Hinrichs et al. 2022).

    Args:
      loss: of the parameters, a scalar, twice differentiable; ReLU networks have the curvature of the loss only.
      params: a pytree of float arrays.
      key: for the signs.
      samples: products whose mean is taken.

    Returns:
      A float32 scalar, not negative.

    Raises:
      ValueError: for fewer samples than one.

    Example:
      >>> import jax, jax.numpy as jnp
      >>> from jcompress.prune import penalties
      >>> loss = lambda p: 0.5 * jnp.sum(jnp.array([1.0, 2.0, 3.0]) * p["w"] ** 2)
      >>> float(penalties.hessian_square_norm(loss, {"w": jnp.ones(3)}, jax.random.key(0)))
      14.0
    """
    if samples < 1:
        raise ValueError(f"hessian_square_norm: samples={samples} must be positive")
    leaves, treedef = jax.tree.flatten(params)

    def one(key: jax.Array) -> jax.Array:
        keys = jax.random.split(key, len(leaves))
        signs = [jax.random.rademacher(k, x.shape, x.dtype) for k, x in zip(keys, leaves, strict=True)]
        product = jax.jvp(jax.grad(loss), (params,), (jax.tree.unflatten(treedef, signs),))[1]
        return sum((jnp.square(x.astype(jnp.float32)).sum() for x in jax.tree.leaves(product)), jnp.zeros(()))

    return jax.vmap(one)(jax.random.split(key, samples)).mean()
