"""Teachers over time: averages of the student, samples of a posterior, one generation after another."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import optax

from jcompress.core import PyTree
from jcompress.distill.arrays import fixed, wide

S = TypeVar("S")


class MeanTeacherState(NamedTuple):
    """The state of :func:`mean_teacher`.

    Attributes:
      step: int32, how many are done.
      weight: float32, the sum of the weights of an average without a correction.
      average: like the parameters, in float32 at least.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> int(jc.distill.mean_teacher(0.9).init({"w": jnp.ones(2)}).step)
      0
    """

    step: jax.Array
    weight: jax.Array
    average: PyTree

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """Nothing: no parameter is held compressed."""
        return {}


def mean_teacher(decay: float | optax.Schedule = 0.999) -> optax.GradientTransformationExtraArgs:
    """An average of the parameters, the teacher of the next step (Tarvainen & Valpola 2017, arXiv:1703.01780).

    ``t_n = sum_i (1 - a) a**(n - i) s_i / (1 - a**n)`` of the student's parameters ``s_i`` after each step: the
    exponential average without a bias towards where it began. The last link of ``optax.chain``; updates pass as they
    are. A decay that is 0 on some steps and 1 on others gives stale copies, as codistillation takes them.

    Args:
      decay: ``a`` above, from 0 to 1, or a schedule.

    Returns:
      An optax transform, whose state :func:`teacher_params` reads.

    Raises:
      ValueError: in ``update``, without the parameters.

    Example:
      >>> import jax.numpy as jnp, optax, jcompress as jc
      >>> tx = optax.chain(optax.sgd(1.0), jc.distill.mean_teacher(0.5))
      >>> params = jnp.array(0.0)
      >>> state = tx.init(params)
      >>> for _ in range(2):
      ...     updates, state = tx.update(jnp.array(-3.0), state, params)
      ...     params = optax.apply_updates(params, updates)
      >>> float(params), float(jc.distill.teacher_params(params, state))
      (6.0, 5.0)
    """

    def init(params: PyTree) -> MeanTeacherState:
        return MeanTeacherState(
            jnp.zeros((), jnp.int32), jnp.zeros(()), jax.tree.map(jnp.copy, jax.tree.map(_held, params))
        )

    def update(updates: PyTree, state: MeanTeacherState, params: PyTree = None, **_: Any) -> tuple[PyTree, Any]:
        if params is None:
            raise ValueError("mean_teacher needs the parameters: call tx.update(grads, state, params)")
        a = jnp.asarray(decay(state.step) if callable(decay) else decay, jnp.float32)
        weight = a * state.weight + (1 - a)
        rate = jnp.where(weight > 0, (1 - a) / jnp.where(weight > 0, weight, 1), 0)
        after = jax.tree.map(_held, optax.apply_updates(params, updates))

        def moved(average: Any, x: Any) -> Any:
            return average + rate * (x - average) if jnp.issubdtype(x.dtype, jnp.inexact) else x

        average = jax.tree.map(moved, state.average, after)
        return updates, MeanTeacherState(optax.safe_increment(state.step), weight, average)

    return optax.GradientTransformationExtraArgs(init, update)


def _held(x: Any) -> jax.Array:
    """A number too small for 16 bits still moves an average."""
    x = jnp.asarray(x)
    return wide(x) if jnp.issubdtype(x.dtype, jnp.inexact) else x


def teacher_params(params: PyTree, state: PyTree) -> PyTree:
    """The parameters of the mean teacher that an optimizer's state holds.

    Args:
      params: of the student: they say the dtypes.
      state: of an optimizer with :func:`mean_teacher` somewhere in its chain.

    Returns:
      A tree like ``params``.

    Raises:
      ValueError: if there is no such state, or more than one.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> params = {"w": jnp.ones(2, jnp.bfloat16)}
      >>> jc.distill.teacher_params(params, jc.distill.mean_teacher().init(params))["w"].dtype.name
      'bfloat16'
    """
    is_state = lambda x: isinstance(x, MeanTeacherState)  # noqa: E731
    found = [x for x in jax.tree.leaves(state, is_leaf=is_state) if is_state(x)]
    if len(found) != 1:
        raise ValueError(f"teacher_params: found {len(found)} states of mean_teacher in the optimizer's, expected one")
    return jax.tree.map(lambda x, average: average.astype(jnp.asarray(x).dtype), params, found[0].average)


class LangevinState(NamedTuple):
    """The state of :func:`langevin`.

    Attributes:
      step: int32, how many are done.
      key: of the noise.

    Example:
      >>> import jax, jcompress as jc
      >>> int(jc.distill.langevin(0.1, key=jax.random.key(0)).init(None).step)
      0
    """

    step: jax.Array
    key: jax.Array

    def nodes(self, params: Mapping[str, jax.Array], /) -> dict[str, Any]:
        """Nothing: no parameter is held compressed."""
        return {}


def langevin(rate: float | optax.Schedule, *, key: jax.Array) -> optax.GradientTransformationExtraArgs:
    """Samples of a posterior by stochastic gradient Langevin dynamics (Welling & Teh, ICML 2011).

    ``u = -e/2 g + sqrt(e) xi``, ``xi ~ N(0, 1)``, with ``g`` the gradient of the negative log posterior: that of the
    prior plus the number of training examples times the mean over the batch. The teacher of Bayesian dark knowledge
    (Balan et al. 2015, arXiv:1506.04416): after each step of it the student takes one on :func:`ensemble_targets` or
    :func:`normal_targets` of the sample.

    Args:
      rate: ``e`` above, or a schedule.
      key: of the noise.

    Returns:
      An optax transform; it is the whole optimizer.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> tx = jc.distill.langevin(0.0, key=jax.random.key(0))
      >>> tx.update(jnp.ones(2), tx.init(jnp.zeros(2)))[0].shape
      (2,)
    """

    def init(params: PyTree) -> LangevinState:
        del params
        return LangevinState(jnp.zeros((), jnp.int32), jnp.copy(key))  # a step may be given its state

    def update(updates: PyTree, state: LangevinState, params: PyTree = None, **_: Any) -> tuple[PyTree, LangevinState]:
        del params
        e = jnp.asarray(rate(state.step) if callable(rate) else rate, jnp.float32)
        leaves, tree = jax.tree.flatten(updates)
        keys = jax.random.split(jax.random.fold_in(state.key, state.step), max(1, len(leaves)))

        def moved(g: jax.Array, k: jax.Array) -> jax.Array:
            noise = jax.random.normal(k, g.shape, jnp.float32)
            return (jnp.sqrt(e) * noise - e / 2 * g).astype(g.dtype)

        steps = jax.tree.unflatten(tree, [moved(g, k) for g, k in zip(leaves, keys, strict=False)])
        return steps, LangevinState(optax.safe_increment(state.step), state.key)

    return optax.GradientTransformationExtraArgs(init, update)


def normal_targets(student: tuple[jax.Array, jax.Array], teachers: jax.Array, noise: float | jax.Array) -> jax.Array:
    """Divergence from the predictive distribution of samples in regression (Balan et al. 2015, arXiv:1506.04416).

    ``mean_kn [log v_n + ((t_kn - m_n)**2 + noise) / v_n] / 2``, the cross entropy of the student's normal distribution
    ``N(m, v)`` from the mixture of ``N(t_k, noise)``: least at the mean and the variance of the mixture.

    Args:
      student: ``(m, log v)``, each (..., outputs).
      teachers: means (samples, ..., outputs).
      noise: the variance of the observations.

    Returns:
      A float32 scalar.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> teachers = jnp.array([[1.0], [3.0]])
      >>> float(jc.distill.normal_targets((jnp.array([2.0]), jnp.log(jnp.array([2.0]))), teachers, 1.0)) < 0.85
      True
    """
    mean, log_variance = wide(student[0]), wide(student[1])
    error = jnp.square(fixed(teachers) - mean) + noise
    return jnp.mean(log_variance + error * jnp.exp(-log_variance)) / 2


def generations(train: Callable[[S, Any], Any], teacher: Any, students: Iterable[S]) -> list[Any]:
    """Train one student after another, each taught by the one before.

    Born-again networks (Furlanello et al. 2018, arXiv:1805.04770) where all students are alike; teacher assistants
    (Mirzadeh et al. 2020, arXiv:1902.03393) where they get smaller, so that no gap is too wide.

    Args:
      train: ``train(student, teacher)`` gives the trained student.
      teacher: the first one.
      students: what each generation begins with, such as a configuration or parameters.

    Returns:
      All trained students, the last one at the end.

    Example:
      >>> import jcompress as jc
      >>> jc.distill.generations(lambda width, teacher: min(width, 2 * teacher), 4, [32, 32, 8])
      [8, 16, 8]
    """
    trained: list[Any] = []
    for student in students:
        trained.append(train(student, trained[-1] if trained else teacher))
    return trained
