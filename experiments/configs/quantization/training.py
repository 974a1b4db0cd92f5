"""What is trained in few bits, on what, and for how long.

Command: python -m experiments.quantization.training --data_dir=<folder with MNIST's idx files and a .txt file>
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

import jcompress as jc

T, Int = jc.quantize.training, jc.quantize.Int


@dataclasses.dataclass(frozen=True)
class Way:
    """A method, and how weights train under it.

    ``"nodes"``: what is trainable in the nodes that ``compress`` gives; ``"fixed"``: likewise, but for the scales;
    ``"simulate"``: dense weights, compressed anew at each step; ``"none"``: not at all.
    """

    method: Any
    train: Literal["nodes", "fixed", "simulate", "none"] = "nodes"


@dataclasses.dataclass(frozen=True)
class Task:
    """A data set, a model, and the budget: ``dense`` steps for the network that all ways start from, then ``steps``."""

    data: str
    model: str
    pattern: str
    dense: int
    steps: int
    batch_size: int
    data_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    model_options: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def uniform(bits: int) -> dict[str, Way]:
    """The ways to train weights of so many bits."""
    lsq = T.LSQ(bits=bits, start="deviation")
    return {
        f"{bits} bits, rounded": Way(Int(bits=bits, clip="mse"), "none"),
        f"{bits} bits, straight-through, fixed range": Way(lsq, "fixed"),
        f"{bits} bits, straight-through, range of each step": Way(Int(bits=bits), "simulate"),
        f"{bits} bits, LSQ": Way(lsq),
    }


WAYS: dict[str, Way | None] = {
    "dense": None,
    **uniform(4),
    **uniform(3),
    **uniform(2),
    "ternary, rounded": Way(jc.quantize.Ternary(), "none"),
    "ternary, straight-through (TWN)": Way(jc.quantize.Ternary(), "simulate"),
    "ternary, TTQ": Way(T.TTQ()),
    "binary, rounded": Way(Int(bits=1), "none"),
    "binary, scale of each step (XNOR)": Way(Int(bits=1), "simulate"),
    "binary, BinaryConnect": Way(T.BinaryConnect()),
    "binary, BinaryConnect, learned scale": Way(T.BinaryConnect(learned=True)),
}
TASKS = {
    "digits": Task("digits", "lenet_300_100", ".*kernel", 400, 400, 64, {"val": 0.2, "test": 0.2}),
    "mnist": Task("mnist", "lenet_300_100", ".*kernel", 400, 400, 100, {"val": 0.1}),
    "text": Task(
        "text", "transformer", "block_.*kernel", 200, 150, 16,
        {"length": 64, "val": 0.05}, {"width": 64, "layers": 2, "heads": 4, "longest": 64},
    ),
}  # fmt: skip
DENSE_RATE = 2e-3
RATES = (1e-3, 1e-2)
"""Of Adam at its peak, falling as a cosine. Each way on each task takes the one that validates best with seed 0."""
