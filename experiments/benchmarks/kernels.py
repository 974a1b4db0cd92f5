"""Decoding at batch 1 with 8- and 4-bit weights beside the dense function and beside what the memory allows.

    python -m experiments.benchmarks.kernels

On a GPU or a TPU: one token of a decoder in the shapes of a model of a billion parameters (16 layers of width 2048),
bfloat16, dense, with 8-bit nodes and with packed 4-bit nodes, each by the plain products and by kernels. The share of
the roofline is the time in which the arrays could be read once, at the bandwidth of a sum over as many bytes measured
in the same run, over the time of the token. On a CPU only the plain products of single matrices are compared, by their
ratio to the dense product; nothing is said of kernels there.
"""

from __future__ import annotations

import argparse
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments.benchmarks import timing
from experiments.generate import Generator, nbytes
from experiments.models import llama

BILLION = llama.Config(32_000, 2048, 16, 32, 8, 64, 8192, theta=500_000.0, tied=False)
METHODS = {"8 bits": jc.quantize.Int(bits=8), "4 bits": jc.quantize.Int(bits=4, group_size=32)}
TARGETS = {"8 bits": 0.8, "4 bits": 0.7}


def bandwidth(size: int) -> float:
    """Bytes a second that a sum over an array of so many bytes reads."""
    x = jnp.ones((size // 4,), jnp.float32)
    total = jax.jit(jnp.sum).lower(x).compile()
    return size / float(np.median([timing.seconds(functools.partial(total, x)) for _ in range(20)]))


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    if jax.default_backend() == "cpu":
        print("no accelerator: the plain products on this CPU are compared, kernels are not measured")
        for size in args.sizes:
            for name in METHODS:
                title = f"{size}x{size}, {name}, plain product of one row"
                yield timing.Case(title, "dense", name, functools.partial(matrices, size, name, args.matrices))
        return
    for name in METHODS:
        for way, kernels in (("plain", None), ("kernels", jc.trace.Kernels("always"))):
            title = f"decoder of {args.layers} layers, {name}, {way}"
            yield timing.Case(title, "dense", way, functools.partial(decoders, args.layers, name, kernels))


def matrices(size: int, name: str, count: int) -> tuple:
    """One row times several matrices, so many that no cache holds the dense ones."""
    keys = jax.random.split(jax.random.key(0), count)
    params = [jax.random.normal(k, (size, size)) / size**0.5 for k in keys]
    tree = jc.compress(params, jc.plan(params, [(".*", METHODS[name])]))
    x = jax.random.normal(jax.random.key(1), (1, size))

    def fn(params: list, x: jax.Array) -> list:
        return [x @ w for w in params]

    dense = jax.jit(fn).lower(params, x).compile()
    fast = jax.jit(jc.accelerate(fn)).lower(tree, x).compile()
    whole = jax.jit(lambda tree, x: fn(jc.materialize(tree), x)).lower(tree, x).compile()
    want = dense(jc.materialize(tree), x)
    error = max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in zip(fast(tree, x), want, strict=True))
    extra = {
        "error_beside_dense_array": error,
        "temporary_bytes": int(fast.memory_analysis().temp_size_in_bytes),
        "temporary_bytes_materialized": int(whole.memory_analysis().temp_size_in_bytes),
    }
    return functools.partial(dense, params, x), functools.partial(fast, tree, x), extra


def decoders(layers: int, name: str, kernels: jc.trace.Kernels | None) -> tuple:
    """A token of the dense decoder, and of the compressed one."""
    config = llama.Config(**{**vars(BILLION), "layers": layers})
    params = jax.jit(lambda key: llama.init(key, config, dtype=jnp.bfloat16))(jax.random.key(0))
    rules = [("embed/embedding|.*/scale", None), (".*/kernel", METHODS[name])]
    tree = jc.pack(jc.compress(params, jc.plan(params, rules)))
    token = jnp.zeros((1, 1), jnp.int32)

    def step(params: Any, fast: Any) -> Any:
        fn = fast(lambda p, t, c: llama.apply(p, t, config, cache=c, dtype=jnp.bfloat16)[0])
        cache = Generator(config, 128).empty(params, 1)
        compiled = jax.jit(fn).lower(params, token, cache).compile()
        return functools.partial(compiled, params, token, cache)

    ours = step(tree, functools.partial(jc.accelerate, kernels=kernels))
    size = nbytes({k: v for k, v in tree.items() if k != "embed"})
    limit = size / bandwidth(size)
    each = float(np.median([timing.seconds(ours) for _ in range(20)]))
    extra = {"bytes": size, "roofline_s": limit, "share_of_roofline": limit / each, "wanted": TARGETS[name]}
    return step(params, lambda fn: fn), ours, extra


def main(argv: Sequence[str] | None = None) -> None:
    options = {
        "layers": (16, "of the decoder, on an accelerator"),
        "sizes": ([1024, 2048], "of the matrices, on a CPU"),
        "matrices": (8, "in one call, on a CPU"),
    }
    timing.run("kernels", __doc__, cases, options, argv, pairs=15)


if __name__ == "__main__":
    main()
