"""Losses scaled so that gradients in 16 bits neither vanish nor overflow."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from jcompress import core
from jcompress.core import PyTree


class LossScaleState(NamedTuple):
    """The scale to multiply the loss by, finite steps since it changed, and the optimizer's state."""

    scale: jax.Array
    steps: jax.Array
    inner: optax.OptState

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """Nothing of its own; what the optimizer's state holds is found inside."""
        return {}


def loss_scaled(
    inner: optax.GradientTransformation, start: float = 2.0**15, factor: float = 2.0, patience: int = 2000
) -> optax.GradientTransformationExtraArgs:
    """An optimizer for gradients of ``state.scale * loss`` (mixed precision; Micikevicius et al. 2018, 1710.03740).

    Gradients are divided by the scale in float32. If one is not finite the step is skipped, parameters and optimizer
    as they were, and the scale divided by ``factor``, down to 1; after ``patience`` finite steps in a row it is
    multiplied. Keep parameters in float32 and cast them inside the loss: they are the master copy, and small updates
    add up in it.

    Args:
      inner: the optimizer.
      start: the first scale; powers of two change no digits.
      factor: above 1.
      patience: steps.

    Returns:
      A ``GradientTransformationExtraArgs``, to be used by itself: ``jax.grad(lambda p: state.scale * loss(p))``.

    Raises:
      ValueError: for a scale below 1, a factor that is not above 1 or a patience that is not positive.

    Example:
      >>> import jax.numpy as jnp, optax
      >>> from jcompress.quantize.training import loss_scaled
      >>> params = {"w": jnp.array(1.0)}
      >>> tx = loss_scaled(optax.sgd(1.0), start=8.0)
      >>> state = tx.init(params)
      >>> updates, state = tx.update({"w": jnp.array(4.0, jnp.float16)}, state, params)
      >>> float(updates["w"]), float(state.scale)
      (-0.5, 8.0)
      >>> updates, state = tx.update({"w": jnp.array(jnp.inf)}, state, params)
      >>> float(updates["w"]), float(state.scale)
      (0.0, 4.0)
    """
    known = {
        name: x for name, x in (("start", start), ("factor", factor), ("patience", patience)) if core.is_concrete(x)
    }
    if known.get("start", 1) < 1 or known.get("factor", 2) <= 1 or known.get("patience", 1) < 1:
        raise ValueError(
            f"loss_scaled: found start={start}, factor={factor}, patience={patience}; expected a start of 1 or more, a "
            "factor above 1 and a positive patience"
        )
    optimizer = optax.with_extra_args_support(inner)

    def init(params: PyTree) -> LossScaleState:
        return LossScaleState(jnp.float32(start), jnp.zeros((), jnp.int32), optimizer.init(params))

    def update(
        updates: PyTree, state: LossScaleState, params: PyTree | None = None, **extra: object
    ) -> tuple[PyTree, LossScaleState]:
        grads = jax.tree.map(lambda g: g.astype(jnp.float32) / state.scale, updates)
        finite = jnp.stack([jnp.isfinite(g).all() for g in jax.tree.leaves(grads)]).all()
        safe = jax.tree.map(lambda g: jnp.where(finite, g, 0), grads)
        moved, after = optimizer.update(safe, state.inner, params, **extra)
        moved = jax.tree.map(lambda u: jnp.where(finite, u, jnp.zeros_like(u)), moved)
        after = jax.tree.map(lambda new, old: jnp.where(finite, new, old), after, state.inner)
        steps = jnp.where(finite, state.steps + 1, 0)
        grown = jnp.where(steps >= patience, state.scale * factor, state.scale)
        scale = jnp.where(finite, grown, jnp.maximum(state.scale / factor, 1.0))
        return moved, LossScaleState(scale, jnp.where(steps >= patience, 0, steps), after)

    return optax.GradientTransformationExtraArgs(init, update)
