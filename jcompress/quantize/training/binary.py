"""Weights of one bit."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jcompress import core, transforms
from jcompress.core import Context, Method, PyTree
from jcompress.formats import Binarized, Frozen
from jcompress.quantize import grids


@dataclasses.dataclass(frozen=True)
class BinaryConnect(Method):
    """Signs times a scale, with the gradient of the signs (Courbariaux et al. 2015, arXiv:1511.00363).

    The scale is the mean magnitude of the weights that it is given, which is optimal for their signs (Rastegari et al.
    2016, arXiv:1603.05279). Put :func:`clip_values` last in the optimizer: without it weights grow where no update can
    change their sign any more. XNOR-Net, whose scale follows the weights at every step, has
    :func:`xnor` for its weights, and ``Int(bits=1)`` stores them.

    Attributes:
      axis: the axis that has a scale for each index; None for one scale for the whole array.
      learned: whether the scale is trained, with gradient ``sum(g * sign(w))``.
      stochastic: whether signs are drawn where ``materialize`` is given a key, +1 with probability
        ``clip((v + 1) / 2, 0, 1)``, v the weight divided by its scale.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.quantize.training.BinaryConnect()(jnp.array([[1.0], [-3.0]])).materialize().tolist()
      [[2.0], [-2.0]]
    """

    axis: int | None = -1
    learned: bool = False
    stochastic: bool = False
    group_size = None

    check = grids.check

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Binarized:
        """The node for one array."""
        self.check(context.path, w.shape, w.dtype)
        axes = grids.shared_axes(w.ndim, None, self.axis)
        node = Binarized(None, None, stochastic=self.stochastic, axes=axes).project(jnp.copy(w), context.where)
        return node if self.learned else dataclasses.replace(node, scale=Frozen.of(node.scale))


def clip_values() -> optax.GradientTransformationExtraArgs:
    """An optax transform, last in the chain: the values of :class:`Binarized` nodes stay within -1 and 1.

    The parameters are nodes already, so :func:`jcompress.nodes` gives them as they are; ``jc.finalize`` turns them into
    their storage form.

    Returns:
      A ``GradientTransformationExtraArgs``; ``update`` must be given ``params``.

    Raises:
      ValueError: if ``update`` is called without ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc, optax
      >>> params = {"w": jc.formats.Binarized(jnp.array([0.5, -0.9]), jnp.ones(1), axes=(-1,))}
      >>> tx = optax.chain(optax.sgd(1.0), jc.quantize.training.clip_values())
      >>> updates, _ = tx.update(params, tx.init(params), params)
      >>> updates["w"].values.tolist()
      [-0.5, 0.8999999761581421]
      >>> size = jc.save("weights.jc", jc.finalize(optax.apply_updates(params, updates)))
    """

    def clip(params: PyTree, change: PyTree) -> PyTree:
        if not isinstance(params, Binarized):
            return change
        new = jnp.clip(params.values + change.values, -1, 1)
        return dataclasses.replace(change, values=(new - params.values).astype(change.values.dtype))

    def init(params: PyTree) -> transforms.HoldsNothing:
        return transforms.HoldsNothing()

    def update(
        updates: PyTree, state: transforms.HoldsNothing, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, transforms.HoldsNothing]:
        transforms.need("clip_values", params)
        return jax.tree.map(clip, params, updates, is_leaf=core.is_node), state

    return optax.GradientTransformationExtraArgs(init, update)


def concave_penalty(w: jax.Array, scale: float | jax.Array = 1.0) -> jax.Array:
    """``sum max(1 - (w / scale)**2, 0)``: zero exactly where no weight lies strictly between plus and minus the scale.

    Added to the loss of plain weights, clipped to that range, with a strength that grows, it moves them to its ends, so
    that binary weights are trained without hidden ones (Paren & Poudel, BMVC 2022).

    Args:
      w: weights of any shape.
      scale: the magnitude of the two values; a scalar, or an array that broadcasts against ``w``.

    Returns:
      A float32 scalar.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.quantize.training import binary
      >>> float(binary.concave_penalty(jnp.array([1.0, -1.0]))), float(binary.concave_penalty(jnp.array([0.5])))
      (0.0, 0.75)
    """
    return jnp.maximum(1 - (w.astype(jnp.float32) / scale) ** 2, 0).sum()
