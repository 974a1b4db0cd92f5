"""Sparse training: dense adamw against the same step at a constant number of non-zero weights.

    python -m experiments.benchmarks.dynamic

Rows with no update due time the ordinary step; rows with an update move the mask at every step.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import jax

import jcompress as jc
from experiments.benchmarks.train_step import NEVER, SPARSITY, Model, Side, Trainer, adamw, bound, run
from jcompress.prune import dynamic

RULES = {
    "SET": dynamic.SET(),
    "RigL": dynamic.RigL(stop=NEVER),
    "sparse momentum": dynamic.SparseMomentum(),
    "DSR": dynamic.DSR(),
}


def sparse(model: Model, rule: Any, sparsity: float, every: int) -> Trainer:
    plan = jc.plan(model.params, [(".*kernel", jc.prune.Random(sparsity=sparsity))])
    return Trainer(model, dynamic.sparse(adamw(), rule, plan, every=every, key=jax.random.key(0)))


def _sides(model: Model, args: Any) -> list[Side]:
    update = bound(model, 3, 1.2)
    ordinary = [
        (f"{name}, no update due", functools.partial(sparse, model, rule, args.sparsity, NEVER), "<= 1.05")
        for name, rule in RULES.items()
    ]
    return ordinary + [
        (f"{name} update", functools.partial(sparse, model, rule, args.sparsity, 1), update)
        for name, rule in RULES.items()
    ]


def main(argv: Sequence[str] | None = None) -> None:
    run("dynamic", __doc__, argv, _sides, SPARSITY)


if __name__ == "__main__":
    main()
