"""Losses on where a network looks: maps of activations, attention of transformers."""

from __future__ import annotations

import math

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.distill.arrays import averaged, counted, divergence, pairs, rows, summed, unit


def attention_transfer(student: PyTree, teacher: PyTree, power: float = 2) -> jax.Array:
    """Distance of the maps of where activations are large (Zagoruyko & Komodakis 2017, arXiv:1612.03928).

    ``sum_l mean || Q(s_l) / ||Q(s_l)|| - Q(t_l) / ||Q(t_l)|| ||**2`` with ``Q = sum_c |a_c|**p`` over channels.
    Channels may be of any number, and the scale of the features does not count. The paper prints the norm; its square,
    which is smooth where the two agree, is what is commonly trained.

    Args:
      student: features (batch, positions..., channels), or a pytree of them.
      teacher: the same of the teacher, with the same positions.
      power: ``p`` above.

    Returns:
      A float32 scalar, 0 where the maps agree.

    Raises:
      ValueError: for trees or positions that differ, or features without positions.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> x = jnp.arange(24.0).reshape(2, 4, 3)
      >>> float(jc.distill.attention_transfer(5 * jnp.concatenate([x, x], -1), x)) < 1e-6
      True
    """

    def attention(x: jax.Array) -> jax.Array:
        if x.ndim < 3:
            raise ValueError(f"attention_transfer: found {x.shape}, expected (batch, positions..., channels)")
        most = jax.lax.stop_gradient(jnp.max(jnp.abs(x), axis=tuple(range(1, x.ndim)), keepdims=True))
        return unit(rows(jnp.sum(jnp.abs(x / jnp.where(most > 0, most, 1)) ** power, axis=-1)))

    found = pairs("attention_transfer", student, teacher, "positions")
    return summed(jnp.mean(jnp.sum(jnp.square(attention(s) - attention(t)), -1)) for s, t in found)


def attention_divergence(student: PyTree, teacher: PyTree, where: jax.Array | None = None) -> jax.Array:
    """Divergence of attention distributions, a sum over layers (MiniLM; Wang et al. 2020, arXiv:2002.10957).

    ``sum_l mean KL(softmax(t_l) || softmax(s_l))`` over the last axis. TinyBERT takes :func:`layer_errors` of the
    scores before the softmax in its place.

    Args:
      student: attention scores (batch, heads, queries, keys), or a pytree of them; keys that are masked may be
        ``-inf`` in both.
      teacher: the same of the teacher, of equal shapes.
      where: booleans or weights (batch, queries) of the queries; all count by default.

    Returns:
      A float32 scalar, at least 0, and 0 where the two agree.

    Raises:
      ValueError: for trees or shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> scores = jnp.zeros((1, 2, 3, 3))
      >>> float(jc.distill.attention_divergence(scores + 1.0, scores))
      0.0
    """
    return summed(_of_queries(s, t, where) for s, t in pairs("attention_divergence", student, teacher))


def value_relations(student: PyTree, teacher: PyTree, where: jax.Array | None = None) -> jax.Array:
    """Divergence of what values have in common, a sum over layers (MiniLM; Wang et al. 2020, arXiv:2002.10957).

    :func:`attention_divergence` of ``V V^T / sqrt(d)``. The width ``d`` of the heads may differ, so the student may be
    of any width; queries or keys in place of the values are MiniLMv2's (2012.15828).

    Args:
      student: values (batch, heads, positions, d), or a pytree of them.
      teacher: the same of the teacher, of any ``d``.
      where: booleans (batch, positions) of the positions that count, as queries and as keys; all by default.

    Returns:
      A float32 scalar, at least 0, and 0 where the two agree.

    Raises:
      ValueError: for trees, heads or positions that differ.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> x = jax.random.normal(jax.random.key(0), (2, 4, 5, 8))
      >>> float(jc.distill.value_relations(x, x))
      0.0
    """

    def scores(x: jax.Array) -> jax.Array:
        x = counted(x, None if where is None else jnp.broadcast_to(jnp.asarray(where)[:, None], x.shape[:-1]))
        found = jnp.einsum("...qd,...kd->...qk", x, x, precision="highest") / math.sqrt(x.shape[-1])
        return found if where is None else jnp.where(jnp.asarray(where)[:, None, None] > 0, found, -1e30)

    found = pairs("value_relations", student, teacher, "positions")
    return summed(_of_queries(scores(s), scores(t), where) for s, t in found)


def _of_queries(s: jax.Array, t: jax.Array, where: jax.Array | None) -> jax.Array:
    s, t = (counted(jnp.swapaxes(x, 1, 2), where) for x in (s, t))
    return averaged(divergence(jax.nn.log_softmax(t), jax.nn.log_softmax(s)), where)
