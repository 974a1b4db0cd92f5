"""Losses of what training gives: data and teachers' weights are learned through gradient steps of the student."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.distill.arrays import averaged, counted, divergence, fixed, positive, wide

Loss = Callable[[PyTree, Any], jax.Array]


def after_steps(loss: Loss, params: PyTree, data: Any, rates: jax.Array | float) -> PyTree:
    """The parameters after steps of gradient descent, differentiable in all that they depend on.

    ``p_{n+1} = p_n - rates_n * gradient of loss(p_n, data)``. What ``data`` holds, and the rates, can so be learned by
    the loss after training: synthetic examples (:func:`dataset_distillation`), or the weights of teachers
    (:func:`weighted_teachers`). Memory grows with the steps.

    Args:
      loss: ``loss(params, data)``, twice differentiable.
      params: a pytree of floating-point arrays.
      data: whatever the loss takes.
      rates: the learning rates (steps,), or one number for one step.

    Returns:
      A tree like ``params``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.after_steps(lambda p, x: (p - x) ** 2, jnp.array(0.0), 4.0, jnp.array([0.5, 0.5])))
      4.0
    """
    slope = jax.grad(loss)
    for rate in jnp.atleast_1d(jnp.asarray(rates)):
        params = jax.tree.map(lambda p, g, rate=rate: p - (rate * g).astype(p.dtype), params, slope(params, data))
    return params


def dataset_distillation(loss: Loss, params: PyTree, synthetic: Any, real: Any, rates: jax.Array | float) -> jax.Array:
    """The loss on real data of a network trained on synthetic data (Wang et al. 2018, arXiv:1811.10959).

    ``loss(after_steps(loss, params, synthetic, rates), real)``: its gradient in the synthetic examples and the rates
    is a gradient through a gradient. Take the mean over initial parameters by ``jax.vmap`` if the data shall serve any.

    Args:
      loss: ``loss(params, data)``, twice differentiable.
      params: the initial ones.
      synthetic: a few examples, in the form that the loss takes.
      real: a batch of real ones.
      rates: the learning rates (steps,), or one number.

    Returns:
      A scalar.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> loss = lambda p, x: jnp.mean((p - x) ** 2)
      >>> of = lambda x: jc.distill.dataset_distillation(loss, jnp.array(0.0), x, jnp.array([1.0, 3.0]), 0.5)
      >>> float(jax.grad(of)(jnp.array([2.0]))[0])
      0.0
    """
    return loss(after_steps(loss, params, synthetic, rates), real)


def weighted_teachers(
    student: jax.Array,
    teachers: jax.Array,
    scores: jax.Array,
    temperature: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Soft targets of several teachers with weights that are learned (LightTS; Campos et al. 2023, arXiv:2302.12721).

    ``sum_k softmax(scores)_k T**2 mean KL(t_k || s)``. No gradient reaches the teachers; one reaches the scores, but
    do not descend on it, as it favours the teacher that is imitated most easily. Learn them by the student's loss on
    validation data after a step, as the paper does:
    ``valid(after_steps(lambda p, a: weighted_teachers(student(p), teachers, a), params, scores, rate))``. The weight
    of a teacher that does not help goes to 0.

    Args:
      student: logits (..., classes).
      teachers: logits (teachers, ..., classes).
      scores: (teachers,).
      temperature: ``T`` above.
      where: booleans or weights of the positions, by leading axes; all count by default.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for shapes that do not fit, or a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> s = jnp.zeros((1, 2))
      >>> teachers = jnp.stack([s, s + jnp.array([9.0, 0.0])])
      >>> float(jc.distill.weighted_teachers(s, teachers, jnp.array([0.0, -99.0])))
      0.0
    """
    positive("weighted_teachers", "temperature", temperature)
    student, teachers = counted(wide(student), where), fixed(teachers)
    if teachers.shape != (len(scores), *student.shape):
        raise ValueError(
            f"weighted_teachers: found teachers {teachers.shape}, expected {(len(scores), *student.shape)}: one for "
            "each score, of the student's shape"
        )
    s = jax.nn.log_softmax(student / temperature)
    each = jax.vmap(lambda t: averaged(divergence(jax.nn.log_softmax(counted(t, where) / temperature), s), where))(
        teachers
    )
    return temperature**2 * jnp.sum(jax.nn.softmax(scores) * each)
