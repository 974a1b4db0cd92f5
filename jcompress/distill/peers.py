"""Teachers that learn beside the student: peers, branches, replicas, the network's own last layer."""

from __future__ import annotations

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from jcompress.distill.arrays import divergence, fixed, positive, summed, wide
from jcompress.distill.logits import ensemble_targets, soft_targets


def mutual(peers: jax.Array, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Divergence of each network from its peers (deep mutual learning; Zhang et al. 2018, arXiv:1706.00384).

    ``sum_k mean_{l != k} T**2 mean KL(p_l || p_k)``; add the cross entropy of each. No gradient reaches a network as
    the teacher of another, so one gradient of the sum trains all.

    Args:
      peers: logits (networks, ..., classes).
      temperature: ``T`` above.

    Returns:
      A float32 scalar, 0 where all agree.

    Raises:
      ValueError: for one network, or a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.distill.mutual(jnp.ones((3, 2, 5))))
      0.0
    """
    positive("mutual", "temperature", temperature)
    if len(peers) < 2:
        raise ValueError(f"mutual: found logits {jnp.shape(peers)}, expected (networks, ..., classes) of two at least")
    teachers = jax.nn.log_softmax(fixed(peers) / temperature)
    students = jax.nn.log_softmax(wide(peers) / temperature)
    each = jax.vmap(lambda s: jax.vmap(lambda t: jnp.mean(divergence(t, s)))(teachers))(students)
    return temperature**2 * jnp.sum(each) / (len(peers) - 1)


def co_teaching(losses: jax.Array, keep: float | jax.Array) -> jax.Array:
    """Which examples each network learns from: those that its peer has the least loss of (co-teaching).

    Labels that are wrong are learned last, so what has a large loss early is left out; that the other network chooses
    keeps errors from confirming themselves (Han et al. 2018, arXiv:1804.06872). The loss of the networks is
    ``(weights * losses).sum() / weights.sum()``, and ``keep`` falls from 1 to about the share of right labels over the
    first epochs, as an ``optax`` schedule says.

    Args:
      losses: (networks, batch), of each network on each example.
      keep: the share of examples to learn from, in (0, 1]; at least one of them.

    Returns:
      Weights (networks, batch), float32, 1 for what counts. Those of a network are its next peer's choice; no gradient
      reaches it.

    Raises:
      ValueError: for one network, or a share outside (0, 1].

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.distill.co_teaching(jnp.array([[0.1, 2.0, 0.3], [5.0, 0.2, 0.1]]), 2 / 3).tolist()
      [[0.0, 1.0, 1.0], [1.0, 0.0, 1.0]]
    """
    if jnp.ndim(losses) != 2 or len(losses) < 2:
        raise ValueError(f"co_teaching: found losses {jnp.shape(losses)}, expected (networks, batch) of two at least")
    if not isinstance(keep, jax.core.Tracer) and not 0 < keep <= 1:
        raise ValueError(f"co_teaching: found keep={keep}, expected a share in (0, 1]")
    theirs = jnp.roll(fixed(losses), -1, axis=0)
    place = jnp.argsort(jnp.argsort(theirs, axis=-1), axis=-1)
    count = jnp.maximum(jnp.round(keep * theirs.shape[1]), 1)
    return (place < count).astype(jnp.float32)


def gated_logits(branches: jax.Array, gates: jax.Array) -> jax.Array:
    """The logits of a gated ensemble of branches (ONE; Lan et al. 2018, arXiv:1806.04606): ``sum_i softmax(g)_i z_i``.

    The ensemble is trained by its own cross entropy, and teaches each branch:
    ``jc.distill.mean_soft_targets(branches, gated, temperature)``.

    Args:
      branches: logits (branches, ..., classes).
      gates: scores (branches, ...) of the branches, that a small network gives from what they share.

    Returns:
      Logits (..., classes), float32.

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.distill.gated_logits(jnp.array([[[1.0, 0.0]], [[0.0, 1.0]]]), jnp.zeros((2, 1))).tolist()
      [[0.5, 0.5]]
    """
    branches, gates = wide(branches), wide(gates)
    if gates.shape != branches.shape[:-1]:
        raise ValueError(f"gated_logits: found gates {gates.shape}, expected {branches.shape[:-1]}")
    return jnp.sum(jax.nn.softmax(gates, axis=0)[..., None] * branches, axis=0)


def mean_soft_targets(
    students: Sequence[jax.Array] | jax.Array, teacher: jax.Array, temperature: float | jax.Array = 1.0
) -> jax.Array:
    """Soft targets of one teacher for several heads: exits taught by the last one, branches by their ensemble.

    The mean over heads of :func:`soft_targets`. With the logits of a network's last layer as the teacher of its earlier
    exits it is the self-distillation of Zhang et al. (2019, arXiv:1905.08094), which adds the cross entropy of each
    exit and :func:`hints` of its features; with :func:`gated_logits` it is ONE (Lan et al. 2018, 1806.04606).

    Args:
      students: logits (..., classes) of each head, listed or stacked.
      teacher: logits (..., classes).
      temperature: of both.

    Returns:
      A float32 scalar, 0 where all agree with the teacher.

    Raises:
      ValueError: for no head, shapes that differ, or a temperature that is not positive.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> last = jnp.array([[1.0, 2.0]])
      >>> float(jc.distill.mean_soft_targets([last, last + 1.0], last))
      0.0
    """
    if not len(students):
        raise ValueError("mean_soft_targets: found no head, expected one at least")
    return summed(soft_targets(s, teacher, temperature) for s in students) / len(students)


def codistillation(student: jax.Array, axis_name: str, temperature: float | jax.Array = 1.0) -> jax.Array:
    """Soft targets from the mean of the other replicas (codistillation; Anil et al. 2018, arXiv:1804.03235).

    ``T**2 mean KL(mean_{l != k} softmax(z_l / T) || softmax(z_k / T))`` for replicas that see the same examples; only
    predictions cross devices. Where the teachers are stale copies, as in the paper, take
    :func:`ensemble_targets` of their logits, and :func:`mean_teacher` with a decay of 1 between exchanges for the
    copies.

    Args:
      student: logits (..., classes) of this replica.
      axis_name: of ``jax.vmap`` or ``jax.shard_map``, over replicas.
      temperature: ``T`` above.

    Returns:
      A float32 scalar of this replica, 0 where it agrees with the others.

    Raises:
      ValueError: for one replica, or a temperature that is not positive.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> logits = jnp.ones((4, 2, 3))  # four replicas
      >>> jax.vmap(lambda z: jc.distill.codistillation(z, "replica"), axis_name="replica")(logits).tolist()
      [0.0, 0.0, 0.0, 0.0]
    """
    positive("codistillation", "temperature", temperature)
    number = jax.lax.psum(1, axis_name)
    if number < 2:
        raise ValueError(f"codistillation: found {number} replica along {axis_name!r}, expected two at least")
    found = jax.lax.all_gather(fixed(student), axis_name)
    weights = jnp.arange(number) != jax.lax.axis_index(axis_name)
    return ensemble_targets(student, found, weights, temperature)
