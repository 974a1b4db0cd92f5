"""Whether two compressed sentence encoders differ in agreement with human judgement by more than the choice of pairs.

    python -m experiments.quantization.difference --model_dir=M --data_dir=D --workdir=runs/minilm mixed3 gptq3

The pairs of each set are drawn anew with replacement, the same for both encoders, and the difference of their mean
Spearman correlations is printed with its 90% interval. ``--workdir`` is that of ``python -m experiments.minilm``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import jcompress as jc
from experiments import flags
from experiments.models import minilm
from experiments.quantization import sts
from experiments.runner import refuse

Scored = list[tuple[np.ndarray, np.ndarray]]


def interval(first: Scored, second: Scored, draws: int = 2000, seed: int = 0) -> tuple[float, float, float]:
    """The difference of mean Spearman correlations, first minus second, and its 5th and 95th percentile.

    Args:
      first: of each set, the embeddings (pairs, 2, width) of the first encoder and the scores (pairs,).
      second: the same of the second encoder, on the same pairs.
      draws: how often the pairs are drawn anew.
      seed: of the draws.
    """
    rng = np.random.default_rng(seed)

    def difference(drawn: list[np.ndarray]) -> float:
        both = [[sts.spearman(x[i], y[i]) for (x, y), i in zip(side, drawn, strict=True)] for side in (first, second)]
        return float(np.mean(both[0]) - np.mean(both[1]))

    sizes = [len(y) for _, y in first]
    found = [difference([rng.integers(n, size=n) for n in sizes]) for _ in range(draws)]
    low, high = np.percentile(found, [5, 95])
    return difference([np.arange(n) for n in sizes]), float(low), float(high)


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("rows", nargs=2, help="two rows of the table")
    parser.add_argument("--model_dir", required=True)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--workdir", default="runs/minilm")
    args = parser.parse_args(argv)
    try:
        difference, low, high = measured(args)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)
    print(f"{args.rows[0]} - {args.rows[1]}: {difference:+.4f}, 90% of draws in [{low:+.4f}, {high:+.4f}]")
    return 0


def measured(args: argparse.Namespace) -> tuple[float, float, float]:
    """What :func:`interval` gives for the two stored encoders."""
    encoder, _ = minilm.load(args.model_dir)
    sets = {name: sts.read(Path(args.data_dir) / f"sts2015_{name}.tsv", encoder) for name in ("images", "headlines")}
    judge, scored = sts.Judge(encoder), []
    for row in args.rows:
        params = jc.materialize(jc.load(Path(args.workdir) / "models" / f"{row}.jc"))
        scored.append([(judge.pairs(params, pairs), pairs.scores) for pairs in sts.labelled(sets).values()])
    return interval(*scored)


if __name__ == "__main__":
    sys.exit(main())
