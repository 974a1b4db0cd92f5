"""Statistics of a decoder's kernels on windows of text, layer by layer, and compressing by them.

One layer's statistics are in memory at a time: those of the dense model are on disk, those of a compressed one are
used as soon as they are gathered.
"""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments.language import text
from experiments.models import llama
from jcompress import core

PyTree = Any
KERNELS = ("attention/q", "attention/k", "attention/v", "attention/out", "mlp/gate", "mlp/up", "mlp/down")
KERNEL = r"layers/\d+/.*/kernel"
LAYOUT = jc.Layout(inputs=(-2,), outputs=(-1,))
NAMES = ("gram", "count")
Weights = list[dict[str, np.ndarray]]
Rules = Sequence[tuple[str, Any]]


class Calibration:
    """The dense model and what its kernels meet.

    ``kind`` says how positions count: ``"plain"``, all alike; ``"guided"``, by the squared gradient of the loss
    (:func:`jcompress.trace.position_weights`); ``"attended"``, as plain but in the values, where a position counts by
    the squares of the attention that is paid to it: an error there moves what attention gives by as much.

    Args:
      params: dense, layers as a list.
      config: the model.
      windows: of tokens, each with one more.
      folder: where statistics are kept.
    """

    def __init__(self, params: PyTree, config: llama.Config, windows: np.ndarray, folder: Path) -> None:
        self.params, self.config, self.windows, self.folder = params, config, windows, folder

    def stats(self, kind: str, layer: int) -> jc.trace.Calibration:
        """Of one layer of the dense model, by whole paths."""
        path = self.folder / f"{kind}-{layer}.npz"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            run = _Streams(self.params, self.config, self.windows, self._weights(kind))
            for i, found in enumerate(self.params["layers"]):
                _write(self.folder / f"{kind}-{i}.npz", run.stats(kind, i, found, advance=True))
        return _read(path)

    def compress(
        self, rules: Rules, kind: str = "plain", sequential: bool = False, layers: Sequence[PyTree] = (), seed: int = 0
    ) -> list[PyTree]:
        """The layers with nodes: all that :meth:`compressed` gives."""
        return list(self.compressed(rules, kind, sequential, layers, seed))

    def compressed(
        self, rules: Rules, kind: str = "plain", sequential: bool = False, layers: Sequence[PyTree] = (), seed: int = 0
    ) -> Iterator[PyTree]:
        """One layer with nodes after the other; no more is read of a dense one than its own turn.

        Args:
          rules: as for ``jcompress.plan``, of paths such as ``layers/0/attention/q/kernel``; for each layer those that
            match some path of it.
          kind: how positions count.
          sequential: whether each layer meets what the compressed ones before it give, as
            :func:`jcompress.compress_sequentially` has it; the kernels of one layer are fitted at once.
          layers: in place of the dense model's; for rules that need no statistics.
          seed: of what is drawn at random.
        """
        run = None
        if sequential:
            run = _Streams(self.params, self.config, self.windows, self._weights(kind))
        for i, layer in enumerate(layers or self.params["layers"]):
            part = {"layers": {str(i): layer}}
            own = [path for path, _ in jc.paths(part)]
            plan = jc.plan(part, [rule for rule in rules if any(re.fullmatch(rule[0], path) for path in own)])
            stats = None
            if any(need.startswith("stats") for method in plan.values() if method for need in core.needs(method)):
                stats = self.stats(kind, i) if run is None else run.stats(kind, i, layer)
            node = jc.compress(part, plan, key=jax.random.key(1000 * seed + i), stats=stats)["layers"][str(i)]
            if run is not None:
                run.advance(jc.materialize(node))
            yield node

    def _weights(self, kind: str) -> Weights | None:
        """Of each window, by path in stacked layers: (layers, 1, positions, 1)."""
        if kind != "guided":
            return None
        path = self.folder / "weights.npz"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            found = self._guided()
            with path.with_suffix(".part").open("wb") as file:
                np.savez(file, **{name: np.stack([w[name] for w in found]) for name in found[0]})
            path.with_suffix(".part").rename(path)
        with np.load(path) as found:
            whole = {name.replace(":", "/"): found[name] for name in found}
        return [{name: w[n] for name, w in whole.items()} for n in range(len(self.windows))]

    def _guided(self) -> Weights:
        """One gradient of the loss for each window, with layers in a loop: it is compiled once."""
        stacked = llama.stack(self.params)

        def loss(params: PyTree, window: jax.Array) -> jax.Array:
            return llama.losses(llama.apply(params, window[:, :-1], self.config), window).mean()

        def one(params: PyTree, window: jax.Array) -> dict[str, jax.Array]:
            found = jc.trace.position_weights(loss, params, window)
            return {kernel: found[f"layers/{kernel}/kernel"][0] for kernel in KERNELS}

        run = jax.jit(one)
        return [{k.replace("/", ":"): np.asarray(w) for k, w in run(stacked, x[None]).items()} for x in self.windows]


class _Streams:
    """The residual stream of every window before one layer after the other."""

    def __init__(self, params: PyTree, config: llama.Config, windows: np.ndarray, weights: Weights | None) -> None:
        self.config, self.weights = config, weights
        self.x = [llama.embed(params, window[None, :-1]) for window in windows]

    def stats(self, kind: str, i: int, layer: PyTree, advance: bool = False) -> jc.trace.Calibration:
        """What the kernels of a layer meet, summed over windows; then, if wanted, go behind this layer."""
        found = None
        for n, x in enumerate(self.x):
            where = None if self.weights is None else {f"{k}/kernel": w[i] for k, w in self.weights[n].items()}
            y, found = _met(layer, x, where, found, self.config, kind)
            self.x[n] = y if advance else x
        assert found is not None
        return jc.trace.Calibration({f"layers/{i}/{path}": stats for path, stats in found.items()})

    def advance(self, layer: PyTree) -> None:
        """Go behind a layer."""
        self.x = [text.layer(layer, x, self.config) for x in self.x]


@functools.partial(jax.jit, static_argnames=("config", "kind"), donate_argnums=3)
def _met(
    layer: PyTree, x: jax.Array, where: Any, before: Any, config: llama.Config, kind: str
) -> tuple[jax.Array, jc.trace.Calibration]:
    """The residual stream behind a layer, and what its kernels met."""
    places = jnp.arange(x.shape[1], dtype=jnp.int32)
    if kind == "attended":
        where = {"attention/v/kernel": _received(layer, x, config, places)}
    wanted = {f"{kernel}/kernel": ("gram", "count") for kernel in KERNELS}
    run = functools.partial(llama.block, config=config, positions=places)
    (y, _), found = jc.trace.observe(run, layer, x, statistics=wanted, where=where)
    return y, found if before is None else before.merge(found)


def _received(layer: PyTree, x: jax.Array, config: llama.Config, places: jax.Array) -> jax.Array:
    """The squares of what is paid to each position, to a mean of 1: (1, positions, 1)."""
    y = llama.norm(layer["attention_norm"], x, config.eps)
    q, k = (llama.dense(layer["attention"][n], y).reshape(*x.shape[:2], -1, config.head_dim) for n in "qk")
    q, k = (llama.rotate(z, places, config.theta) for z in (q, k))
    paid = jnp.square(llama.attend(q, k, config, places, places)).sum(-2).mean((1, 2))
    return (paid / paid.mean())[..., None]


def _write(path: Path, found: jc.trace.Calibration) -> None:
    arrays = {f"{p.replace('/', ':')}.{name}": np.asarray(getattr(s, name)) for p, s in found.items() for name in NAMES}
    scratch = path.with_suffix(".part")
    with scratch.open("wb") as file:
        np.savez(file, **arrays)
    scratch.rename(path)


def _read(path: Path) -> jc.trace.Calibration:
    with np.load(path) as found:
        by_path: dict[str, dict[str, Any]] = {}
        for name in found:
            key, _, field = name.rpartition(".")
            by_path.setdefault(key.replace(":", "/"), {})[field] = jnp.asarray(found[name])
    return jc.trace.Calibration(
        {path: jc.trace.Stats(**fields, axes=(-2,), layout=LAYOUT) for path, fields in by_path.items()}
    )
