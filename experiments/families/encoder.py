"""A sentence encoder in every family: its kernels compressed, its tables in 4 bits in all rows, taught by itself."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments import data as datasets
from experiments.families.lab import Config, Lab, Network, sized, taught
from experiments.models import minilm
from experiments.quantization import sts

PyTree = Any
TABLE = jc.quantize.Int(bits=4, group_size=128, symmetric=False, clip="mse", pad=True)


class Sentences(Lab):
    """all-MiniLM-L6-v2 on pairs of SemEval 2015; what it is fitted to and taught on are sentences nobody judged.

    An example is a row of tokens, zeros behind its end. The tables of words and places are no parameters of the
    function here: they are rounded once, and count in the bytes of every row.

    Args:
      config: what to measure.
      data_dir: with the pairs, ``sentences.txt``, and the weights in a folder ``minilm``.
      longest: tokens of the sentences that it is fitted to and taught on.
      held: how many of them judge what each kernel does to the whole, and nothing else.
    """

    def __init__(self, config: Config, data_dir: str | None, longest: int = 16, held: int = 128) -> None:
        self.longest, self.held = longest, held
        super().__init__(config, data_dir)

    def _loader(self, data_dir: str | None) -> Callable[[int], datasets.Data]:
        if data_dir is None:
            raise ValueError("--data_dir is required, a folder with pairs of sentences, sentences.txt and minilm")
        self.encoder, params = minilm.load(Path(data_dir) / "minilm")
        lines = (Path(data_dir) / "sentences.txt").read_text(encoding="utf-8").splitlines()
        self.pairs = {name: sts.read(Path(data_dir) / f"sts2015_{name}.tsv", self.encoder) for name in SETS}
        self.pairs = sts.labelled(self.pairs)
        short = [x for x in self.encoder.tokens(lines) if len(x) <= self.longest]
        x, _ = minilm.pad(short, self.longest)
        parts = np.split(x, (self.held, len(x)))
        held, train, none = (datasets.Split(part, np.zeros(len(part), np.int32)) for part in parts)
        found = datasets.Data("sentences", "text", 0, train, held, none)
        rules = [("token|position", TABLE), (".*", None)]
        embeddings = {name: table["embedding"] for name, table in params["embeddings"].items() if name != "norm"}
        self.tables = jc.compress(embeddings, jc.plan(embeddings, rules))
        self._params = {**params, "embeddings": {"norm": params["embeddings"]["norm"]}}
        return lambda seed: found

    def _network(self, data: datasets.Data, data_dir: str | None) -> tuple[Callable, Callable]:
        held = {name: {"embedding": table} for name, table in jc.materialize(self.tables).items()}

        def states(params: PyTree, x: Any) -> list[jax.Array]:
            whole = {**params, "embeddings": {**held, **params["embeddings"]}}
            return self.encoder.states(whole, x, x != 0)

        self.states, self.kind = states, "pairs"
        return lambda params, x: self.encoder.pool(states(params, x)[-1], x != 0), lambda key: self._params

    def _trained(self, seed: int) -> PyTree:
        return self._params

    def divergence(self, seed: int) -> Callable[[PyTree], Any]:
        """One minus the correlation of the similarities of all pairs of sentences with what the trained network has."""
        x = jnp.asarray(self.load(seed).val.x)
        first, second = np.triu_indices(len(x), 1)

        def similarities(params: PyTree) -> Any:
            found = self.apply(params, x)
            return (found @ found.T)[first, second]

        wanted = jax.jit(similarities)(self.dense(seed))
        return lambda params: 1 - jnp.corrcoef(similarities(params), wanted)[0, 1]

    def finetuned(self, network: Network, seed: int) -> Network:
        """Towards the states of every layer, the embeddings, and how the sentences of a batch relate."""
        config, x, dense = self.config, self.load(seed).train.x, self.dense(seed)
        size, drawn = config.batch_size, np.random.default_rng(seed).permutation(len(self.load(seed).train.x))
        batches = (x[drawn[i * size : (i + 1) * size]] for i in range(config.finetuning))

        def told(states: Callable, params: PyTree, x: Any) -> tuple[list[jax.Array], jax.Array]:
            found = states(jc.materialize(params), x)
            return found[1:], self.encoder.pool(found[-1], x != 0)

        def loss(found: Any, wanted: Any) -> Any:
            layers = [jnp.square(a - b).sum() / jnp.square(b).sum() for a, b in zip(found[0], wanted[0], strict=True)]
            own, ends = found[1], wanted[1]
            relations = jnp.square(own @ own.T - ends @ ends.T).mean()
            return 1 - (own * ends).sum(-1).mean() + sum(layers) / len(layers) + 10 * relations

        tx = sized(config.finetuning_rate, config.finetuning)
        student = functools.partial(told, network.training or self.states)
        teacher = functools.partial(told, self.states, dense)
        return network._replace(tree=taught(student, network.tree, teacher, batches, tx, loss))

    def cut_training(self, params: PyTree, keep: Any) -> Callable[[PyTree, Any], Any]:
        return jc.shrink(self.states, params, keep, self.example)[0]

    def score(self, network: Network, seed: int) -> dict[str, float]:
        """The mean rank correlation with human scores."""
        own = network.apply or self.apply
        judge = sts.Judge(lambda params, x, mask: own(params, x))
        judge = self.once("judge", lambda: judge) if network.apply is None else judge
        dense = jc.materialize(network.tree)
        found = [sts.spearman(judge.pairs(dense, x), x.scores) for x in self.pairs.values()]
        return {"test_spearman": float(np.mean(found))}

    def stored(self, network: Network) -> PyTree:
        return {"tables": self.tables, "network": network.tree}


SETS = ("images", "headlines")
