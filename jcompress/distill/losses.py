"""Losses between a student and a teacher."""

from __future__ import annotations

import jax
import jax.numpy as jnp


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
