"""Bits by budget: each kernel of a decoder gets one of several methods, so that the loss grows least."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.language.calibration import KERNEL, KERNELS, Calibration, Rules
from experiments.models import llama

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Mixture:
    """One method for each kernel under a budget.

    A kernel's error is what its outputs move on the calibration text, as a part of them, times what such a part adds to
    the cross-entropy with the dense model's predictions, measured with this kernel alone compressed.

    Attributes:
      methods: to choose from.
      budget: the index of the one whose bytes for all kernels are the most that the choice may take.
      length: tokens of the window in which the cross-entropy is measured.
    """

    methods: tuple[Any, ...]
    budget: int
    length: int = 128

    def __call__(self, calibration: Calibration, kind: str) -> Rules:
        """A rule for each kernel, as for ``jcompress.plan``."""
        params, known = calibration.params, _Known(calibration, kind)
        plans = {str(i): jc.plan(params, [(KERNEL, m), (".*", None)]) for i, m in enumerate(self.methods)}
        window = jnp.asarray(calibration.windows[:1, : self.length])
        goal = jax.nn.softmax(llama.apply(llama.stack(params), window, calibration.config))

        def loss(params: PyTree, window: jax.Array, goal: jax.Array) -> jax.Array:
            found = jax.nn.log_softmax(llama.apply(llama.stack(params), window, calibration.config))
            return -jnp.mean(jnp.sum(goal * found, -1))

        middle, moved = str(self.budget), jc.budget.output_error(known, relative=True)
        tree = jc.compress(params, plans[middle], stats=known)
        measure = jc.budget.by_loss(loss, params, tree, window, goal, measure=moved)
        found = jc.budget.options(params, plans, measure=measure, stats=known)
        most = sum(costs[middle] for costs in found.costs.values())
        chosen = jc.budget.allocate(plans, found.errors, found.costs, most)
        return tuple((re.escape(path), method) for path, method in chosen.items() if method is not None)


class _Known(Mapping):
    """Statistics by path, of one layer in memory at a time."""

    def __init__(self, calibration: Calibration, kind: str) -> None:
        self.calibration, self.kind, self.layer = calibration, kind, -1
        self.found: Any = None

    def __getitem__(self, path: str) -> Any:
        if not re.fullmatch(KERNEL, path):
            raise KeyError(path)
        layer = int(path.split("/")[1])
        if layer != self.layer:
            self.layer, self.found = layer, self.calibration.stats(self.kind, layer)
        return self.found[path]

    def __iter__(self) -> Iterator[str]:
        layers = range(len(self.calibration.params["layers"]))
        return (f"layers/{i}/{kernel}/kernel" for i in layers for kernel in KERNELS)

    def __len__(self) -> int:
        return len(list(iter(self)))
