"""Training step: dense adamw against the same step through quantized weights.

    python -m experiments.benchmarks.qat

Straight-through with ranges taken anew at each step (``simulate``), and learned steps (LSQ), for each output channel.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jcompress as jc
from experiments.benchmarks import timing
from experiments.benchmarks.train_step import Model, Trainer, adamw, mlp, transformer

KERNELS = ".*kernel"


def straight_through(model: Model, bits: int) -> Trainer:
    plan = jc.plan(model.params, [(KERNELS, jc.quantize.Int(bits=bits))])
    return Trainer(model, adamw(), lambda params: jc.simulate(params, plan))


def learned_steps(model: Model, bits: int) -> Trainer:
    plan = jc.plan(model.params, [(KERNELS, jc.quantize.training.LSQ(bits=bits))])
    nodes = dataclasses.replace(model, params=jc.compress(model.params, plan))
    return Trainer(nodes, adamw(), jc.materialize)


def rows(model: Model, target: str, args: Any) -> list[timing.Row]:
    sides: list[tuple[str, Callable[[], Trainer], str]] = [
        ("dense again", lambda: Trainer(model, adamw()), ""),
        (f"simulate, {args.bits} bits per channel", lambda: straight_through(model, args.bits), target),
        (f"LSQ, {args.bits} bits per channel", lambda: learned_steps(model, args.bits), target),
    ]
    found = []
    for name, make, bound in sides:
        if args.only in name:
            times = timing.paired(Trainer(model, adamw()), make(), args.pairs)
            label = f"{model.name} {model.size / 1e6:.1f}M: {name}"
            found.append(timing.row(label, ("dense", times[0]), ("quantized", times[1]), bound))
            print(timing.table(found[-1:]).splitlines()[1], flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = timing.parser(__doc__, pairs=31)
    parser.add_argument("--models", nargs="+", choices=["mlp", "transformer"], default=["mlp", "transformer"])
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--bits", type=int, default=8, help="of a weight")
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 1024, 2048, 1024, 10], help="of the MLP")
    parser.add_argument("--width", type=int, default=384, help="of the transformer")
    parser.add_argument("--depth", type=int, default=8, help="of the transformer")
    parser.add_argument("--heads", type=int, default=6, help="of the transformer")
    parser.add_argument("--length", type=int, default=128, help="of a text, in bytes")
    parser.add_argument("--texts", type=int, default=8, help="in a batch of the transformer")
    parser.add_argument("--batch", type=int, default=128, help="of the MLP")
    args = parser.parse_args(argv)
    found = []
    if "mlp" in args.models:
        found += rows(mlp(args.widths, args.batch), "<= 1.10", args)
    if "transformer" in args.models:
        found += rows(transformer(args.width, args.depth, args.heads, args.texts, args.length), "<= 1.05", args)
    timing.finish("qat", found, args.out, **{k: v for k, v in vars(args).items() if k != "out"})


if __name__ == "__main__":
    main()
