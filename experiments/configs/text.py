"""A transformer over bytes of text, such as Shakespeare's in tinyshakespeare.txt; the last tenth tests.

Command: python -m experiments.compress --config.data=text --data_dir=<folder with a .txt file>

Expect on tinyshakespeare.txt, one seed, bits per byte of a net of 675,456 parameters after one epoch: dense baseline
3.36 (2.7 MB); int8 3.36 (3.8x); int4 3.39 (6.2x); half pruned gradually 3.38 (1.7x); deep_compression 3.47 at 317 kB
(8.5x); a random half 3.49. Longer training lowers all of them. Time: 8 CPU minutes; 10 min on two busy cores.
Those of gradual pruning were measured with a ramp over two thirds of the steps, not half.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jcompress as jc
from experiments import compress
from experiments.compress import Config, Stage, staged

LAYERS = "block_.*/kernel"
TABLES = "(embed/embedding|position|head/kernel)"


def int8(params: Any, steps: int) -> list[Stage]:
    """All matrices in 8 bits."""
    return [Stage([(f"{LAYERS}|{TABLES}", jc.quantize.Int(bits=8))], train="simulate")]


def int4(params: Any, steps: int) -> list[Stage]:
    """The layers in 4 bits, a scale for 64 inputs; tables in 8 bits. The weights learn through the rounding."""
    return [
        Stage([(LAYERS, jc.quantize.Int(bits=4, group_size=64)), (TABLES, jc.quantize.Int(bits=8))], train="simulate")
    ]


def magnitude(params: Any, steps: int) -> list[Stage]:
    """Half of the layers' weights go at once."""
    return [Stage([(LAYERS, jc.prune.Magnitude(sparsity=0.5, scope="global"))])]


def gradual(params: Any, steps: int) -> list[Stage]:
    """The same half goes little by little."""
    ramp = compress.ramp(0.5, steps)
    return [Stage([(LAYERS, jc.prune.Magnitude(sparsity=ramp, scope="global"))], train="project")]


def random(params: Any, steps: int) -> list[Stage]:
    """The control: a random half goes."""
    return [Stage([(LAYERS, jc.prune.Random(sparsity=0.5, scope="global"))])]


def svd(params: Any, steps: int) -> list[Stage]:
    """Each matrix of the layers as two factors with half of its numbers."""
    return [Stage(compress.low_rank(params, LAYERS, part=0.5))]


def kmeans(params: Any, steps: int) -> list[Stage]:
    """The layers with 16 shared values each, tables in 8 bits."""
    return [Stage([(LAYERS, jc.share.KMeans(clusters=16)), (TABLES, jc.quantize.Int(bits=8))])]


def deep_compression(params: Any, steps: int) -> list[Stage]:
    """Gradual pruning to half, then k-means of what is left; tables in 8 bits, all else in 16."""
    half = jc.quantize.Float("float16")
    mask = jc.prune.Magnitude(sparsity=0.5, scope="global")
    shared = jc.chain(mask, jc.share.KMeans(clusters=16), half)
    rules = [(LAYERS, shared), (TABLES, jc.quantize.Int(bits=8)), (".*", half)]
    pruned = jc.prune.Magnitude(sparsity=compress.ramp(0.5, steps), scope="global")
    return [Stage([(LAYERS, pruned)], train="project", part=0.7), Stage(rules, part=0.3)]


def get_config() -> Config:
    """Small by default; ``width=384, layers=8, heads=6`` has 14M parameters."""
    return dataclasses.replace(
        Config(),
        name="text",
        data="text",
        data_options={"length": 128},
        models=("transformer",),
        model_options={"transformer": {"width": 128, "layers": 3, "heads": 4, "longest": 128}},
        ways=tuple(map(staged, (int8, int4, svd, kmeans, magnitude, gradual, random, deep_compression))),
        seeds=1,
        epochs=1.0,
        finetune_epochs=0.25,
        batch_size=16,
        learning_rate=2e-3,
        finetune_learning_rate=1e-3,
        latency_batch=8,
    )
