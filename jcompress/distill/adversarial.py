"""Losses of adversarial distillation, and of compressed generators."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.distill.arrays import fixed, pairs, rows, summed, wide
from jcompress.distill.logits import soft_targets


def kdgan_discriminator(
    scores: jax.Array, student: jax.Array, teacher: jax.Array, labels: jax.Array, weight: float | jax.Array = 0.5
) -> jax.Array:
    """Loss of the discriminator of true labels and those of two networks (KDGAN; Wang et al., NeurIPS 2018).

    ``-mean [ log D(y) + w sum_k p_s(k) log(1 - D(k)) + (1 - w) sum_k p_t(k) log(1 - D(k)) ]`` with ``D =
    sigmoid(scores)``. The paper draws labels; the expectation over all of them is the same without noise. No gradient
    reaches the two others.

    Args:
      scores: the discriminator's (..., classes), before the sigmoid, for each class as the label of an example.
      student: logits (..., classes) of the classifier.
      teacher: logits (..., classes).
      labels: integers (...).
      weight: ``w`` above.

    Returns:
      A float32 scalar; least at ``D(k) = p(k) / (p(k) + w p_s(k) + (1 - w) p_t(k))``.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> z = jnp.zeros((1, 2))
      >>> round(float(jc.distill.kdgan_discriminator(z, z, z, jnp.array([0]))), 4)
      1.3863
    """
    scores = wide(scores)
    drawn = weight * jax.nn.softmax(fixed(student)) + (1 - weight) * jax.nn.softmax(fixed(teacher))
    true = jnp.take_along_axis(jax.nn.log_sigmoid(scores), jnp.asarray(labels)[..., None], -1)[..., 0]
    return -jnp.mean(true + jnp.sum(drawn * jax.nn.log_sigmoid(-scores), -1))


def kdgan(
    student: jax.Array,
    teacher: jax.Array,
    scores: jax.Array,
    weight: float | jax.Array = 0.5,
    distillation: float | jax.Array = 1.0,
    temperature: float | jax.Array = 1.0,
) -> jax.Array:
    """Loss of a classifier against a discriminator and towards a teacher (KDGAN; Wang et al., NeurIPS 2018).

    ``w mean sum_k p_s(k) log(1 - D(k)) + b soft_targets(s, t)``. The teacher of the paper learns too: it takes the
    same loss with the two exchanged and ``1 - w``.

    Args:
      student: logits (..., classes).
      teacher: logits (..., classes).
      scores: the discriminator's (..., classes), before the sigmoid; no gradient reaches them.
      weight: ``w`` above.
      distillation: ``b`` above.
      temperature: of the soft targets.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for shapes that differ, or a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> z = jnp.zeros((1, 2))
      >>> round(float(jc.distill.kdgan(z, z, z)), 4)
      -0.3466
    """
    soft = soft_targets(student, teacher, temperature)
    fooled = jnp.sum(jax.nn.softmax(wide(student)) * jax.nn.log_sigmoid(-fixed(scores)), axis=-1)
    return weight * jnp.mean(fooled) + distillation * soft


def generator_errors(
    student: PyTree, teacher: PyTree, scores: jax.Array | None = None, weight: float | jax.Array = 0.5
) -> jax.Array:
    """Loss of a small generator that follows a large one (Aguinaldo et al. 2019, arXiv:1902.00159).

    ``w * adversarial + (1 - w) mean ||g_t(z) - g_s(z)||**2`` for the same ``z``, the adversarial term being
    ``-mean log sigmoid(scores)``.

    Args:
      student: what the small generator makes (batch, ...), or a pytree.
      teacher: what the large one makes of the same latents, of equal shapes.
      scores: the discriminator's of the student's samples, before the sigmoid, with their gradient; None for none.
      weight: ``w`` above; without scores it does not count.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for trees or shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.generator_errors(jnp.ones((2, 3)), jnp.zeros((2, 3))))
      3.0
    """
    found = pairs("generator_errors", student, teacher)
    near = summed(jnp.mean(jnp.sum(jnp.square(rows(s - t)), -1)) for s, t in found)
    if scores is None:
        return near
    return weight * -jnp.mean(jax.nn.log_sigmoid(wide(scores))) + (1 - weight) * near
