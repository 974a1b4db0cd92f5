"""Mask update: an exact-count mask of a leaf in one ``jit``, against the same mask by a sort.

    python -m experiments.benchmarks.mask_update

Every pair of masks is compared before it is timed. Memory is what the compiled program needs beyond its argument.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.benchmarks import timing


def magnitude(leaves: list[jax.Array], sparsity: float, scope: str) -> list[jax.Array]:
    method = jc.prune.Magnitude(sparsity=sparsity, scope=scope)
    params = {str(i): w for i, w in enumerate(leaves)}
    nodes = jc.compress(params, jc.plan(params, [(".*", method)]))
    return [nodes[path].mask for path in params]


def by_sort(w: jax.Array, sparsity: float) -> jax.Array:
    """The usual mask: everything at or above the k-th largest magnitude. Ties make it keep too many."""
    magnitudes = jnp.abs(w).reshape(-1)
    k = w.size - round(sparsity * w.size)
    return jnp.abs(w) >= jnp.sort(magnitudes)[w.size - k]


def by_argsort(w: jax.Array, sparsity: float) -> jax.Array:
    """The exact mask: the first k of a stable sort by falling magnitude."""
    k = w.size - round(sparsity * w.size)
    order = jnp.argsort(-jnp.abs(w).reshape(-1), stable=True)
    return jnp.zeros(w.size, bool).at[order[:k]].set(True).reshape(w.shape)


def by_top_k(w: jax.Array, n: int, m: int) -> jax.Array:
    """N:M along axis -2 by ``lax.top_k`` of every group."""
    rows, columns = w.shape
    groups = jnp.abs(w).reshape(rows // m, m, columns).swapaxes(-1, -2)
    index = jax.lax.top_k(groups, n)[1]
    mask = jnp.zeros(groups.shape, bool)
    mask = jnp.put_along_axis(mask, index, True, axis=-1, inplace=False)
    return mask.swapaxes(-1, -2).reshape(w.shape)


def memory_ratio(fn: Callable, *args: Any) -> float:
    """Temporaries and output of the compiled function, over the bytes of its arguments."""
    used = fn.lower(*args).compile().memory_analysis()
    given = sum(x.nbytes for x in jax.tree.leaves(args))
    return (used.temp_size_in_bytes + used.output_size_in_bytes) / given


def case(
    name: str, ours: Callable, theirs: Callable, w: Callable[[], Any], target: str, calls: int, exact: bool = True
) -> timing.Case:
    """Ours against another on the weights that ``w()`` gives; named ``<what> vs <the other>``."""

    def make() -> tuple:
        weights, left, right = w(), jax.jit(ours), jax.jit(theirs)
        a, b = jax.tree.leaves(left(weights)), jax.tree.leaves(right(weights))
        differ = sum(int((x != y).sum()) for x, y in zip(a, b, strict=True))
        if exact and differ:
            raise AssertionError(f"{name}: the two masks differ in {differ} entries")
        memory, kept = memory_ratio(left, weights), int(sum(x.sum() for x in a))
        extra = {"memory": memory, "memory_met": memory <= 2.5, "differing_entries": differ, "kept": kept}
        return lambda: left(weights), lambda: right(weights), extra

    return timing.Case(name, "jcompress", name.rsplit(" vs ", 1)[1], make, target, (max(1, calls), 1))


def of_a_leaf(size: int, dtype: Any, args: argparse.Namespace) -> Iterator[timing.Case]:
    columns = 1000 if size % 4000 == 0 else 10
    s, label = args.sparsity, f"{size / 1e6:g}M {jnp.dtype(dtype).name}"

    def w() -> jax.Array:
        return jax.random.normal(jax.random.key(0), (size // columns, columns), dtype)

    def unstructured(w: jax.Array) -> jax.Array:
        return magnitude([w], s, "leaf")[0]

    # A plain threshold keeps too many where magnitudes tie, which they do in float32 already at this size.
    name = f"unstructured {label}"
    yield case(f"{name} vs sort", unstructured, lambda w: by_sort(w, s), w, ">= 15", args.calls, exact=False)
    yield case(f"{name} vs argsort", unstructured, lambda w: by_argsort(w, s), w, ">= 15", args.calls)
    ours, theirs = lambda w: jc.prune.NM(2, 4).mask(jnp.abs(w)), lambda w: by_top_k(w, 2, 4)
    yield case(f"2:4 {label} vs top_k", ours, theirs, w, ">= 25", args.calls)


def of_all_leaves(size: int, args: argparse.Namespace) -> timing.Case:
    """One threshold for six leaves of unequal scale, against a sort of them all joined."""
    rows = [n // 10 for n in (size // 20, size // 10, size // 10, size // 4, size // 4, size // 4)]

    def ws() -> list[jax.Array]:
        return [jax.random.normal(jax.random.key(i), (n, 10)) * (i + 1) for i, n in enumerate(rows)]

    def joined(ws: list[jax.Array]) -> list[jax.Array]:
        mask = by_argsort(jnp.concatenate([w.reshape(-1) for w in ws]), args.sparsity)
        ends, out = 0, []
        for w in ws:
            out.append(mask[ends : ends + w.size].reshape(w.shape))
            ends += w.size
        return out

    name = f"global, 6 leaves, {10 * sum(rows) / 1e6:g}M float32 vs argsort"
    return case(name, lambda ws: magnitude(ws, args.sparsity, "global"), joined, ws, ">= 15", args.calls)


def linear(size: int, args: argparse.Namespace) -> timing.Case:
    """The mask of a leaf against that of one ten times as large."""

    def make() -> tuple:
        small, large = (jax.random.normal(jax.random.key(0), (n // 1000, 1000)) for n in (size, 10 * size))
        ours = jax.jit(lambda w: magnitude([w], args.sparsity, "leaf")[0])
        return lambda: ours(small), lambda: ours(large)

    name = f"ten times as large: {size / 1e6:g}M to {size / 1e5:g}M float32"
    return timing.Case(name, "small", "large", make, "<= 12", (max(1, args.calls), 1))


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    for size in args.sizes:
        for dtype in (jnp.float32, jnp.bfloat16):
            yield from of_a_leaf(size, dtype, args)
    yield of_all_leaves(max(args.sizes), args)
    yield from (linear(size, args) for size in args.sizes)


def main(argv: Sequence[str] | None = None) -> None:
    options = {
        "sizes": ([1_000_000, 10_000_000], "parameters in a leaf"),
        "sparsity": (0.9, "fraction of zeros"),
        "calls": (10, "calls of our side for each call of the sort"),
    }
    for row in timing.run("mask_update", __doc__, cases, options, argv, pairs=7):
        if "memory" in row.extra:
            print(f"{row.name}: temporaries + output = {row.extra['memory']:.2f} x the parameters")


if __name__ == "__main__":
    main()
