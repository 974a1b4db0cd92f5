"""Codebooks against faiss and scikit-learn, products with them against dense ones, and the memory of soft k-means.

    python -m experiments.benchmarks.codebooks

One thread, and seconds of the process, so that a loaded machine does not count. ``error`` is relative to what the other
side leaves, ``optimum`` to the optimum of the numbers rounded to 65,536 levels. ``memory`` is what the compiled program
needs beside its arguments, a share of the bytes of the numbers. Weights are draws of Student's t with 5 degrees of
freedom. Rows of packages that are not there are left out (``pip install faiss-cpu scikit-learn``).
"""

from __future__ import annotations

import argparse
import functools
import importlib.util
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments.benchmarks import timing
from jcompress.share.optimal import optimal_codebook

Case = functools.partial(timing.Case, clock=time.process_time)
PEERS = {"faiss": "faiss", "scikit-learn": "sklearn"}
WAYS = ("unrolled", "implicit", "jacobian_free")


def heavy(*shape: int) -> np.ndarray:
    return np.random.default_rng(0).standard_t(5, size=shape).astype(np.float32)


def temporary(compiled: Any) -> int:
    """Bytes that a compiled program needs beside its arguments and results."""
    return compiled.memory_analysis().temp_size_in_bytes


def faiss_means(x: np.ndarray, clusters: int, sampled: bool) -> tuple[np.ndarray, np.ndarray]:
    """Words (clusters, d) and the word of each row: 25 rounds on 256 rows a word, as is its default, or on all."""
    import faiss

    faiss.omp_set_num_threads(1)
    found = faiss.Kmeans(x.shape[1], clusters, niter=25, **({} if sampled else {"max_points_per_centroid": len(x)}))
    found.train(x)
    return found.centroids, found.index.search(x, 1)[1][:, 0]


def sklearn_means(x: np.ndarray, clusters: int, sampled: bool) -> tuple[np.ndarray, np.ndarray]:
    from sklearn.cluster import KMeans

    found = KMeans(clusters, init="random", n_init=1, max_iter=25, random_state=0).fit(x)
    return found.cluster_centers_, found.labels_


def fitted(w: np.ndarray, clusters: int, block: tuple[int, ...], peer: str) -> tuple | None:
    """A codebook of ours beside one of a package."""
    if importlib.util.find_spec(PEERS[peer]) is None:
        return None
    x, method = jnp.asarray(w), jc.share.KMeans(clusters, block=block)
    ours = jax.jit(lambda w: method(w)).lower(x).compile()
    rows = w.reshape(-1, block[-1] if block else 1)
    means: Callable = faiss_means if peer == "faiss" else sklearn_means
    last: list[tuple[np.ndarray, np.ndarray]] = []

    def right() -> None:
        last[:] = [means(rows, clusters, bool(block))]

    right()
    words, places = last[0]
    error = np.square(np.asarray(ours(x).materialize()) - w, dtype=np.float64).mean()
    other = np.square(words[places] - rows, dtype=np.float64).mean()
    memory = temporary(ours) / w.nbytes
    extra = {"error": error / other, "mean_square": float(np.square(w, dtype=np.float64).mean()), "memory": memory}
    if not block:
        extra["optimum"] = error / least(w, clusters)
    return functools.partial(ours, x), right, {k: float(v) for k, v in extra.items()}


@functools.cache
def _least(clusters: int, size: int) -> float:
    w = heavy(size)
    low, high = float(w.min()), float(w.max())
    levels = np.float32(low) + np.round((w - low) * (65_535 / (high - low))).astype(np.float32) * (
        (high - low) / 65_535
    )
    codebook = optimal_codebook(levels, clusters)
    places = np.searchsorted((codebook[1:] + codebook[:-1]) / 2, w)
    counts = np.maximum(np.bincount(places, minlength=clusters), 1)
    means = np.bincount(places, w, clusters) / counts
    return float(np.square(w - means[places]).mean())


def least(w: np.ndarray, clusters: int) -> float:
    """The mean squared error of the best codebook of rounded numbers, each value the mean of its numbers."""
    return _least(clusters, w.size)


def executed(shape: tuple[int, int], method: Any, rows: int, inside: bool) -> tuple:
    """A product with codes beside that with the dense matrix, which lies ready, or, ``inside``, is made each time."""
    params, x = {"w": jnp.asarray(heavy(*shape))}, jax.random.normal(jax.random.key(1), (rows, shape[0]))
    small = jax.jit(lambda p: jc.compress(p, jc.plan(p, [("w", method)])))(params)
    dense = jax.jit(jc.materialize)(small)

    def fn(params: Any, x: jax.Array) -> jax.Array:
        return x @ params["w"]

    fast = jc.accelerate(fn)
    given, plain = (small, lambda tree, x: fn(jc.materialize(tree), x)) if inside else (dense, fn)
    sides = [jax.jit(f).lower(tree, x).compile() for f, tree in ((plain, given), (fast, small))]
    bytes_ = [temporary(side) for side in sides]
    y = fn(dense, x)
    difference = float(jnp.linalg.norm(sides[1](small, x) - y) / jnp.linalg.norm(y))
    extra = {"how": fast.report(small, x).rows[0].how, "temporary_bytes": bytes_, "difference": difference}
    return functools.partial(sides[0], given, x), functools.partial(sides[1], small, x), extra


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    shape = (args.inputs, args.outputs)
    make: Any
    codes: dict[str, Any] = {f"words of {d}": jc.share.KMeans(256, block=(d, 1)) for d in args.words}
    codes |= {"16 values": jc.share.KMeans(16), "E8P": jc.quantize.E8P()}
    for name, method in codes.items():
        for rows in args.batch:
            for inside, left in ((False, "dense, ready"), (True, "made dense")):
                make = functools.partial(executed, shape, method, rows, inside)
                yield Case(f"{name}, {rows} rows, {left}", left, "accelerate", make, calls=(4, 4))
    for peer, target in (("faiss", ">= 0.67"), ("scikit-learn", ">= 3")):
        for d in args.words:
            make = functools.partial(fitted, heavy(*shape), 256, (1, d), peer)
            yield Case(f"256 words of {d}, {peer}", "KMeans", peer, make, target, part=0.5, warm=1)
    for clusters in args.clusters:
        for peer in PEERS if clusters < 100 else ("faiss",):
            make = functools.partial(fitted, heavy(args.size), clusters, (), peer)
            title = f"{clusters} values of {args.size:,}, {peer}"
            yield Case(title, "KMeans", peer, make, ">= 10" if peer == "faiss" else "", part=0.2, warm=0)


def backward(args: argparse.Namespace) -> dict[str, Any]:
    """Bytes that the gradient of soft k-means needs beside its arguments, by how and by the number of rounds."""
    w = jax.ShapeDtypeStruct((args.soft,), jnp.float32)

    def needed(way: Any, rounds: int) -> int:
        method = jc.share.SoftKMeans(16, gradient=way, iterations=rounds)

        def loss(w: jax.Array) -> jax.Array:
            return jnp.sin(jc.materialize({"w": method(w)}, key=jax.random.key(0))["w"]).sum()

        return temporary(jax.jit(jax.grad(loss)).lower(w).compile())

    return {"backward_bytes": {way: {n: needed(way, n) for n in args.rounds} for way in WAYS}}


OPTIONS = {
    "inputs": (1024, "of the matrix"),
    "outputs": (4096, "of the matrix"),
    "batch": ([1, 8, 64], "rows of an activation"),
    "words": ([8, 4], "entries of a word"),
    "size": (10_000_000, "numbers that share few values"),
    "clusters": ([16, 256], "values that they share"),
    "soft": (20_000, "numbers of soft k-means"),
    "rounds": ([10, 30, 100], "of soft k-means"),
}


def main(argv: Sequence[str] | None = None) -> None:
    timing.run("codebooks", __doc__, cases, OPTIONS, argv, pairs=7, about=backward)


if __name__ == "__main__":
    timing.one_thread("experiments.benchmarks.codebooks", sys.argv[1:])
    main()
