"""Losses of several parts for transformers, and which of the teacher's layers each of the student's follows."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, TypeVar

import jax

from jcompress.core import PyTree
from jcompress.distill.arrays import applied, summed
from jcompress.distill.hidden import Maps, cosine_errors, layer_errors
from jcompress.distill.logits import soft_targets

T = TypeVar("T")


def layer_map(student: int, teacher: int, kind: Literal["uniform", "last", "first"] = "uniform") -> tuple[int, ...]:
    """For each layer of a student the layer of the teacher that it follows, counted from 0.

    ``"uniform"``: of ``M`` and ``N`` layers the ``m``-th follows the ``m N / M``-th, counted from 1 and rounded: the
    last of each block of equals (TinyBERT; PKD-skip, which leaves the last pair to the logits). ``"last"``: the last
    ones (PKD-last). ``"first"``: the first ones.

    Args:
      student: how many layers it has.
      teacher: how many layers it has, at least as many.
      kind: which of them.

    Returns:
      Indices of the teacher's layers, increasing.

    Raises:
      ValueError: for more layers than the teacher has, none, or an unknown kind.

    Example:
      >>> import jcompress as jc
      >>> jc.distill.layer_map(4, 12), jc.distill.layer_map(4, 12, "last")
      ((2, 5, 8, 11), (8, 9, 10, 11))
    """
    if not 1 <= student <= teacher:
        raise ValueError(f"layer_map: found {student} layers for a teacher of {teacher}; expected 1 to {teacher}")
    if kind not in ("uniform", "last", "first"):
        raise ValueError(f"layer_map: kind={kind!r} is unknown; use 'uniform', 'last' or 'first'")
    if kind == "uniform":
        return tuple((m * teacher + student // 2) // student - 1 for m in range(1, student + 1))
    start = teacher - student if kind == "last" else 0
    return tuple(range(start, start + student))


def followed(layers: Sequence[T], map: Sequence[int]) -> list[T]:
    """The layers of a teacher that a student follows.

    Args:
      layers: what each of the teacher's layers put out, or its parameters.
      map: indices, such as :func:`layer_map` gives.

    Returns:
      As many as the map names, in its order.

    Raises:
      ValueError: for an index out of range.

    Example:
      >>> import jcompress as jc
      >>> jc.distill.followed("abcdef", jc.distill.layer_map(3, 6))
      ['b', 'd', 'f']
    """
    if wrong := [i for i in map if not 0 <= i < len(layers)]:
        raise ValueError(
            f"followed: the map {tuple(map)} names layer {wrong[0]}, the teacher's are 0 to {len(layers) - 1}"
        )
    return [layers[i] for i in map]


def distilbert(
    student: tuple[jax.Array, PyTree],
    teacher: tuple[jax.Array, PyTree],
    temperature: float | jax.Array = 2.0,
    weights: tuple[float, float] = (5.0, 1.0),
    where: jax.Array | None = None,
) -> jax.Array:
    """Soft targets and directions of hidden states (DistilBERT; Sanh et al. 2019, arXiv:1910.01108).

    ``5 soft_targets(logits) + 1 cosine_errors(hidden)``; add the loss of masked language modelling, which the authors
    weigh by 2. The student begins with every other layer of the teacher: :func:`jcompress.rewrite.take_layers`.

    Args:
      student: ``(logits, hidden states)``: (..., vocabulary), and (..., channels) or a pytree of them.
      teacher: the same of the teacher, of equal shapes.
      temperature: of the soft targets.
      weights: of the two terms.
      where: booleans or weights of the positions, by leading axes; all count by default.

    Returns:
      A float32 scalar, 0 where the two agree.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> logits, hidden = jnp.zeros((1, 5)), jnp.ones((1, 2))
      >>> float(jc.distill.distilbert((logits, hidden * jnp.array([1.0, -1.0])), (logits, hidden)))
      1.0
    """
    soft = soft_targets(student[0], teacher[0], temperature, where)
    return weights[0] * soft + weights[1] * cosine_errors(student[1], teacher[1], where)


def tinybert(
    student: Mapping[str, PyTree],
    teacher: Mapping[str, PyTree],
    projections: Mapping[str, Maps] | None = None,
    temperature: float | jax.Array = 1.0,
    where: Mapping[str, Any] | None = None,
) -> jax.Array:
    """Embeddings, hidden states, attention and logits (TinyBERT; Jiao et al. 2020, arXiv:1909.10351).

    ``mse(E_s W_e, E_t) + sum_l [mse(H_s W_h, H_t) + mse(A_s, A_t)] + KL(softmax(z_t / T) || softmax(z_s / T))``, with
    attention scores before the softmax. The paper trains the layers first and the logits afterwards: leave out what
    a stage does not use. Its cross entropy of the logits is the divergence, less the teacher's own entropy.

    Args:
      student: a mapping with any of ``"embeddings"`` (batch, time, channels), ``"hidden"`` and ``"attention"`` (lists,
        a layer each; scores are (batch, heads, queries, keys)) and ``"logits"``.
      teacher: the same of the teacher, with the layers that :func:`layer_map` chooses.
      projections: learned functions of the student's ``"embeddings"`` and ``"hidden"``, where widths differ;
        :func:`regressors` make such maps. One function serves all layers.
      temperature: of the logits.
      where: for each of the names booleans or weights of the positions, by leading axes; all count by default.

    Returns:
      A float32 scalar, 0 where the two agree.

    Raises:
      ValueError: for unknown names, names of one side only, or shapes that differ.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> student = {"hidden": [jnp.zeros((1, 2, 4))], "logits": jnp.zeros((1, 3))}
      >>> teacher = {"hidden": [jnp.ones((1, 2, 4))], "logits": jnp.zeros((1, 3))}
      >>> float(jc.distill.tinybert(student, teacher))
      1.0
    """
    known = ("embeddings", "hidden", "attention", "logits")
    both = isinstance(student, Mapping) and isinstance(teacher, Mapping)
    if not both or set(student) != set(teacher) or not set(student) <= set(known):
        raise ValueError(
            f"tinybert: found {sorted(student)} and {sorted(teacher)}; expected the same of {known} in both"
        )
    projections, where = projections or {}, where or {}

    def term(name: str) -> jax.Array:
        if name == "logits":
            return soft_targets(student[name], teacher[name], temperature, where.get(name))
        ours = applied("tinybert", projections.get(name), student[name])
        return layer_errors(ours, teacher[name], where.get(name))

    return summed(term(name) for name in student)
