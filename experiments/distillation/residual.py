"""A ResNet that was trained elsewhere as the teacher: its stages are compared, images are cropped and flipped."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.distillation.losses import Config, Schools
from experiments.families.ways import Network
from experiments.models import resnet

PyTree = Any
STATISTICS, WEIGHTS = "statistics", "weights"


class Residual(Schools):
    """Students in training run on the statistics of their batch; those of the scored network are estimated at the end.

    The teacher's answers are kept from loss to loss, in 16 bits: all losses of a seed see the same images.
    """

    def __init__(self, config: Config, data_dir: str | None, workdir: str | None) -> None:
        super().__init__(config, data_dir, workdir)
        self._folder, self._answers = Path(data_dir or "."), dict[int, Any]()

    def student(self, seed: int) -> Network:
        """The network that learns, in training mode."""
        if self.config.student:
            params, _ = resnet.load(self._folder / f"{self.config.student}_cifar10.npz")
            self._fixed: Callable = resnet.logits
            return Network(params, in_training)
        params, statistics = resnet.load(self._folder / f"{self.config.network.model}_cifar10.npz")
        both, x = {WEIGHTS: params, STATISTICS: statistics}, self.lab.example
        groups = jc.trace.coupling(fixed, both, x)
        scores = jc.prune.structured.l1(both, groups)
        options = {"cost": self.config.share, "scope": "group", "normalize": "mean", "at_least": 1}
        keep = jc.prune.structured.keep(scores, groups, **options)
        run, _ = jc.shrink(fixed, both, keep, x)
        self._fixed = lambda params, x, found: run({WEIGHTS: params, STATISTICS: found}, x)
        own = {name.removeprefix(f"{WEIGHTS}/"): units for name, units in keep.items()}
        apply, small = jc.shrink(in_training, params, own, x)
        return Network(small, apply)

    def score(self, network: Network, seed: int) -> dict[str, float]:
        """With statistics of augmented training images."""
        images = self.lab.load(seed).train.x[:1000]
        return self.lab.score(Network((network.tree, self._restated(network, images, seed)), self._scored), seed)

    def _scored(self, both: PyTree, x: Any) -> Any:
        return self._fixed(both[0], x, both[1])

    def _restated(self, network: Network, images: Any, seed: int) -> PyTree:
        """Mean and variance of what each convolution gives."""

        @jax.jit
        def of(params: PyTree, x: Any) -> PyTree:
            _, found = jc.trace.features(network.apply, params, x, match=r".*conv\d/weight")
            names = {path: path.replace("conv", "bn").removesuffix("weight") for path in found}
            means = {f"{name}running_mean": found[path].mean((0, 2, 3)) for path, name in names.items()}
            return means | {f"{name}running_var": found[path].var((0, 2, 3)) for path, name in names.items()}

        parts = [of(network.tree, self.shown(images[i : i + 250], i)) for i in range(0, len(images), 250)]
        return jax.tree.map(lambda *xs: sum(xs) / len(xs), *parts)

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


def in_training(params: PyTree, x: Any) -> Any:
    """Logits of a ResNet whose norms take the statistics of the batch."""
    return resnet.apply(params, x)[0]


def fixed(both: PyTree, x: Any) -> Any:
    """Logits with statistics that stand beside the weights."""
    return resnet.logits(both[WEIGHTS], x, both[STATISTICS])
