"""Sequences: what a teacher finds most likely, and the loss of a student on it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jcompress.core import PyTree
from jcompress.distill.arrays import averaged, counted, wide

Step = Callable[[PyTree, jax.Array], tuple[jax.Array, PyTree]]


class Beams(NamedTuple):
    """What :func:`beam_search` found, the most likely first.

    Attributes:
      tokens: int32 (beams, length); after the first end there are ends only.
      log_probs: float32 (beams,), of the whole sequences; ``-inf`` where there are fewer sequences than beams.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> jc.distill.Beams(jnp.zeros((1, 2), int), jnp.zeros(1)).tokens.shape
      (1, 2)
    """

    tokens: jax.Array
    log_probs: jax.Array


def beam_search(
    step: Step, state: PyTree, start: int | jax.Array, end: int, beams: int, length: int, length_penalty: float = 0.0
) -> Beams:
    """The most likely sequences of a model, by beam search: targets of sequence-level distillation.

    Kim & Rush (2016, arXiv:1606.07947) train the student on what the teacher's search gives. One beam is greedy; as
    many as there are prefixes find the exact maximum. ``vmap`` it over a batch of states.

    Args:
      step: ``step(state, token) -> (logits (vocabulary,), state)`` of one sequence, such as a decoder with its cache.
      state: before the first token.
      start: the token that begins a sequence; it is not among what is found.
      end: the token that ends one.
      beams: how many are kept.
      length: the most tokens, the end included.
      length_penalty: ``a``: sequences are ranked by ``log p / n**a``, ``n`` their tokens up to the end.

    Returns:
      :class:`Beams`.

    Raises:
      ValueError: for no beam or no token.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> table = jnp.log(jnp.array([[0.6, 0.4, 0.0], [0.1, 0.1, 0.8], [0.0, 0.0, 1.0]]))
      >>> found = jc.distill.beam_search(lambda state, token: (table[token], state), (), 0, end=2, beams=4, length=2)
      >>> found.tokens[0].tolist()
      [0, 0]
    """
    if beams < 1 or length < 1:
        raise ValueError(f"beam_search: found {beams} beams and length {length}, expected 1 at least of both")
    states = jax.tree.map(lambda x: jnp.broadcast_to(x, (beams, *jnp.shape(x))), state)
    first = jnp.where(jnp.arange(beams) == 0, 0.0, -jnp.inf)  # all begin alike: one is enough
    last = jnp.full(beams, start, jnp.int32)
    ended, counts = jnp.zeros(beams, bool), jnp.zeros(beams, jnp.int32)
    carry = states, last, first, ended, counts, jnp.full((beams, length), end, jnp.int32)

    def extend(carry: Any, place: jax.Array) -> tuple[Any, None]:
        states, last, total, ended, counts, tokens = carry
        logits, states = jax.vmap(step)(states, last)
        log_probs = jax.nn.log_softmax(wide(logits))
        only_end = jnp.where(jnp.arange(log_probs.shape[-1]) == end, 0.0, -jnp.inf)
        reached = total[:, None] + jnp.where(ended[:, None], only_end, log_probs)
        counts = jnp.where(ended, counts, counts + 1)
        ranked = reached / jnp.maximum(counts, 1)[:, None].astype(reached.dtype) ** length_penalty
        _, best = jax.lax.top_k(ranked.ravel(), beams)
        parents, last = jnp.divmod(best, log_probs.shape[-1])
        states = jax.tree.map(lambda x: x[parents], states)
        tokens = tokens[parents].at[:, place].set(last.astype(jnp.int32))
        ended = ended[parents] | (last == end)
        return (states, last.astype(jnp.int32), reached.ravel()[best], ended, counts[parents], tokens), None

    (_, _, total, _, _, tokens), _ = jax.lax.scan(extend, carry, jnp.arange(length))
    return Beams(tokens, total)


def sequence_errors(
    student: jax.Array, tokens: jax.Array, end: int | None = None, where: jax.Array | None = None
) -> jax.Array:
    """Cross entropy of a student on the sequences of a teacher (Kim & Rush 2016, arXiv:1606.07947).

    ``-sum_i sum_t log p(y_t | y_<t) / number of tokens``, up to the first end, the end included. Of several beams,
    weigh each by ``where``, as the softmax of their log probabilities.

    Args:
      student: logits (..., time, vocabulary) at each place, given the tokens before.
      tokens: integers (..., time), such as ``Beams.tokens``.
      end: the token that ends a sequence; what follows does not count.
      where: booleans or weights (..., time) of the places; all count by default.

    Returns:
      A float32 scalar.

    Raises:
      ValueError: for shapes that do not fit.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> round(float(jc.distill.sequence_errors(jnp.zeros((1, 3, 4)), jnp.array([[2, 1, 1]]), end=1)), 4)
      1.3863
    """
    student = wide(student)
    if student.shape[:-1] != jnp.shape(tokens):
        raise ValueError(f"sequence_errors: found logits {student.shape} for tokens {jnp.shape(tokens)}")
    weight = jnp.ones(jnp.shape(tokens)) if where is None else jnp.asarray(where, jnp.float32)
    if end is not None:
        ends = jnp.cumsum(tokens == end, axis=-1) - (tokens == end)
        weight = jnp.where(ends == 0, weight, 0)
    log_probs = jax.nn.log_softmax(counted(student, weight))
    return averaged(-jnp.take_along_axis(log_probs, tokens[..., None], axis=-1)[..., 0], weight)
