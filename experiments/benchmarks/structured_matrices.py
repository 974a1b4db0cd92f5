"""Products with circulant, Toeplitz-like, Fastfood and ACDC matrices by fast transforms, against the dense product.

    python -m experiments.benchmarks.structured_matrices

One thread. The dense side multiplies by the same matrix, which lies there ready.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.benchmarks import timing

METHODS: dict[str, Any] = {
    "circulant": jc.share.Circulant(),
    "circulant blocks of 512": jc.share.Circulant(block=512),
    "Toeplitz-like, rank 2": jc.share.Toeplitz(rank=2, sweeps=0),
    "Fastfood": jc.share.Fastfood(sweeps=0),
    "ACDC": jc.share.ACDC(sweeps=0),
}


def sides(method: Any, size: int, rows: int) -> tuple:
    """The dense product, the fast one, and by how much they differ."""
    keys = jax.random.split(jax.random.key(0))
    params, x = {"w": jax.random.normal(keys[0], (size, size))}, jax.random.normal(keys[1], (rows, size))
    small = jc.compress(params, jc.plan(params, [("w", method)]))
    dense = jax.jit(jc.materialize)(small)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"]

    plain, fast = jax.jit(fn), jax.jit(jc.accelerate(fn))
    y = plain(dense, x)
    extra = {
        "difference": float(jnp.linalg.norm(fast(small, x) - y) / jnp.linalg.norm(y)),
        "how": jc.accelerate(fn).report(small, x).rows[0].how,
        "bytes": jc.nbits(small) // 8,
    }
    return functools.partial(plain, dense, x), functools.partial(fast, small, x), extra


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    for name in args.methods:
        for rows in args.batch:
            make = functools.partial(sides, METHODS[name], args.size, rows)
            title = f"{name}, {args.size} x {args.size}, {rows} rows"
            yield timing.Case(title, "dense", "accelerate", make, "<= 1.0")


OPTIONS = {
    "size": (4096, "inputs and outputs"),
    "batch": ([1, 64], "rows of the activation"),
    "methods": (timing.Names(METHODS), "which matrices"),
}


def main(argv: Sequence[str] | None = None) -> None:
    timing.run("structured_matrices", __doc__, cases, OPTIONS, argv, pairs=7)


if __name__ == "__main__":
    timing.one_thread("experiments.benchmarks.structured_matrices", sys.argv[1:])
    main()
