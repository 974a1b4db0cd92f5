"""The exact k-th largest of many values: how often they are read, and its time against sorting and partitioning.

    python -m experiments.benchmarks.threshold

Reads are counted over distributions, dtypes and k from 1 to n; every answer is checked against a sort. Times are
compared on the same values, and with one plain read of them, the sum of their magnitudes. With ``--pairs 0`` reads are
counted and nothing is timed.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from jcompress.numeric import threshold
from jcompress.numeric.counting import Count, magnitude_bits

PARTS = (
    0.0,
    1e-6,
    1e-5,
    1e-4,
    1e-3,
    0.01,
    0.02,
    0.05,
    0.1,
    0.2,
    0.3,
    0.4,
    0.5,
    0.6,
    0.7,
    0.8,
    0.9,
    0.95,
    0.99,
    0.999,
    1.0,
)


def distributions(n: int) -> Iterator[tuple[str, np.ndarray]]:
    """Magnitudes as they occur, float32 (n,)."""
    rng = np.random.default_rng(0)
    normal = np.abs(rng.standard_normal(n, np.float32))
    yield "Gaussian", normal
    yield "Student's t, 3 degrees", np.abs(rng.standard_t(3, n)).astype(np.float32)
    yield "Cauchy", np.abs(rng.standard_cauchy(n)).astype(np.float32)
    yield "log-normal", np.exp(2 * rng.standard_normal(n, np.float32))
    yield "uniform", rng.random(n, np.float32)
    yield "constant", np.full(n, 0.37, np.float32)
    yield "90% zeros", np.where(rng.random(n, np.float32) < 0.9, np.float32(0), normal)
    yield "99% zeros", np.where(rng.random(n, np.float32) < 0.99, np.float32(0), normal)
    yield "layers of four scales", normal * np.repeat(np.float32([0.01, 0.1, 0.3, 2]), -(-n // 4))[:n]


@jax.jit
def search(x: jax.Array, wanted: Count) -> tuple[jax.Array, jax.Array]:
    """The bits of the threshold magnitude, and how often the values were read."""
    found = threshold.kth_largest([x], wanted, by=jnp.abs)
    return found.low, found.reads


@jax.jit
def reaching(x: jax.Array, bits: jax.Array) -> jax.Array:
    """How many values reach the threshold."""
    return jnp.sum(magnitude_bits(x) >= bits, dtype=jnp.uint32)


def wanted(n: int, part: float) -> int:
    return min(max(round(part * n), 1), n)


def reads(sizes: list[int]) -> list[dict[str, Any]]:
    """How often the values were read, for every distribution, dtype, size and k."""
    found = []
    for n in sizes:
        for name, values in distributions(n):
            for dtype in (jnp.float32, jnp.bfloat16):
                x = jnp.asarray(values).astype(dtype)
                ordered = np.sort(np.asarray(x.astype(jnp.float32)))[::-1]
                for k in sorted({wanted(n, part) for part in PARTS}):
                    bits, number = search(x, Count.of(k))
                    count = int(reaching(x, bits))
                    value = ordered[k - 1]
                    exact = count == k or (count > k and ordered[count - 1] == value)
                    if not exact:
                        raise AssertionError(f"{name}, k={k} of {n}: {count} values reach the threshold")
                    found.append({"n": n, "values": name, "dtype": dtype.__name__, "k": k, "reads": int(number)})
    return found


def summary(found: list[dict[str, Any]]) -> list[str]:
    """Mean, 95th percentile and most reads, for each size, dtype and distribution."""
    lines = [f"{'':44}{'mean':>6}{'95th':>6}{'most':>6}"]
    keys = list(dict.fromkeys((r["n"], r["dtype"], r["values"]) for r in found))
    for key in [*keys, None]:
        mine = [r["reads"] for r in found if key is None or (r["n"], r["dtype"], r["values"]) == key]
        name = "all" if key is None else f"{key[0] / 1e6:g}M {key[1]} {key[2]}"
        lines.append(f"{name:44}{np.mean(mine):6.2f}{np.percentile(mine, 95):6.1f}{max(mine):6d}")
    return lines


def times(sizes: list[int], sorted_up_to: int, pairs: int) -> list[timing.Row]:
    """The search against a sort, a partition and one read, at 90 percent zeros."""
    rows = []
    for n in sizes:
        for name, values in distributions(n):
            if name not in ("Gaussian", "Student's t, 3 degrees", "uniform", "90% zeros"):
                continue
            x, k = jnp.asarray(values), wanted(n, 0.1)
            ours = functools.partial(search, x, Count.of(k))
            label = f"{n / 1e6:g}M {name}"

            def partition(values: np.ndarray = values, place: int = n - k) -> Any:
                return np.partition(values, place)[place]

            compared = [("np.partition", partition, ">= 5"), ("one read", functools.partial(_read, x), "")]
            if n <= sorted_up_to:
                compared.insert(0, ("jnp.sort", functools.partial(_sorted, x), ">= 60"))
            for other, side, target in compared:
                few = max(pairs // 3, 2) if other == "jnp.sort" else pairs
                a, b = timing.paired(ours, side, few)
                rows.append(timing.row(f"{label}: {other} / ours", ("ours", a), (other, b), target))
                print(timing.table(rows[-1:]).splitlines()[1], flush=True)
    return rows


_read = jax.jit(lambda x: jnp.abs(x).sum())
_sorted = jax.jit(jnp.sort)


def main(argv: list[str] | None = None) -> None:
    parser = timing.parser(__doc__, pairs=9)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000, 100_000_000])
    parser.add_argument("--sort", type=int, default=10_000_000, help="largest size to sort as well")
    parser.add_argument("--reads", type=int, default=100_000_000, help="largest size to count reads at")
    args = parser.parse_args(argv)
    found = reads([n for n in args.sizes if n <= args.reads])
    print("\n".join(summary(found)), flush=True)
    rows = times(args.sizes, args.sort, args.pairs) if args.pairs else []
    mean = {other: float(np.median([r.ratio for r in rows if f": {other} " in r.name])) for other in _others(rows)}
    if rows:
        print("median ratio:", ", ".join(f"{other} {ratio:.1f}x" for other, ratio in mean.items()))
    number = [r["reads"] for r in found]
    about = {"mean": float(np.mean(number)), "95th": float(np.percentile(number, 95)), "most": max(number)}
    timing.finish("threshold", rows, args.out, reads=about, reads_by_case=summary(found), median_ratios=mean)


def _others(rows: list[timing.Row]) -> list[str]:
    return list(dict.fromkeys(r.right for r in rows))


if __name__ == "__main__":
    main()
