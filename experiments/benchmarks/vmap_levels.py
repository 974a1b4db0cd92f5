"""Ten sparsity levels under one ``vmap``, compiled once, against ten calls.

    python -m experiments.benchmarks.vmap_levels

The other sides are ten calls of the jitted function of one level, which is compiled once too, and ten calls outside
``jit``, each level a plain number, as in a loop over ``compress``.
"""

from __future__ import annotations

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


def rows(size: int, count: int, pairs: int) -> list[timing.Row]:
    params, levels = leaves(size), jnp.linspace(0.5, 0.95, count)
    together, one = jax.jit(jax.vmap(compress, (None, 0))), jax.jit(compress)

    def apart() -> list[dict]:
        return [one(params, level) for level in levels]

    def eager() -> list[dict]:
        return [compress(params, float(level)) for level in levels]

    for i, found in enumerate(apart()):
        for path, x in together(params, levels).items():
            if bool((x[i] != found[path]).any()):
                raise AssertionError(f"{path}: level {i} differs between vmap and the single call")
    label, sides = f"{count} levels of {size / 1e6:g}M", []
    for name, side in (("ten jitted calls", apart), ("ten calls outside jit", eager)):
        times = timing.paired(lambda: together(params, levels), side, pairs)
        sides.append(timing.row(f"{label}: {name}", ("one vmap", times[0]), (name, times[1]), ">= 1"))
    together(params, levels[::-1])
    if together._cache_size() != 1:
        raise AssertionError(f"vmap compiled {together._cache_size()} times")
    return sides


def main(argv: list[str] | None = None) -> None:
    parser = timing.parser(__doc__, pairs=15)
    parser.add_argument("--sizes", type=int, nargs="+", default=[50_000, 1_000_000], help="parameters in all")
    parser.add_argument("--levels", type=int, default=10)
    args = parser.parse_args(argv)
    found = [row for size in args.sizes for row in rows(size, args.levels, args.pairs)]
    timing.finish("vmap_levels", found, args.out, levels=args.levels, sizes=args.sizes)


if __name__ == "__main__":
    main()
