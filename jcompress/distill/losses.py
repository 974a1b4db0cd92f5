"""Losses between a student and a teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jcompress.core import PyTree


def soft_targets(student: jax.Array, teacher: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Divergence of the student's softened distribution from the teacher's (Hinton et al. 2015, arXiv:1503.02531).

    ``T**2 * mean KL(softmax(teacher / T) || softmax(student / T))``. The factor keeps the size of the gradient
    from falling with the temperature. No gradient reaches the teacher.

    Args:
      student: logits (..., classes).
      teacher: logits (..., classes).
      temperature: ``T`` above.

    Returns:
      A scalar, at least 0, and 0 where the two agree.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> logits = jnp.array([[1.0, 2.0, 3.0]])
      >>> float(jc.distill.soft_targets(logits, logits, temperature=4.0))
      0.0
    """
    teacher_log = jax.nn.log_softmax(jax.lax.stop_gradient(teacher) / temperature)
    student_log = jax.nn.log_softmax(student / temperature)
    return temperature**2 * jnp.mean(jnp.sum(jnp.exp(teacher_log) * (teacher_log - student_log), axis=-1))


def layer_errors(student: PyTree, teacher: PyTree) -> jax.Array:
    """The sum over layers of the mean squared distance of what they put out: ``sum_l mean (s_l - t_l)**2``.

    The layer terms of self-distilled quantization (O'Neill & Dutta 2023, arXiv:2307.05972), in which the teacher is the
    same network in full precision: errors of rounding are met in each layer before they add up with depth. Its loss is
    ``task + alpha * soft_targets(logits, teacher_logits) + beta * layer_errors(layers, teacher_layers)``. No gradient
    reaches the teacher.

    Args:
      student: a pytree of arrays: hidden states, attention, whatever layers put out.
      teacher: the same of the teacher, of equal shapes.

    Returns:
      A float32 scalar, 0 where the two agree.

    Raises:
      ValueError: for trees or shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.layer_errors([jnp.ones(4), jnp.zeros(2)], [jnp.zeros(4), jnp.array([2.0, 0.0])]))
      3.0
    """
    found = [jax.tree.map(jnp.shape, tree) for tree in (student, teacher)]
    if found[0] != found[1]:
        raise ValueError(f"layer_errors: found layers of shapes {found[0]}, the teacher's are {found[1]}")
    held = jax.lax.stop_gradient(teacher)
    errors = jax.tree.map(lambda s, t: jnp.mean(jnp.square(s.astype(jnp.float32) - t)), student, held)
    return jax.tree.reduce(jnp.add, errors, jnp.float32(0))
