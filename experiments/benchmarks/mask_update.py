"""Mask update: an exact-count mask of a leaf in one ``jit``, against the same mask by a sort.

    python -m experiments.benchmarks.mask_update

Every pair of masks is compared before it is timed. Memory is what the compiled program needs beyond its argument.
"""

from __future__ import annotations

from collections.abc import Callable
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


def compare(name: str, ours: Callable, theirs: Callable, w: Any, target: str, args: Any, exact: bool = True) -> Any:
    ours, theirs = jax.jit(ours), jax.jit(theirs)
    a, b = jax.tree.leaves(ours(w)), jax.tree.leaves(theirs(w))
    differ = sum(int((x != y).sum()) for x, y in zip(a, b, strict=True))
    if exact and differ:
        raise AssertionError(f"{name}: the two masks differ in {differ} entries")
    calls = max(1, args.calls)
    times = timing.paired(lambda: ours(w), lambda: theirs(w), args.pairs, (calls, 1))
    memory = memory_ratio(ours, w)
    return timing.row(
        name, ("jcompress", times[0]), (name.rsplit(" vs ", 1)[1], times[1]), target,
        memory=memory, memory_met=memory <= 2.5, differing_entries=differ, kept=int(sum(x.sum() for x in a)),
    )  # fmt: skip


def leaf_rows(size: int, dtype: Any, args: Any) -> list[timing.Row]:
    columns = 1000 if size % 4000 == 0 else 10
    w = jax.random.normal(jax.random.key(0), (size // columns, columns), dtype)
    s, label = args.sparsity, f"{size / 1e6:g}M {jnp.dtype(dtype).name}"
    # A plain threshold keeps too many where magnitudes tie, which they do in float32 already at this size.
    return [
        compare(
            f"unstructured {label} vs sort",
            lambda w: magnitude([w], s, "leaf")[0],
            lambda w: by_sort(w, s),
            w,
            ">= 15",
            args,
            exact=False,
        ),
        compare(
            f"unstructured {label} vs argsort",
            lambda w: magnitude([w], s, "leaf")[0],
            lambda w: by_argsort(w, s),
            w,
            ">= 15",
            args,
        ),
        compare(
            f"2:4 {label} vs top_k",
            lambda w: jc.prune.NM(2, 4).mask(jnp.abs(w)),
            lambda w: by_top_k(w, 2, 4),
            w,
            ">= 25",
            args,
        ),
    ]


def global_row(size: int, args: Any) -> timing.Row:
    """One threshold for six leaves of unequal scale, against a sort of them all joined."""
    rows = [size // 20, size // 10, size // 10, size // 4, size // 4, size // 4]
    ws = [jax.random.normal(jax.random.key(i), (n // 10, 10)) * (i + 1) for i, n in enumerate(rows)]

    def joined(ws: list[jax.Array]) -> list[jax.Array]:
        mask = by_argsort(jnp.concatenate([w.reshape(-1) for w in ws]), args.sparsity)
        ends, out = 0, []
        for w in ws:
            out.append(mask[ends : ends + w.size].reshape(w.shape))
            ends += w.size
        return out

    total = sum(w.size for w in ws)
    return compare(
        f"global, 6 leaves, {total / 1e6:g}M float32 vs argsort",
        lambda ws: magnitude(ws, args.sparsity, "global"),
        joined,
        ws,
        ">= 15",
        args,
    )


def linear_row(size: int, args: Any) -> timing.Row:
    """The mask of a leaf against that of one ten times as large."""
    small, large = (jax.random.normal(jax.random.key(0), (n // 1000, 1000)) for n in (size, 10 * size))
    ours = jax.jit(lambda w: magnitude([w], args.sparsity, "leaf")[0])
    times = timing.paired(lambda: ours(small), lambda: ours(large), args.pairs, (args.calls, 1))
    label = f"{size / 1e6:g}M to {size / 1e5:g}M float32"
    return timing.row(f"ten times as large: {label}", ("small", times[0]), ("large", times[1]), "<= 12")


def main(argv: list[str] | None = None) -> None:
    parser = timing.parser(__doc__, pairs=7)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1_000_000, 10_000_000], help="parameters in a leaf")
    parser.add_argument("--sparsity", type=float, default=0.9, help="fraction of zeros")
    parser.add_argument("--calls", type=int, default=10, help="calls of our side for each call of the sort")
    args = parser.parse_args(argv)
    rows = []
    for size in args.sizes:
        for dtype in (jnp.float32, jnp.bfloat16):
            rows += leaf_rows(size, dtype, args)
    rows.append(global_row(max(args.sizes), args))
    rows += [linear_row(size, args) for size in args.sizes]
    timing.finish("mask_update", rows, args.out, sizes=args.sizes, sparsity=args.sparsity)
    for r in (r for r in rows if "memory" in r.extra):
        print(f"{r.name}: temporaries + output = {r.extra['memory']:.2f} x the parameters")


if __name__ == "__main__":
    main()
