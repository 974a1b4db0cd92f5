"""The exact k-th largest of many values: how often they are read, and its time against sorting and partitioning.

    python -m experiments.benchmarks.threshold

Reads are counted over distributions, dtypes and k from 1 to n; every answer is checked against a sort. Times are
compared on the same values, and with one plain read of them, the sum of their magnitudes. With ``--pairs 0`` reads are
counted and nothing is timed.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from experiments.benchmarks import timing
from jcompress.numeric import threshold
from jcompress.numeric.counting import Count, magnitude_bits

PARTS = (
    0.0, 1e-6, 1e-5, 1e-4, 1e-3, 0.01, 0.02, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 0.95, 0.99, 0.999, 1.0,
)  # fmt: skip


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


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    """The search against a sort, a partition and one read, at 90 percent zeros."""
    for n in args.sizes:
        for name, values in distributions(n):
            if name not in ("Gaussian", "Student's t, 3 degrees", "uniform", "90% zeros"):
                continue
            label = f"{n / 1e6:g}M {name}"
            if n <= args.sort:
                make = functools.partial(sides, values, "jnp.sort")
                yield timing.Case(f"{label}: jnp.sort / ours", "ours", "jnp.sort", make, ">= 60", part=1 / 3)
            for other, target in (("np.partition", ">= 5"), ("one read", "")):
                make = functools.partial(sides, values, other)
                yield timing.Case(f"{label}: {other} / ours", "ours", other, make, target)


def sides(values: np.ndarray, other: str) -> tuple:
    x, k = jnp.asarray(values), wanted(len(values), 0.1)
    place = len(values) - k
    others = {
        "jnp.sort": functools.partial(_sorted, x),
        "np.partition": lambda: np.partition(values, place)[place],
        "one read": functools.partial(_read, x),
    }
    return functools.partial(search, x, Count.of(k)), others[other]


_read = jax.jit(lambda x: jnp.abs(x).sum())
_sorted = jax.jit(jnp.sort)


def counted(args: argparse.Namespace) -> dict[str, Any]:
    """How often values are read, in all and by case."""
    found = reads([n for n in args.sizes if n <= args.reads])
    if not found:
        return {}
    print("\n".join(summary(found)), flush=True)
    number = [r["reads"] for r in found]
    about = {"mean": float(np.mean(number)), "95th": float(np.percentile(number, 95)), "most": max(number)}
    return {"reads": about, "reads_by_case": summary(found)}


def main(argv: Sequence[str] | None = None) -> None:
    options = {
        "sizes": ([1_000_000, 10_000_000, 100_000_000], "numbers of values"),
        "sort": (10_000_000, "largest size to sort as well"),
        "reads": (100_000_000, "largest size to count reads at"),
    }
    rows = timing.run("threshold", __doc__, cases, options, argv, pairs=9, about=counted)
    for other in dict.fromkeys(row.right for row in rows):
        print(f"median ratio, {other}: {np.median([r.ratio for r in rows if r.right == other]):.1f}x")


if __name__ == "__main__":
    main()
