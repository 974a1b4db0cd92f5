"""Whole heads, channels and layers cut from a decoder, by what they do on the calibration text or by chance."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments.language import text
from experiments.language.calibration import Calibration
from experiments.models import llama
from jcompress.prune import structured

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Cut:
    """Fewer multiply-adds in the layers.

    Attributes:
      what: ``"units"``, keys and values with the queries that they serve, and channels of the feed-forward layer, in
        each layer; or ``"layers"``.
      share: of the multiply-adds of the layers that stays.
      by: ``"score"``: of units the summed magnitudes of the kernels that read them, each times the norm of what it
        meets; of layers how far they turn the residual stream (Men et al. 2024, arXiv:2403.03853). Or ``"chance"``.
    """

    what: Literal["units", "layers"]
    share: float = 0.5
    by: Literal["score", "chance"] = "score"

    def __call__(self, calibration: Calibration, seed: int = 0) -> list[PyTree]:
        """The layers that stay, dense."""
        return (_units if self.what == "units" else _layers)(self, calibration, seed)


def _layers(cut: Cut, calibration: Calibration, seed: int) -> list[PyTree]:
    layers = calibration.params["layers"]
    stays = round(cut.share * len(layers))
    chance = np.random.default_rng(seed).random(len(layers))
    influence = chance if cut.by == "chance" else turned(calibration)
    return [layers[i] for i in sorted(np.argsort(-influence, kind="stable")[:stays])]


def turned(calibration: Calibration) -> np.ndarray:
    """One minus the mean cosine between what enters each layer and what leaves it."""
    found = np.zeros(len(calibration.params["layers"]))
    for window in calibration.windows:
        x = llama.embed(calibration.params, window[None, :-1])
        for i, layer in enumerate(calibration.params["layers"]):
            y = text.layer(layer, x, calibration.config)
            found[i] += 1 - float(jnp.mean(_cosine(x, y)))
            x = y
    return found / len(calibration.windows)


def _cosine(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.sum(x * y, -1) / (jnp.linalg.norm(x, axis=-1) * jnp.linalg.norm(y, axis=-1))


def _units(cut: Cut, calibration: Calibration, seed: int) -> list[PyTree]:
    config = calibration.config
    x = jax.ShapeDtypeStruct((1, 8, config.width), jnp.float32)
    run = functools.partial(llama.block, config=config, positions=np.arange(8, dtype=np.int32))
    fn = lambda layer, x: run(layer, x)[0]  # noqa: E731
    layers = calibration.params["layers"]
    groups = {name: g for name, g in jc.trace.coupling(fn, layers[0], x).items() if _is_chosen(g, config)}
    made = []
    for i, layer in enumerate(layers):
        scores = structured.random(groups, jax.random.key(1000 * seed + i))
        if cut.by == "score":
            stats = calibration.stats("plain", i)
            own = {path.split("/", 2)[2]: found for path, found in stats.items()}
            scores = structured.importance(layer, groups, _met, members="consumers", stats=own)
        keep = structured.keep(scores, jc.trace.coupling(fn, layer, x), cost=cut.share)
        made.append(jc.shrink(fn, layer, keep, x)[1])
    return made


def _met(w: jax.Array, context: jc.Context) -> jax.Array:
    return jnp.abs(w) * context.stats.norm[:, None]


def _is_chosen(group: Any, config: llama.Config) -> bool:
    """Heads of keys with all that they serve, and channels of the feed-forward layer; not channels of heads."""
    paths = {path for path, _ in group.members}
    heads = {"attention/k/kernel", "attention/out/kernel"} <= paths and group.size == config.kv_heads
    return heads or "mlp/down/kernel" in paths
