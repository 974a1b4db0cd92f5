"""Training of a quantized sentence encoder to say what the dense one says, on sentences nobody judged.

The weights behind the codes of a kernel train straight through the rounding (Bengio et al. 2013, arXiv:1308.3432), its
scales by their gradient. The student starts where the node it is given stands, and learns the states of every layer and
the embedding (Jiao et al. 2020, arXiv:1909.10351), and how sentences relate (Park et al. 2019, arXiv:1904.05068).
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from tqdm import tqdm

import jcompress as jc
from experiments.models import minilm
from jcompress import core
from jcompress.formats import Cast, Quantized
from jcompress.formats.quantized import spread

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Training:
    """A short run of Adam.

    Attributes:
      steps: the number of steps.
      learning_rate: of scales, biases and norms at its peak; it rises for a twentieth of the steps and falls as a
        cosine.
      weights_rate: that of the weights behind the codes, as a part of it.
      batch_size: sentences a step.
      length: sentences of at most so many tokens are used, padded to it: one shape to compile.
      states: weight of the relative squared error of the layers' states, beside the cosine of embeddings.
      relations: weight of the squared error of the similarities between the sentences of a batch.
      seed: of the order of the sentences.
    """

    steps: int = 300
    learning_rate: float = 2e-4
    weights_rate: float = 0.1
    batch_size: int = 32
    length: int = 16
    states: float = 1.0
    relations: float = 10.0
    seed: int = 0


class Student(NamedTuple):
    """What trains: for a quantized kernel its weights and its scale, for all else its values."""

    kernels: dict[str, dict[str, jax.Array]]
    others: dict[str, jax.Array]


def fake(node: Quantized, weights: jax.Array, scale: jax.Array) -> jax.Array:
    """``scale * level``, the level that of the code nearest to ``weights`` at the node's own scale, which stays.

    So the codes train apart from the scale. Rounding counts as the identity, backward: weights get their gradient
    times ``scale / node.scale``, scales the sum of ``level`` times it. A scale that also chose the codes would get no
    gradient at the start, where weights lie on the grid.

    Args:
      node: gives the grid, the zero points and the scale that codes are found at.
      weights: float32, what is rounded.
      scale: float32, in the shape of the node's.
    """
    levels = node.encode(jax.lax.stop_gradient(weights)).levels(jnp.float32)
    ratio = weights / spread(jax.lax.stop_gradient(node.scale), weights, node.group_size)
    return spread(scale, weights, node.group_size) * (levels + ratio - jax.lax.stop_gradient(ratio))


def train(
    encoder: minilm.Encoder, dense: PyTree, tree: PyTree, tokens: Sequence[Sequence[int]], training: Training
) -> PyTree:
    """Train the kernels, biases and norms of a compressed encoder; its tables stay.

    Args:
      encoder: the model.
      dense: parameters of the teacher, and the tree's in its dense form.
      tree: compressed; kernels that are ``Quantized`` train with their scales, other nodes than casts stay as they are.
      tokens: sentences.
      training: how.

    Returns:
      A tree of the structure of ``tree``.
    """
    nodes = dict(jc.paths(tree))
    quantized = {p: x for p, x in nodes.items() if isinstance(x, Quantized) and "layer_" in p}
    plain = {p: x for p, x in nodes.items() if isinstance(x, Cast) or not core.is_node(x)}
    held = {p: core.dense(x) for p, x in nodes.items() if p not in quantized and p not in plain}
    grids = {p: dataclasses.replace(x, scale=core.dense(x.scale).astype(jnp.float32)) for p, x in quantized.items()}
    kernels = {p: {"w": core.dense(x), "scale": grids[p].scale} for p, x in quantized.items()}
    student = Student(kernels, {p: core.dense(x).astype(jnp.float32) for p, x in plain.items()})
    treedef = jax.tree.structure(dense)

    def forward(student: Student, held: PyTree, grids: PyTree) -> PyTree:
        found = {**held, **student.others}
        for path, x in student.kernels.items():
            found[path] = fake(grids[path], x["w"], x["scale"])
        return jax.tree.unflatten(treedef, [found[path] for path in nodes])

    student = _fit(encoder, dense, forward, student, (held, grids), tokens, training)
    done = {p: _stored(x, grids[p], student.kernels[p]) for p, x in quantized.items()}
    done |= {p: _like(x, student.others[p]) for p, x in plain.items()}
    is_node = core.is_node
    return jax.tree.unflatten(jax.tree.structure(tree, is_leaf=is_node), [done.get(p, x) for p, x in nodes.items()])


def _stored(node: Quantized, grid: Quantized, found: dict[str, jax.Array]) -> Quantized:
    """The node with its trained scale, in the form it had, and the codes of the trained weights."""
    return dataclasses.replace(grid.encode(found["w"]), scale=_like(node.scale, found["scale"]))


def _like(x: Any, value: jax.Array) -> Any:
    return x.project(value) if core.is_node(x) else value.astype(x.dtype)


def _fit(
    encoder: minilm.Encoder,
    teacher: PyTree,
    forward: Any,
    student: Student,
    rest: tuple,
    tokens: Sequence[Sequence[int]],
    training: Training,
) -> Student:
    rate = optax.warmup_cosine_decay_schedule(0.0, training.learning_rate, training.steps // 20 + 1, training.steps)
    slow = Student(
        {p: {"w": training.weights_rate, "scale": 1.0} for p in student.kernels}, dict.fromkeys(student.others, 1.0)
    )
    parts = optax.stateless(lambda updates, _: jax.tree.map(lambda u, part: u * part, updates, slow))
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(rate), parts)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(student: Student, state: Any, teacher: PyTree, rest: tuple, x: jax.Array, mask: jax.Array) -> tuple:
        target = encoder.states(teacher, x, mask)

        def loss(student: Student) -> jax.Array:
            found = encoder.states(forward(student, *rest), x, mask)
            ends = encoder.pool(found[-1], mask), encoder.pool(target[-1], mask)
            cosine = 1 - jnp.sum(ends[0] * ends[1], -1).mean()
            errors = [jnp.square(a - b).sum() / jnp.square(b).sum() for a, b in zip(found, target, strict=True)]
            relations = jnp.square(ends[0] @ ends[0].T - ends[1] @ ends[1].T).mean()
            return cosine + training.states * sum(errors) / len(errors) + training.relations * relations

        grads = jax.grad(loss)(student)
        updates, state = tx.update(grads, state, student)
        return optax.apply_updates(student, updates), state

    student = jax.tree.map(jnp.copy, student)
    state = tx.init(student)
    batches = itertools.islice(_batches(tokens, training), training.steps)
    for x, mask in tqdm(batches, total=training.steps, unit="step", disable=None, leave=False):
        student, state = step(student, state, teacher, rest, x, mask)
    return student


def _batches(tokens: Sequence[Sequence[int]], training: Training) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Batches of sentences, in a new order each epoch."""
    rng, size = np.random.default_rng(training.seed), training.batch_size
    short = [x for x in tokens if len(x) <= training.length]
    if len(short) < size:
        raise ValueError(
            f"training: found {len(short)} sentences of at most {training.length} tokens, fewer than {size}"
        )
    while True:
        order = rng.permutation(len(short))
        for start in range(0, len(short) - size + 1, size):
            yield minilm.pad([short[i] for i in order[start : start + size]], training.length)
