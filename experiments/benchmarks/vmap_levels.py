"""Ten sparsity levels under one ``vmap``, compiled once, against ten calls.

    python -m experiments.benchmarks.vmap_levels

The other sides are ten calls of the jitted function of one level, which is compiled once too, and ten calls outside
``jit``, each level a plain number, as in a loop over ``compress``.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.benchmarks import timing


def compress(params: dict, sparsity: jax.Array | float) -> dict:
    """The dense values of the compressed tree at one level."""
    plan = jc.plan(params, [(".*", jc.prune.Magnitude(sparsity=sparsity))])
    return jc.materialize(jc.compress(params, plan))


def leaves(size: int) -> dict[str, jax.Array]:
    """Three kernels with ``size`` parameters in all."""
    rows = [size // 400, size // 200, size // 400]
    return {f"kernel{i}": jax.random.normal(jax.random.key(i), (n, 100)) for i, n in enumerate(rows)}


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    for size in args.sizes:
        label = f"{args.levels} levels of {size / 1e6:g}M"
        for name, jitted in (("ten jitted calls", True), ("ten calls outside jit", False)):
            make = functools.partial(sides, size, args.levels, jitted)
            yield timing.Case(f"{label}: {name}", "one vmap", name, make, ">= 1")


def sides(size: int, count: int, jitted: bool) -> tuple:
    """The levels together and apart, once they agree."""
    params, levels = leaves(size), jnp.linspace(0.5, 0.95, count)
    together, one = jax.jit(jax.vmap(compress, (None, 0))), jax.jit(compress)

    def apart() -> list[dict]:
        return [one(params, level) if jitted else compress(params, float(level)) for level in levels]

    for i, found in enumerate(one(params, level) for level in levels):
        for path, x in together(params, levels).items():
            if bool((x[i] != found[path]).any()):
                raise AssertionError(f"{path}: level {i} differs between vmap and the single call")
    together(params, levels[::-1])
    if together._cache_size() != 1:
        raise AssertionError(f"vmap compiled {together._cache_size()} times")
    return lambda: together(params, levels), apart


def main(argv: Sequence[str] | None = None) -> None:
    options = {"sizes": ([50_000, 1_000_000], "parameters in all"), "levels": (10, "of sparsity")}
    timing.run("vmap_levels", __doc__, cases, options, argv, pairs=15)


if __name__ == "__main__":
    main()
