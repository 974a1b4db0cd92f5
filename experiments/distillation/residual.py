"""A ResNet that was trained elsewhere as the teacher: its stages are compared, images are cropped and flipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.distillation.schools import Config, Schools
from experiments.families.ways import Network
from experiments.models import resnet

PyTree = Any


class Residual(Schools):
    """Students in training run on the statistics of their batch; those of the scored network are estimated at the end.

    The teacher's answers are kept from loss to loss, in 16 bits: all losses of a seed see the same images.
    """

    def __init__(self, config: Config, data_dir: str | None, workdir: str | None) -> None:
        super().__init__(config, data_dir, workdir)
        self._folder, self._answers = Path(data_dir or "."), dict[int, Any]()

    def student(self, seed: int) -> Network:
        """The teacher cut, or a network that was trained elsewhere."""
        if not self.config.student:
            return super().student(seed)
        weights, statistics = resnet.load(self._folder / f"{self.config.student}_cifar10.npz")
        return Network(weights | statistics, resnet.with_statistics, resnet.in_training)

    def shown(self, x: Any, number: int) -> Any:
        """Cropped and flipped at random."""
        return resnet.augmented(x, number)

    def layers(self, apply: Callable, params: PyTree, x: Any) -> tuple[Any, dict[str, Any]]:
        """Logits, and the second convolutions of the first and last block of each stage, their norms applied."""
        blocks = len({path.split("/")[1] for path in dict(jc.paths(params)) if path.startswith("layer1/")})
        logits, found = jc.trace.features(apply, params, x, match=rf"layer\d/(0|{blocks - 1})/conv2/weight")
        layers = {}
        for i, path in enumerate(sorted(found)):
            norm, y = path.replace("conv2/weight", "bn2"), jnp.moveaxis(found[path], 1, -1)
            y = (y - y.mean((0, 1, 2))) * jax.lax.rsqrt(y.var((0, 1, 2)) + 1e-5)
            layers[str(i)] = y * params[f"{norm}/weight"] + params[f"{norm}/bias"]
        return logits, layers

    def remembered(self, key: tuple[int, int], ask: Callable[[], Any]) -> Any:
        """Asked once in a seed."""
        seed, number = key
        if seed not in self._answers:
            self._answers = {seed: {}}
        known = self._answers[seed]
        if number not in known:
            known[number] = jax.tree.map(lambda x: x.astype(jnp.float16), ask())
        return jax.tree.map(lambda x: x.astype(jnp.float32), known[number])
