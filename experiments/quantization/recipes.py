"""How a sentence encoder is compressed: rules for its parameters, and what they are fitted to."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments.models import minilm
from experiments.quantization import selfdistill
from experiments.runner import Way, describe
from jcompress import core

PyTree = Any
Rules = Sequence[tuple[str, Any]]
Batches = list[tuple[np.ndarray, np.ndarray]]


def recipe(
    name: str,
    family: str,
    rules: Rules | Callable[[Calibration], jc.Plan],
    *,
    sequential: bool = False,
    corrected: bool = False,
    training: selfdistill.Training | None = None,
) -> Way:
    """A way to compress an encoder.

    Args:
      name: of the row.
      family: the method, which gives the colour in the picture.
      rules: ordered pairs of a pattern and a method, as for ``jcompress.plan``; or a function that gives a plan for
        a :class:`Calibration`.
      sequential: whether each layer is fitted after those before it, to what they give once compressed.
      corrected: whether biases make up for the shift of mean outputs.
      training: how kernels, scales, biases and norms are trained afterwards; None for not at all.
    """

    def make(calibration: Calibration, seed: int) -> PyTree:
        tree = calibration.compress(rules, jax.random.key(seed), sequential=sequential, corrected=corrected)
        if training is None:
            return tree
        return selfdistill.train(calibration.encoder, calibration.params, tree, calibration.tokens, training)

    def told(calibration: Calibration) -> Any:
        return describe({"rules": rules, "sequential": sequential, "corrected": corrected, "training": training})

    return Way(name, make, told, family)


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compressed how, and how many sentences nobody judged are for what."""

    ways: tuple[Way, ...]
    widths: dict[str, dict[str, Any]]  # methods to compare by the error of each kernel's outputs, by name of the row
    name: str = "minilm"
    data: str = "sts2015"
    sets: tuple[str, ...] = ("images", "headlines")
    only: str = ""  # some of the ways, joined by commas; all of them by default
    validation: int = 300
    calibration: int = 768
    calibration_length: int = 24


class Calibration:
    """Statistics of the dense model on a few sentences; each is gathered once.

    Args:
      encoder: the model.
      params: its dense parameters.
      tokens: sentences nobody judged.
      count: how many of them to use.
      length: those of at most so many tokens are used.
    """

    def __init__(
        self, encoder: minilm.Encoder, params: PyTree, tokens: Sequence[Sequence[int]], count: int, length: int
    ) -> None:
        self.encoder, self.params, self.tokens = encoder, params, tokens
        short = [x for x in tokens if len(x) <= length][:count]
        if not short:
            raise ValueError(f"config.calibration: no sentence has at most {length} tokens")
        size = min(64, len(short))
        starts = range(0, len(short) - size + 1, size)
        self.batches: Batches = [minilm.pad(short[i : i + size], length) for i in starts]
        self._found: dict[tuple[str, ...], Any] = {}
        self._shared: dict[str, Any] = {}

    def stats(self, needed: Sequence[str]) -> Any:
        """``{path: statistics}`` of the kernels, for methods that need these."""
        names = tuple(sorted(need.split(".")[1] for need in needed if need.startswith("stats.")))
        if names and names not in self._found:
            kernels = jc.plan(self.params, [(KERNELS, jc.quantize.Int()), (".*", None)])
            self._found[names] = jc.calibrate(self.encoder, self.params, self.batches, kernels, statistics=names)
        return self._found.get(names)

    def strayed(self, batches: int) -> jc.budget.Measure:
        """How far one compressed leaf changes which sentences are alike.

        One minus the correlation between the similarities of all pairs of sentences of a batch and those that the
        dense model gives.
        """
        with jax.default_matmul_precision("highest"):
            few = [(*x, self.encoder(self.params, *x)) for x in self.batches[:batches]]

        def loss(params: PyTree, batches: Any) -> jax.Array:
            return jnp.stack([1 - _alike(self.encoder(params, x, mask), z) for x, mask, z in batches]).mean()

        return jc.budget.loss_change(loss, self.params, few)

    def once(self, name: str, make: Callable[[], Any]) -> Any:
        """What ``make`` gives, made once: for what several rows share."""
        if name not in self._shared:
            self._shared[name] = make()
        return self._shared[name]

    def compress(
        self,
        rules: Rules | Callable[[Calibration], jc.Plan],
        key: jax.Array,
        *,
        sequential: bool = False,
        corrected: bool = False,
    ) -> PyTree:
        """The compressed tree, before any training; see :func:`recipe`."""
        plan = rules(self) if callable(rules) else jc.plan(self.params, rules)
        if sequential:
            return jc.compress_sequentially(self.encoder, self.params, self.batches, plan, key=key)
        tree = jc.compress(self.params, plan, key=key, stats=self.stats(core.needs(*filter(None, plan.values()))))
        return self._corrected(tree) if corrected else tree

    def _corrected(self, tree: PyTree) -> PyTree:
        """The same with corrected biases, in the form they had."""
        nodes = jc.paths(tree)
        loose = [core.dense(x) if path.endswith("bias") else x for path, x in nodes]
        treedef = jax.tree.structure(tree, is_leaf=core.is_node)
        stats = self.stats(["stats.sum", "stats.count"])
        found = jc.rewrite.correct_biases(self.params, jax.tree.unflatten(treedef, loose), stats)
        pairs = zip(nodes, jc.paths(found), strict=True)
        done = [x.project(y) if path.endswith("bias") and core.is_node(x) else y for (path, x), (_, y) in pairs]
        return jax.tree.unflatten(treedef, done)


def _alike(x: jax.Array, z: jax.Array) -> jax.Array:
    """The correlation of the similarities in two sets of embeddings, (sentences, width)."""
    first, second = np.triu_indices(len(x), 1)
    return jnp.corrcoef((x @ x.T)[first, second], (z @ z.T)[first, second])[0, 1]


def words_read(params: PyTree, tokens: Sequence[Sequence[int]]) -> jc.trace.Calibration:
    """How often each row of the table of words is read for some sentences."""
    looked_up = lambda params, x, mask: params["embeddings"]["token"]["embedding"][x]  # noqa: E731
    batches = (minilm.pad(tokens[i : i + 1024]) for i in range(0, len(tokens), 1024))
    return jc.calibrate(looked_up, params, batches, statistics=["counts"], where=lambda x, mask: mask)


KERNELS = "layer_.*/kernel"
TABLES = "embeddings/(token|position)/embedding"


@jax.jit
def _output_error(gram: jax.Array, change: jax.Array) -> jax.Array:
    change = change.astype(jnp.float32)
    return jnp.sum(change * jnp.matmul(gram, change, precision=jax.lax.Precision.HIGHEST))


def output_errors(calibration: Calibration, method: Any) -> dict[str, float]:
    """For each kernel ``tr(dW^T H dW) / tr(W^T H W)``, the part of the squared outputs that a method changes."""
    plan = jc.plan(calibration.params, [(KERNELS, method), (".*", None)])
    stats = calibration.stats(["stats.gram"])
    found = dict(jc.paths(jc.materialize(jc.compress(calibration.params, plan, key=jax.random.key(0), stats=stats))))
    errors = {}
    for path, w in jc.paths(calibration.params):
        if plan[path] is not None:
            gram = stats[path].gram
            errors[path] = float(_output_error(gram, found[path] - w) / _output_error(gram, w))
    return errors
