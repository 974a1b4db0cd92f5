"""Sparse training: dense adamw against the same step at a constant number of non-zero weights.

    python -m experiments.benchmarks.dynamic

Rows with no update due time the ordinary step; rows with an update move the mask at every step.
"""

from __future__ import annotations

from typing import Any

import jcompress as jc
from experiments.benchmarks import timing
from experiments.benchmarks.train_step import NEVER, Model, Trainer, adamw, mlp, transformer
from jcompress.prune import dynamic

RULES = {
    "SET": dynamic.SET(),
    "RigL": dynamic.RigL(stop=NEVER),
    "sparse momentum": dynamic.SparseMomentum(),
    "DSR": dynamic.DSR(),
}


def sparse(model: Model, rule: Any, sparsity: float, every: int) -> Trainer:
    plan = jc.plan(model.params, [(".*kernel", jc.prune.Random(sparsity=sparsity))])
    return Trainer(model, dynamic.sparse(adamw(), rule, plan, every=every))


def rows(model: Model, update_target: str, args: Any) -> list[timing.Row]:
    sides = [(f"{name}, no update due", rule, NEVER, "<= 1.05") for name, rule in RULES.items()]
    sides += [(f"{name} update", rule, 1, update_target) for name, rule in RULES.items()]
    found = []
    for name, rule, every, target in sides:
        if args.only not in name:
            continue
        side = sparse(model, rule, args.sparsity, every)
        times = timing.paired(Trainer(model, adamw()), side, args.pairs)
        label = f"{model.name} {model.size / 1e6:.1f}M: {name}"
        found.append(timing.row(label, ("dense", times[0]), ("with", times[1]), target))
        print(timing.table(found[-1:]).splitlines()[1], flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = timing.parser(__doc__, pairs=31)
    parser.add_argument("--models", nargs="+", choices=["mlp", "transformer"], default=["mlp", "transformer"])
    parser.add_argument("--only", default="", help="rows whose name has this in it")
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of zeros")
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 1024, 2048, 1024, 10], help="of the MLP")
    parser.add_argument("--batch", type=int, default=128, help="of the MLP")
    parser.add_argument("--width", type=int, default=384, help="of the transformer")
    parser.add_argument("--depth", type=int, default=8, help="of the transformer")
    parser.add_argument("--heads", type=int, default=6, help="of the transformer")
    parser.add_argument("--length", type=int, default=128, help="of a text, in bytes")
    parser.add_argument("--texts", type=int, default=8, help="in a batch of the transformer")
    args = parser.parse_args(argv)
    found = []
    if "mlp" in args.models:
        found += rows(mlp(args.widths, args.batch), "<= 3", args)
    if "transformer" in args.models:
        found += rows(transformer(args.width, args.depth, args.heads, args.texts, args.length), "<= 1.2", args)
    timing.finish("dynamic", found, args.out, **{k: v for k, v in vars(args).items() if k != "out"})


if __name__ == "__main__":
    main()
