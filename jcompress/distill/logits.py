"""Losses on what classifiers put out: logits (..., classes)."""

from __future__ import annotations

import jax
import jax.numpy as jnp

from jcompress.distill.arrays import averaged, counted, divergence, fixed, pairs, positive, wide


def soft_targets(
    student: jax.Array, teacher: jax.Array, temperature: float | jax.Array = 1.0, where: jax.Array | None = None
) -> jax.Array:
    """Divergence of the student's softened distribution from the teacher's (Hinton et al. 2015, arXiv:1503.02531).

    ``T**2 * mean KL(softmax(teacher / T) || softmax(student / T))``. The factor keeps the size of the gradient
    from falling with the temperature. No gradient reaches the teacher.

    Args:
      student: logits (..., classes).
      teacher: logits (..., classes).
      temperature: ``T`` above.
      where: booleans or weights of the positions, by leading axes; all count by default.

    Returns:
      A float32 scalar, at least 0, and 0 where the two agree.

    Raises:
      ValueError: for shapes that differ, or a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> logits = jnp.array([[1.0, 2.0, 3.0]])
      >>> float(jc.distill.soft_targets(logits, logits, temperature=4.0))
      0.0
    """
    positive("soft_targets", "temperature", temperature)
    ((student, teacher),) = pairs("soft_targets", jnp.asarray(student), jnp.asarray(teacher))
    teacher_log = jax.nn.log_softmax(teacher / temperature)
    student_log = jax.nn.log_softmax(counted(student, where) / temperature)
    return temperature**2 * averaged(divergence(teacher_log, student_log), where)


def logit_matching(student: jax.Array, teacher: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Half the squared distance of logits (Ba & Caruana 2014, arXiv:1312.6184): ``mean ||s - t||**2 / 2``.

    Args:
      student: logits (..., classes).
      teacher: logits (..., classes).
      where: booleans or weights of the positions, by leading axes; all count by default.

    Returns:
      A float32 scalar, 0 where the two agree.

    Raises:
      ValueError: for shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.logit_matching(jnp.array([[1.0, 2.0]]), jnp.zeros((1, 2))))
      2.5
    """
    ((student, teacher),) = pairs("logit_matching", jnp.asarray(student), jnp.asarray(teacher))
    return averaged(jnp.sum(jnp.square(counted(student - teacher, where)), -1) / 2, where)


def probability_errors(student: jax.Array, teacher: jax.Array, where: jax.Array | None = None) -> jax.Array:
    """Mean squared distance of distributions, the consistency of mean teachers (Tarvainen & Valpola 2017, 1703.01780).

    ``mean (softmax(s) - softmax(t))**2`` over positions and classes. The teacher is an average of the student:
    :func:`mean_teacher`.

    Args:
      student: logits (..., classes).
      teacher: logits (..., classes).
      where: booleans or weights of the positions, by leading axes; all count by default.

    Returns:
      A float32 scalar, 0 where the two agree.

    Raises:
      ValueError: for shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.probability_errors(jnp.array([[99.0, 0.0]]), jnp.array([[0.0, 99.0]])))
      1.0
    """
    ((student, teacher),) = pairs("probability_errors", jnp.asarray(student), jnp.asarray(teacher))
    return averaged(jnp.square(jax.nn.softmax(counted(student, where)) - jax.nn.softmax(teacher)), where)


def ensemble_targets(
    student: jax.Array,
    teachers: jax.Array,
    weights: jax.Array | None = None,
    temperature: float | jax.Array = 1.0,
    where: jax.Array | None = None,
) -> jax.Array:
    """Divergence from the mean distribution of several teachers (Bucila et al. 2006; Balan et al. 2015, 1506.04416).

    ``T**2 * mean KL(sum_k w_k softmax(t_k / T) || softmax(s / T))``: of an ensemble, or of samples of a posterior,
    whose mean is the predictive distribution of Bayesian dark knowledge. See :func:`langevin` for the samples and
    :func:`weighted_teachers` for weights that are learned. No gradient reaches teachers or weights.

    Args:
      student: logits (..., classes).
      teachers: logits (teachers, ..., classes).
      weights: (teachers,), not negative; equal by default. Their sum is made 1.
      temperature: ``T`` above.
      where: booleans or weights of the positions, by leading axes; all count by default.

    Returns:
      A float32 scalar, at least 0.

    Raises:
      ValueError: for shapes that differ, or a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> teachers = jnp.array([[[5.0, 0.0]], [[0.0, 5.0]]])
      >>> float(jc.distill.ensemble_targets(jnp.zeros((1, 2)), teachers))
      0.0
    """
    positive("ensemble_targets", "temperature", temperature)
    student, teachers = wide(student), fixed(teachers)
    if teachers.shape[1:] != student.shape or (weights is not None and jnp.shape(weights) != teachers.shape[:1]):
        raise ValueError(
            f"ensemble_targets: found logits {student.shape}, teachers {teachers.shape} and weights "
            f"{None if weights is None else jnp.shape(weights)}; "
            "expected (..., classes), (teachers, ..., classes) and (teachers,)"
        )
    weights = jnp.ones(len(teachers)) if weights is None else fixed(weights)
    log_weights = jnp.log(weights / jnp.sum(weights)).reshape(-1, *[1] * student.ndim)
    teacher_log = jax.nn.logsumexp(jax.nn.log_softmax(teachers / temperature) + log_weights, axis=0)
    student_log = jax.nn.log_softmax(counted(student, where) / temperature)
    return temperature**2 * averaged(divergence(teacher_log, student_log), where)


def noisy_logits(
    teacher: jax.Array, scale: float | jax.Array, fraction: float | jax.Array = 0.8, *, key: jax.Array
) -> jax.Array:
    """Logits of a noisy teacher (Sau & Balasubramanian 2016, arXiv:1610.09650).

    ``(1 + xi) t``, ``xi ~ N(0, scale**2)``. Each example is disturbed with probability ``fraction``; a noise for each
    logit. Match them by :func:`logit_matching`, whose expected gradient is that of the clean teacher.

    Args:
      teacher: logits (..., classes).
      scale: the standard deviation.
      fraction: of the examples that are disturbed.
      key: of the noise.

    Returns:
      Logits of the same shape, float32.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> jc.distill.noisy_logits(jnp.ones((1, 2)), 0.5, fraction=0.0, key=jax.random.key(0)).tolist()
      [[1.0, 1.0]]
    """
    teacher = fixed(teacher)
    draw, choose = jax.random.split(key)
    noise = scale * jax.random.normal(draw, teacher.shape, teacher.dtype)
    chosen = jax.random.bernoulli(choose, jnp.float32(fraction), (*teacher.shape[:-1], 1))
    return jnp.where(chosen, teacher * (1 + noise), teacher)


def confidence_weighted(student: jax.Array, teacher: jax.Array, labels: jax.Array) -> jax.Array:
    """Cross entropy with the labels, examples weighed by the teacher's confidence (Furlanello et al. 2018, 1805.04770).

    ``sum_i w_i H(y_i, softmax(s_i))`` with ``w_i`` the teacher's greatest probability over the sum of them in the
    batch: what of born-again networks is not about the wrong classes.

    Args:
      student: logits (..., classes).
      teacher: logits (..., classes).
      labels: integers (...).

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> loss = jc.distill.confidence_weighted(jnp.zeros((2, 4)), jnp.eye(2, 4), jnp.array([0, 1]))
      >>> round(float(loss), 4)
      1.3863
    """
    ((student, teacher),) = pairs("confidence_weighted", jnp.asarray(student), jnp.asarray(teacher))
    confidence = jnp.max(jax.nn.softmax(teacher), -1)
    entropy = -jnp.take_along_axis(jax.nn.log_softmax(student), jnp.asarray(labels)[..., None], -1)[..., 0]
    return jnp.sum(confidence * entropy) / jnp.sum(confidence)


def permuted_targets(student: jax.Array, teacher: jax.Array, *, key: jax.Array) -> jax.Array:
    """Soft targets whose probabilities, but for the greatest, are permuted (Furlanello et al. 2018, arXiv:1805.04770).

    ``mean KL(permuted softmax(t) || softmax(s))``, a permutation for each example: a control that keeps the teacher's
    confidence and destroys what it knows of which classes are alike.

    Args:
      student: logits (..., classes).
      teacher: logits (..., classes).
      key: of the permutations.

    Returns:
      A float32 scalar, at least 0.

    Raises:
      ValueError: for shapes that differ.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> logits = jnp.array([[3.0, 1.0, 1.0]])
      >>> float(jc.distill.permuted_targets(logits, logits, key=jax.random.key(0)))
      0.0
    """
    ((student, teacher),) = pairs("permuted_targets", jnp.asarray(student), jnp.asarray(teacher))
    log_p = jax.nn.log_softmax(teacher)
    best = jax.nn.one_hot(jnp.argmax(log_p, -1), log_p.shape[-1], dtype=bool)
    drawn = jnp.where(best, -1.0, jax.random.uniform(key, log_p.shape, log_p.dtype))
    places = jnp.argsort(jnp.argsort(drawn, -1), -1)
    permuted = jnp.take_along_axis(jnp.flip(jnp.sort(log_p, -1), -1), places, -1)
    return jnp.mean(divergence(permuted, jax.nn.log_softmax(student)))
