"""Distillation without data: inputs made to match what was stored of the teacher's activations."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from jcompress.core import PyTree
from jcompress.distill.arrays import summed, wide


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Moments:
    """What is stored of a layer's activations (Lopes et al. 2017, arXiv:1710.07535): no example can be told from it.

    Attributes:
      mean: float32 (channels,).
      variance: float32 (channels,).

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.distill.moments_of(jnp.array([[1.0], [3.0]])).mean.tolist()
      [2.0]
    """

    mean: jax.Array
    variance: jax.Array


def moments_of(features: PyTree) -> PyTree:
    """Mean and variance of each channel over examples and positions: what to store while there is data.

    The running statistics of batch norms are such moments, and are stored already.

    Args:
      features: (batch, positions..., channels), or a pytree of them.

    Returns:
      A tree like ``features`` of :class:`Moments`.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.distill.moments_of([jnp.array([[1.0], [3.0]])])[0].variance.tolist()
      [1.0]
    """

    def once(x: Any) -> Moments:
        x = wide(x)
        axes = tuple(range(x.ndim - 1))
        return Moments(jnp.mean(x, axes), jnp.var(x, axes))

    return jax.tree.map(once, features)


def moment_errors(features: PyTree, moments: PyTree) -> jax.Array:
    """How far activations are from stored moments: ``sum_l mean (m_l - M_l)**2 / V_l + (log (v_l / V_l))**2``.

    Means in units of the stored deviations and variances by their ratio, so that no layer outweighs the rest. What is
    constant in the stored activations is held to within 1e-5 of variance.

    Args:
      features: (batch, positions..., channels) of synthetic inputs, or a pytree of them.
      moments: the same tree of :class:`Moments`.

    Returns:
      A float32 scalar, 0 where they agree.

    Raises:
      ValueError: for trees or channels that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.array([[1.0], [3.0]])
      >>> float(jc.distill.moment_errors(x[::-1], jc.distill.moments_of(x)))
      0.0
    """
    is_moments = lambda x: isinstance(x, Moments)  # noqa: E731
    both: list[Any] = [jax.tree.flatten(x, is_leaf=is_moments) for x in (moments_of(features), moments)]
    found, stored = both
    shapes = [[jnp.shape(m.mean) for m in leaves] for leaves, _ in (found, stored) if all(map(is_moments, leaves))]
    if found[1] != stored[1] or len(shapes) != 2 or shapes[0] != shapes[1]:
        raise ValueError(f"moment_errors: found features {found[1]} with {shapes[:1]} channels, moments {stored[1]}")

    def once(now: Moments, then: Moments) -> jax.Array:
        variance = wide(then.variance) + 1e-5
        ratio = jnp.log((now.variance + 1e-5) / variance)
        return jnp.mean(jnp.square(now.mean - then.mean) / variance + jnp.square(ratio))

    return summed(once(a, b) for a, b in zip(found[0], stored[0], strict=True))


def generator_prior(
    logits: jax.Array, features: jax.Array | None = None, activation: float = 0.1, information: float = 5.0
) -> jax.Array:
    """Loss of inputs that a classifier takes for real ones (data-free learning; Chen et al. 2019, arXiv:1904.01186).

    ``mean H(argmax p, p) - a mean |f| - b H(mean p)``: each is sure, features are large, and classes are equally
    frequent.

    Args:
      logits: (batch, classes) of the teacher on synthetic inputs.
      features: (batch, ...) before its last layer; None leaves the term out.
      activation: ``a`` above.
      information: ``b`` above.

    Returns:
      A float32 scalar, with its gradient in the inputs.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> sure, unsure = (float(jc.distill.generator_prior(scale * jnp.eye(2))) for scale in (9.0, 1.0))
      >>> sure < unsure
      True
    """
    log_p = jax.nn.log_softmax(wide(logits))
    mean = jnp.mean(jnp.exp(log_p), axis=0)
    entropy = -jnp.sum(jnp.where(mean > 0, mean * jnp.log(jnp.where(mean > 0, mean, 1)), 0))
    size = 0.0 if features is None else jnp.mean(jnp.abs(wide(features)))
    return -jnp.mean(jnp.max(log_p, axis=-1)) - activation * size - information * entropy


def synthesize(
    loss: Callable[[PyTree], jax.Array], inputs: PyTree, optimizer: optax.GradientTransformation, steps: int
) -> tuple[PyTree, jax.Array]:
    """Inputs for which a loss is small, found by gradient descent from noise: no data is in the call.

    With ``lambda x: moment_errors(features(x), stored)`` it is the data-free distillation of Lopes et al. (2017,
    arXiv:1710.07535); train the student on :func:`soft_targets` of what it gives. A call of one step after another,
    each compiled once.

    Args:
      loss: of the inputs.
      inputs: what to begin with, such as noise of the data's mean and deviation.
      optimizer: an optax optimizer.
      steps: how many.

    Returns:
      ``(inputs, losses (steps,))``, the losses before each step.

    Raises:
      ValueError: for no step.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> x, losses = jc.distill.synthesize(lambda x: jnp.sum(x**2), jnp.ones(2), optax.sgd(0.5), 3)
      >>> x.tolist(), losses.tolist()
      ([0.0, 0.0], [2.0, 0.0, 0.0])
    """
    if steps < 1:
        raise ValueError(f"synthesize: found {steps} steps, expected 1 at least")

    @jax.jit
    def step(inputs: PyTree, state: PyTree) -> tuple[PyTree, PyTree, jax.Array]:
        value, slope = jax.value_and_grad(loss)(inputs)
        updates, state = optimizer.update(slope, state, inputs)
        return optax.apply_updates(inputs, updates), state, value

    state, losses = optimizer.init(inputs), []
    for _ in range(steps):
        inputs, state, value = step(inputs, state)
        losses.append(value)
    return inputs, jnp.stack(losses)
