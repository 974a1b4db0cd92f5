"""Training step: dense adamw against the same step through quantized weights.

    python -m experiments.benchmarks.qat

Straight-through with ranges taken anew at each step (``simulate``), and learned steps (LSQ), for each output channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jcompress as jc
from experiments.benchmarks.train_step import Model, Side, Trainer, adamw, bound, run

KERNELS = ".*kernel"


def straight_through(model: Model, bits: int) -> Trainer:
    plan = jc.plan(model.params, [(KERNELS, jc.quantize.Int(bits=bits))])
    return Trainer(model, adamw(), lambda params: jc.simulate(params, plan))


def learned_steps(model: Model, bits: int) -> Trainer:
    plan = jc.plan(model.params, [(KERNELS, jc.quantize.training.LSQ(bits=bits))])
    nodes = dataclasses.replace(model, params=jc.compress(model.params, plan))
    return Trainer(nodes, adamw(), jc.materialize)


def _sides(model: Model, args: Any) -> list[Side]:
    target = bound(model, 1.10, 1.05)
    return [
        ("dense again", lambda: Trainer(model, adamw()), ""),
        (f"simulate, {args.bits} bits per channel", lambda: straight_through(model, args.bits), target),
        (f"LSQ, {args.bits} bits per channel", lambda: learned_steps(model, args.bits), target),
    ]


def main(argv: Sequence[str] | None = None) -> None:
    run("qat", __doc__, argv, _sides, {"bits": (8, "of a weight")})


if __name__ == "__main__":
    main()
