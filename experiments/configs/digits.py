"""scikit-learn's digits: 1,797 images of 8x8, embedded, so nothing is downloaded.

Command: python -m experiments.compress

Expect, over 3 seeds, test accuracy of LeNet-300-100 97.2 +- 1.0 percent (203 kB) and of the CNN 98.4 +- 0.3
percent (55 kB) as dense baselines; 4 bits 97.1 and 98.6 percent at 29 and 8.5 kB; 90 percent pruned gradually 97.7
and 98.1 percent; pruned, shared and fine-tuned (deep_compression) 97.5 percent at 7.6 kB (26.8x) and 97.9 percent at
3.2 kB (17x); a random mask 96.4 and 85.7 percent. Time: 190 CPU seconds; 3 min 49 s on two busy cores.
"""

from __future__ import annotations

import math
import re
from typing import Any

import optax
from ml_collections import ConfigDict

import jcompress as jc
from experiments.stages import Stage

KERNELS = ".*/kernel"
SPARSITY = 0.9


def int8(params: Any, steps: int) -> list[Stage]:
    """8 bits, a scale for each output channel; the weights learn through the rounding (straight-through)."""
    return [Stage([(KERNELS, jc.quantize.Int(bits=8))], train="simulate")]


def int4(params: Any, steps: int) -> list[Stage]:
    """4 bits, the scales chosen for the least squared error."""
    return [Stage([(KERNELS, jc.quantize.Int(bits=4, clip="mse"))], train="simulate")]


def magnitude(params: Any, steps: int) -> list[Stage]:
    """The smallest weights of all layers go at once; the others are fine-tuned."""
    return [Stage([(KERNELS, jc.prune.Magnitude(sparsity=SPARSITY, scope="global"))])]


def gradual(params: Any, steps: int) -> list[Stage]:
    """The smallest weights go little by little, on a cubic ramp over the first two thirds."""
    return [Stage([(KERNELS, jc.prune.Magnitude(sparsity=ramp(SPARSITY, steps), scope="global"))], train="project")]


def random(params: Any, steps: int) -> list[Stage]:
    """The control: as many weights go, chosen at random."""
    return [Stage([(KERNELS, jc.prune.Random(sparsity=SPARSITY, scope="global"))])]


def svd(params: Any, steps: int) -> list[Stage]:
    """Each kernel but the head as two factors with a third of its numbers; the factors are fine-tuned."""
    return [Stage(low_rank(params, "(?!head/)" + KERNELS, part=1 / 3))]


def kmeans(params: Any, steps: int) -> list[Stage]:
    """Each kernel with 16 shared values, which are fine-tuned."""
    return [Stage([(KERNELS, jc.share.KMeans(clusters=16))])]


def deep_compression(params: Any, steps: int) -> list[Stage]:
    """Gradual pruning, then k-means of what is left; the shared values and the biases are kept in 16 bits."""
    half = jc.quantize.Float("float16")
    pruned = jc.prune.Magnitude(sparsity=ramp(SPARSITY, steps * 0.7), scope="global")
    shared = jc.chain(jc.prune.Magnitude(sparsity=SPARSITY, scope="global"), jc.share.KMeans(clusters=16), half)
    return [Stage([(KERNELS, pruned)], train="project", part=0.7), Stage([(KERNELS, shared), (".*", half)], part=0.3)]


def ramp(sparsity: float, steps: float) -> optax.Schedule:
    """From 0 to ``sparsity`` over the first two thirds of the steps, fast at first (Zhu & Gupta 2017)."""
    return optax.polynomial_schedule(0.0, sparsity, power=3, transition_steps=max(int(steps * 2 / 3), 1))


def low_rank(params: Any, pattern: str, part: float) -> list[tuple[str, Any]]:
    """A rule for each matrix that matches: factors with ``part`` of its numbers."""
    rules = []
    for path, kernel in jc.paths(params):
        rows, columns = math.prod(kernel.shape[:-1]), kernel.shape[-1]
        rank = int(part * rows * columns / (rows + columns))
        if re.fullmatch(pattern, path) and rank:
            rules.append((re.escape(path), jc.factorize.SVD(rank=rank)))
    return rules


PLANS = (int8, int4, svd, kmeans, magnitude, gradual, random, deep_compression)


def get_config() -> ConfigDict:
    """Fork this file, or change a value with ``--config.<name>=<value>``."""
    config = ConfigDict()
    config.name = "digits"
    config.data = "digits"
    config.data_options = ConfigDict({"val": 0.2, "test": 0.2})
    config.models = ("lenet_300_100", "cnn")
    config.model_options = ConfigDict()  # {model: {field: value}}, see experiments/models/small.py
    config.plans = PLANS  # functions of the parameters' shapes and the fine-tuning steps; named as they are
    config.only = ""  # some of the plans, joined by commas; all of them by default
    config.seeds = 3  # each with its own split, where the data has none, its own start and its own batches

    config.epochs = 40.0
    config.finetune_epochs = 60.0  # every plan, and the dense baseline, gets these once
    config.batch_size = 64
    config.learning_rate = 2e-3
    config.finetune_learning_rate = 3e-3

    config.latency_batch = 256
    config.checkpoint_seconds = 60.0
    return config
