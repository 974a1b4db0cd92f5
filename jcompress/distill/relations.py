"""Losses on relations: between the examples of a batch, or between two layers. Widths of features may differ."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.distill.arrays import pairs, positive, rows, summed, unit, wide


def fsp(student: PyTree, teacher: PyTree) -> jax.Array:
    """Distance of flows between layers (flow of solution procedure; Yim et al., CVPR 2017).

    ``sum mean || G(t) - G(s) ||_F**2`` with the Gram matrix between two layers over positions,
    ``G_ij = sum_p a_pi b_pj / positions``.

    Args:
      student: a pair of features (batch, positions..., channels) with as many positions, or a pytree of pairs.
      teacher: the same of the teacher, with as many channels.

    Returns:
      A float32 scalar, 0 where the flows agree.

    Raises:
      ValueError: for features that do not come in pairs, positions of a pair that differ, or other channels.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.ones((2, 4, 3))
      >>> float(jc.distill.fsp((x, x), (x, 0 * x)))
      9.0
    """
    found = pairs("fsp", student, teacher, "batch")
    if not found or len(found) % 2:
        raise ValueError(f"fsp: found {len(found)} arrays of features, expected pairs of them")
    total = []
    for (s1, t1), (s2, t2) in zip(found[::2], found[1::2], strict=True):
        flows = _flow(s1, s2), _flow(t1, t2)
        if flows[0].shape != flows[1].shape:
            raise ValueError(
                f"fsp: found flows of {flows[0].shape[1:]} channels, the teacher's has {flows[1].shape[1:]}"
            )
        total.append(jnp.mean(jnp.sum(jnp.square(flows[0] - flows[1]), axis=(1, 2))))
    return summed(total)


def _flow(a: jax.Array, b: jax.Array) -> jax.Array:
    if a.shape[:-1] != b.shape[:-1] or a.ndim < 2:
        raise ValueError(f"fsp: found layers {a.shape} and {b.shape}; pool the larger one to the other's positions")
    places = math.prod(a.shape[1:-1])
    a, b = (x.reshape(x.shape[0], places, x.shape[-1]) for x in (a, b))
    return jnp.einsum("bpi,bpj->bij", a, b, precision="highest") / places


def similarity_preserving(student: PyTree, teacher: PyTree) -> jax.Array:
    """Distance of which examples are alike (Tung & Mori 2019, arXiv:1907.09682): ``||G(t) - G(s)||_F**2 / batch**2``.

    ``G`` is ``A A^T`` of the flattened features (batch, features) with rows of unit length; a sum over layers.

    Args:
      student: features (batch, ...), or a pytree of them.
      teacher: the same of the teacher, of any width.

    Returns:
      A float32 scalar, 0 where the similarities agree.

    Raises:
      ValueError: for trees or batches that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.arange(6.0).reshape(2, 3)
      >>> float(jc.distill.similarity_preserving(3 * x[:, ::-1], x)) < 1e-6
      True
    """

    def alike(x: jax.Array) -> jax.Array:
        x = _scaled(rows(x))
        return unit(jnp.matmul(x, x.T, precision="highest"))

    found = pairs("similarity_preserving", student, teacher, "batch")
    return summed(jnp.mean(jnp.square(alike(t) - alike(s))) for s, t in found)


def relational_distance(student: PyTree, teacher: PyTree) -> jax.Array:
    """Huber loss of the distances between examples, in units of their mean (RKD-D; Park et al. 2019, arXiv:1904.05068).

    ``mean_{i != j} huber(||t_i - t_j|| / mean ||t_i - t_j||, the same of s)``, ``huber(x, y)`` being ``(x - y)**2 / 2``
    up to a difference of 1 and linear beyond; a sum over layers. The paper weighs it by 25.

    Args:
      student: features (batch, ...), or a pytree of them.
      teacher: the same of the teacher, of any width.

    Returns:
      A float32 scalar, 0 where the student's features are the teacher's after moving, turning and scaling.

    Raises:
      ValueError: for trees or batches that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.array([[0.0], [1.0], [3.0]])
      >>> float(jc.distill.relational_distance(2 * x + 7, x)) < 1e-6
      True
    """

    def distances(x: jax.Array) -> jax.Array:
        x = _scaled(rows(x))
        found = _root(jnp.sum(jnp.square(x[:, None] - x[None]), axis=-1))
        mean = jnp.sum(found) / max(1, len(x) * (len(x) - 1))
        return jnp.where(mean > 0, found / jnp.where(mean > 0, mean, 1), 0)

    def once(s: jax.Array, t: jax.Array) -> jax.Array:
        return jnp.sum(_huber(distances(t) - distances(s))) / max(1, len(s) * (len(s) - 1))

    return summed(once(s, t) for s, t in pairs("relational_distance", student, teacher, "batch"))


def relational_angle(student: PyTree, teacher: PyTree) -> jax.Array:
    """Huber loss of the angles that three examples form (RKD-A; Park et al. 2019, arXiv:1904.05068).

    The mean over all triples of different examples of ``huber(cos(t_i t_j t_k), cos(s_i s_j s_k))``, the angle at the
    one in the middle; a sum over layers. Takes ``batch**3`` numbers. The paper weighs it by 50, twice the distance.

    Args:
      student: features (batch, ...), or a pytree of them.
      teacher: the same of the teacher, of any width.

    Returns:
      A float32 scalar, 0 where the student's features are the teacher's after moving, turning and scaling.

    Raises:
      ValueError: for trees or batches that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.array([[0.0, 0.0], [1.0, 0.0], [0.0, 2.0]])
      >>> float(jc.distill.relational_angle(x @ jnp.array([[0.0, 3.0], [-3.0, 0.0]]), x)) < 1e-6
      True
    """

    def angles(x: jax.Array) -> jax.Array:
        x = _scaled(rows(x))
        ways = unit(x[:, None] - x[None])
        return jnp.einsum("ijd,kjd->jik", ways, ways, precision="highest")

    def once(s: jax.Array, t: jax.Array) -> jax.Array:
        n = len(s)
        each = _huber(angles(t) - angles(s))
        each = jnp.where(jnp.eye(n, dtype=bool), 0, each)  # an angle from a point to itself
        return jnp.sum(each) / max(1, n * (n - 1) * (n - 2))

    return summed(once(s, t) for s, t in pairs("relational_angle", student, teacher, "batch"))


def correlation_congruence(
    student: PyTree, teacher: PyTree, gamma: float | jax.Array = 0.4, order: int | None = 2
) -> jax.Array:
    """Distance of correlations between examples under a kernel (CCKD; Peng et al. 2019, arXiv:1904.01802).

    ``||C(t) - C(s)||_F**2 / batch**2`` with ``C_ij = exp(-gamma ||f_i - f_j||**2)`` of features of unit length, or its
    Taylor expansion ``exp(-2 gamma) sum_{p <= order} (2 gamma f_i f_j)**p / p!``; a sum over layers.

    Args:
      student: features (batch, ...), or a pytree of them.
      teacher: the same of the teacher, of any width.
      gamma: of the kernel.
      order: of the expansion; None for the kernel itself.

    Returns:
      A float32 scalar, 0 where the correlations agree.

    Raises:
      ValueError: for trees or batches that differ, or a ``gamma`` that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.arange(6.0).reshape(2, 3)
      >>> float(jc.distill.correlation_congruence(x[:, ::-1], x)) < 1e-6
      True
    """
    positive("correlation_congruence", "gamma", gamma)

    def correlations(x: jax.Array) -> jax.Array:
        x = unit(rows(x))
        cosines = jnp.matmul(x, x.T, precision="highest")
        if order is None:
            return jnp.exp(2 * gamma * (cosines - 1))
        terms = ((2 * gamma * cosines) ** p / float(math.factorial(p)) for p in range(order + 1))
        return jnp.exp(-2 * jnp.asarray(gamma)) * sum(terms)

    found = pairs("correlation_congruence", student, teacher, "batch")
    return summed(jnp.mean(jnp.square(correlations(t) - correlations(s))) for s, t in found)


def darkrank(
    student: PyTree, teacher: PyTree, alpha: float | jax.Array = 3.0, beta: float | jax.Array = 3.0
) -> jax.Array:
    """How unlikely the order of a teacher is to its student (DarkRank; Chen et al. 2018, arXiv:1707.01220).

    Each example asks for the others. The teacher puts them in the order of their nearness; to the student this order
    has the probability ``prod_i exp(s_i) / sum_{k >= i} exp(s_k)`` (Plackett and Luce), ``s = -alpha ||x_i - x_j||**
    beta`` of features of unit length. The mean over examples of its negative logarithm; a sum over layers.

    Args:
      student: features (batch, ...), or a pytree of them.
      teacher: the same of the teacher, of any width.
      alpha: how much distance counts.
      beta: the power of the distance.

    Returns:
      A float32 scalar, least where far examples are far and near ones near; above 0.

    Raises:
      ValueError: for trees or batches that differ, or an ``alpha`` or ``beta`` that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.array([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0]])
      >>> bool(jc.distill.darkrank(x, x) < jc.distill.darkrank(x[::-1], x[jnp.array([0, 2, 1])]))
      True
    """
    positive("darkrank", "alpha", alpha)
    positive("darkrank", "beta", beta)

    def nearness(x: jax.Array) -> jax.Array:
        x = unit(rows(x))
        return -alpha * _root(jnp.sum(jnp.square(x[:, None] - x[None]), axis=-1)) ** beta

    def once(s: jax.Array, t: jax.Array) -> jax.Array:
        itself = jnp.eye(len(t), dtype=bool)
        order = jnp.argsort(jnp.where(itself, -jnp.inf, nearness(t)), axis=-1, descending=True)[:, :-1]
        found = jnp.take_along_axis(nearness(s), order, axis=-1)
        rest = jax.lax.cumlogsumexp(found, axis=1, reverse=True)
        return jnp.sum(rest - found) / max(1, len(s))

    return summed(once(s, t) for s, t in pairs("darkrank", student, teacher, "batch"))


def contrastive(
    student: jax.Array,
    teacher: jax.Array,
    negatives: jax.Array | None = None,
    temperature: float | jax.Array = 0.07,
    size: int | None = None,
) -> jax.Array:
    """Contrastive representation distillation (CRD; Tian et al. 2020, arXiv:1910.10699).

    ``-mean [ log h(t_i, s_i) + sum_n log(1 - h(t_n, s_i)) ]`` with the critic ``h = e / (e + N/M)``,
    ``e = exp(<t, s> / temperature)`` of embeddings of unit length: the student's embedding of an example must be told
    from the teacher's of others. Both may end in learned heads; call it again with the two exchanged where the
    teacher's is learned too, and the negatives from the student's bank.

    Args:
      student: embeddings (batch, d).
      teacher: embeddings (batch, d) of the same examples.
      negatives: embeddings of other examples, (N, d) for all or (batch, N, d), such as :func:`draw` takes from a bank;
        by default the teacher's of the rest of the batch.
      temperature: of the critic.
      size: ``M``, the number of training examples; by default the batch.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for shapes that do not fit, or a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> near, far = (jc.distill.contrastive(x, jnp.eye(3)) for x in (jnp.eye(3), jnp.roll(jnp.eye(3), 1, axis=0)))
      >>> bool(near < far)
      True
    """
    positive("contrastive", "temperature", temperature)
    ((s, t),) = pairs("contrastive", jnp.asarray(student), jnp.asarray(teacher))
    s, t, batch = unit(s), unit(t), len(s)
    if negatives is None:
        scores = jnp.matmul(s, t.T, precision="highest")
        apart, number = ~jnp.eye(batch, dtype=bool), max(1, batch - 1)
    else:
        others = unit(jax.lax.stop_gradient(wide(negatives)))
        if others.ndim not in (2, 3) or others.shape[-1] != s.shape[-1] or others.shape[:-2] not in ((), (batch,)):
            raise ValueError(f"contrastive: found negatives {others.shape} for {s.shape}; expected ([batch,] N, d)")
        scores = jnp.einsum("bd,nd->bn" if others.ndim == 2 else "bd,bnd->bn", s, others, precision="highest")
        apart, number = jnp.ones(scores.shape, bool), others.shape[-2]
    shift = math.log(number / (batch if size is None else size))
    right = jax.nn.log_sigmoid(jnp.sum(s * t, axis=-1) / temperature - shift)
    wrong = jnp.where(apart, jax.nn.log_sigmoid(shift - scores / temperature), 0)
    return -jnp.mean(right + jnp.sum(wrong, axis=-1))


def _scaled(x: jax.Array) -> jax.Array:
    """In units of its largest magnitude, which does not count here, so that no square overflows."""
    most = jax.lax.stop_gradient(jnp.max(jnp.abs(x)))
    return x / jnp.where(most > 0, most, 1)


def _root(square: jax.Array) -> jax.Array:
    """The root, with a slope of 0 at 0."""
    return jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)


def _huber(x: jax.Array) -> jax.Array:
    size = jnp.abs(x)
    return jnp.where(size <= 1, jnp.square(x) / 2, size - 0.5)
