"""Pruning without labels: soft masks on units, and a discriminator that tells the masked network from the teacher."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import PyTree
from jcompress.layers import units
from jcompress.layers.groups import Group


def scaled(params: PyTree, groups: Mapping[str, Group], masks: Mapping[str, jax.Array]) -> PyTree:
    """The parameters of a network whose units are multiplied by soft masks: what reads a unit is scaled by its mask.

    Differentiable in both. A mask of 0 is what ``jc.trace.mask`` does to the outputs of a unit, so where masks are zero
    the units can be cut: ``keep = {name: mask != 0}``.

    Args:
      params: a pytree of arrays.
      groups: from ``jc.trace.coupling``.
      masks: ``{name: float (size,)}``; groups that it does not name are left alone.

    Returns:
      A pytree like ``params``.

    Raises:
      ValueError: for a group that is unknown, cannot be cut or that no kernel reads, or a mask of another shape.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> from jcompress.prune import structured
      >>> params = {"a": jnp.ones((1, 2)), "b": jnp.array([[3.0], [4.0]])}
      >>> hidden = jc.trace.Group(size=2, producers=(("a", 1),), consumers=(("b", 0),))
      >>> structured.scaled(params, {"hidden": hidden}, {"hidden": jnp.array([0.5, 0.0])})["b"].tolist()
      [[1.5], [0.0]]
    """
    found = units.leaves(params)
    changed: dict[str, jax.Array] = {}
    for name, mask in masks.items():
        group = units.find(groups, name)
        if jnp.shape(mask) != (group.size,):
            raise ValueError(f"{name}: found a mask of shape {jnp.shape(mask)}, expected ({group.size},), one a unit")
        for path, axis in units.chosen(name, group, "consumers", ".*", found):
            w = changed.get(path, units.leaf(found, path, name))
            changed[path] = w * units.spread(mask, axis, group.maps[path, axis], w.ndim, 1.0).astype(w.dtype)
    return units.replace(params, changed)


def discriminator_loss(teacher: jax.Array, student: jax.Array, regularization: Any = 0.0) -> jax.Array:
    """What the discriminator of GAL minimizes (Lin et al. 2019, arXiv:1903.09291).

    ``-mean log D(teacher) - mean log(1 - D(student))``, with ``D`` the sigmoid of a logit: 1 says that an output is the
    teacher's. At its best it is ``2 log 2`` minus twice the Jensen-Shannon divergence of the two laws of outputs.

    Args:
      teacher: the discriminator's logits for outputs of the unpruned network, any shape.
      student: its logits for outputs of the masked network, any shape. Stop their gradient towards that network, or
        differentiate in the discriminator's parameters only.
      regularization: times ``-mean log D(student)``, which is added: the adversarial regularization that keeps the
        discriminator from winning. Not negative; the authors take 1.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for a negative regularization.

    Example:
      >>> import jax.numpy as jnp
      >>> from jcompress.prune import structured
      >>> round(float(structured.discriminator_loss(jnp.zeros(8), jnp.zeros(8))), 4)  # it cannot tell: 2 log 2
      1.3863
    """
    if core.is_concrete(regularization) and float(regularization) < 0:
        raise ValueError(f"discriminator_loss: regularization={regularization} must not be negative")
    teacher, student = teacher.astype(jnp.float32), student.astype(jnp.float32)
    told = jnp.mean(jax.nn.softplus(-teacher)) + jnp.mean(jax.nn.softplus(student))
    return told + regularization * jnp.mean(jax.nn.softplus(-student))


def generator_loss(student: jax.Array, teacher: jax.Array, judged: jax.Array, adversarial: Any = 1.0) -> jax.Array:
    """What the masked network minimizes in GAL, beside the penalty on its masks (Lin et al. 2019, arXiv:1903.09291).

    ``mean ||student - teacher||**2 / 2 - adversarial * mean log D(student)``: the outputs are those of the teacher, and
    the discriminator takes them for the teacher's. No labels are read. Of the two common forms of the second term this
    is the one whose gradient does not vanish where the discriminator is sure. The l1 penalty is left to FISTA,
    :func:`jcompress.prune.penalties.accelerated`, under which masks become exactly zero; take them from its
    ``state.iterate``.

    Args:
      student: outputs of the masked network, (..., features).
      teacher: those of the unpruned one, of the same shape. No gradient reaches it.
      judged: the discriminator's logits for the student's outputs, any shape.
      adversarial: the weight of the second term.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for outputs of different shapes.

    Example:
      A step of the network, with its masks beside its weights, where ``judge`` is any discriminator:

      >>> import jax, jax.numpy as jnp, optax, jcompress as jc
      >>> from jcompress.prune import penalties, structured
      >>> weights = {"a": jnp.ones((3, 2)), "b": jnp.ones((2, 1))}
      >>> groups = {"hidden": jc.trace.Group(size=2, producers=(("a", 1),), consumers=(("b", 0),))}
      >>> params = {"weights": weights, "masks": {"hidden": jnp.array([1.0, 0.04])}}
      >>> model, judge, x = lambda p, x: x @ p["a"] @ p["b"], lambda y: y.sum(-1), jnp.ones((4, 3))
      >>> def loss(p):
      ...     y = model(structured.scaled(p["weights"], groups, p["masks"]), x)
      ...     return structured.generator_loss(y, model(weights, x), judge(y))
      >>> fista = penalties.accelerated(penalties.L1(50.0), 0.01)
      >>> kinds = {"weights": optax.sgd(0.01), "masks": fista}
      >>> tx = optax.partition(kinds, {"weights": "weights", "masks": "masks"})
      >>> updates, state = tx.update(jax.grad(loss)(params), tx.init(params), params)
      >>> [round(mask, 2) for mask in optax.apply_updates(params, updates)["masks"]["hidden"].tolist()]
      [0.59, 0.0]
    """
    if jnp.shape(student) != jnp.shape(teacher):
        raise ValueError(
            f"generator_loss: found outputs of shapes {jnp.shape(student)} and {jnp.shape(teacher)}; expected those of "
            "the student and of the teacher on the same examples"
        )
    apart = student.astype(jnp.float32) - jax.lax.stop_gradient(teacher).astype(jnp.float32)
    told = jnp.mean(jax.nn.softplus(-judged.astype(jnp.float32)))
    return 0.5 * jnp.mean(jnp.sum(jnp.square(apart), axis=-1)) + adversarial * told
