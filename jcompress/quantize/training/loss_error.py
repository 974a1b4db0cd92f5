"""Quantization trained with an eye on what it does to the loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import PyTree


def elq(
    loss: Callable[[PyTree], jax.Array], params: PyTree, quantized: PyTree, perturbation: Any, error: Any
) -> jax.Array:
    """``L(w) + a |L(q) - L(w)| + b ||w - q||**2``: the loss, how quantization moves it, and how it moves the weights.

    The objective of explicit loss-error-aware quantization (Zhou, Yao, Wang & Chen, CVPR 2018, pages 9426-9435), which
    goes with incremental quantization: parts of the weights are frozen in turn, ``jc.project`` with
    :class:`jcompress.quantize.INQ`, and the others are trained on this. The second term has the gradients that ``q``
    has, those of straight-through training after ``jc.simulate``, none for values that are held; ``q`` counts as held
    in the third, which would have no gradient otherwise.

    Args:
      loss: of the parameters, a scalar.
      params: dense parameters w.
      quantized: q, a tree of arrays like ``params``: what ``jc.simulate`` or ``jc.materialize`` give.
      perturbation: a, a scalar, traced or not.
      error: b, likewise.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for a negative strength, or trees that differ.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import elq
      >>> float(elq(lambda p: 4 * p["w"], {"w": jnp.array(0.5)}, {"w": jnp.array(1.0)}, perturbation=2.0, error=4.0))
      7.0
    """
    if any(core.is_concrete(x) and x < 0 for x in (perturbation, error)):
        raise ValueError(f"elq: perturbation={perturbation} and error={error} must not be negative")
    found = [jax.tree.map(jnp.shape, tree) for tree in (params, quantized)]
    if found[0] != found[1]:
        raise ValueError(
            f"elq: found quantized parameters of shapes {found[1]}, expected {found[0]}; use jc.materialize"
        )
    at, moved = loss(params), loss(quantized)
    held = jax.lax.stop_gradient(quantized)
    squares = jax.tree.map(lambda w, q: jnp.square(w.astype(jnp.float32) - q.astype(jnp.float32)).sum(), params, held)
    return at + perturbation * jnp.abs(moved - at) + error * jax.tree.reduce(jnp.add, squares, jnp.float32(0))
