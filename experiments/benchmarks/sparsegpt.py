"""SparseGPT on one layer, against the Cholesky factorization and the matrix products that it cannot do without.

    python -m experiments.benchmarks.sparsegpt

The other side factorizes the same Gram matrix and makes the products by which each block takes in the errors of those
before it, at the same precision: the arithmetic of the sweep without the choice of masks and the work inside a block.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

import jcompress as jc
from experiments.benchmarks import timing
from jcompress.numeric.damping import damped, inverse_factor
from jcompress.numeric.sweep import HIGHEST


@jax.jit
def bound(w: jax.Array, gram: jax.Array) -> jax.Array:
    """The factor, and for each block of 128 inputs the products with the errors of all before it and of itself."""
    k, block = len(w), 128
    factor = inverse_factor(damped(gram, 0.01))

    def one(i: jax.Array, w: jax.Array) -> jax.Array:
        def take_in(j: jax.Array, current: jax.Array) -> jax.Array:
            part = lax.dynamic_slice(factor, (j * block, i * block), (block, block))
            before = lax.dynamic_slice_in_dim(w, j * block, block)
            return current - jnp.matmul(part.T, before, precision=HIGHEST)

        current = lax.fori_loop(0, i + 1, take_in, lax.dynamic_slice_in_dim(w, i * block, block))
        return lax.dynamic_update_slice_in_dim(w, current, i * block, 0)

    return lax.fori_loop(0, k // block, one, w)


def layer(k: int, n: int) -> tuple[jax.Array, jax.Array]:
    """Weights (k, n), and the Gram matrix of inputs with some directions in common."""
    keys = jax.random.split(jax.random.key(0), 4)
    x = jax.random.normal(keys[0], (2 * k, k))
    x += jax.random.normal(keys[1], (2 * k, 16)) @ jax.random.normal(keys[2], (16, k))
    return jax.random.normal(keys[3], (k, n)) / k**0.5, x.T @ x


METHODS = {
    "50%": jc.prune.SparseGPT(sparsity=0.5),
    "2:4": jc.prune.SparseGPT(pattern=jc.prune.NM(2, 4)),
    "50% and 4 bits": jc.prune.SparseGPT(sparsity=0.5, quantizer=jc.quantize.Int(bits=4)),
}


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    for shape in args.shapes:
        w, gram = layer(*map(int, shape.split("x")))
        for name, method in METHODS.items():
            make, target = functools.partial(sides, w, gram, method), "<= 1.5" if name == "50%" else ""
            yield timing.Case(f"{shape}, {name}", "Cholesky and products", "SparseGPT", make, target)


def sides(w: jax.Array, gram: jax.Array, method: Any) -> tuple:
    stats, plan = {"w": jc.trace.Stats(gram=gram, axes=(-2,))}, jc.plan({"w": w}, [("w", method)])
    ours = jax.jit(lambda w, stats: jc.compress({"w": w}, plan, stats=stats))
    return lambda: bound(w, gram), lambda: ours(w, stats)


def main(argv: Sequence[str] | None = None) -> None:
    options = {"shapes": (["1024x4096", "4096x1024"], "inputs x outputs")}
    timing.run("sparsegpt", __doc__, cases, options, argv, pairs=9)


if __name__ == "__main__":
    main()
