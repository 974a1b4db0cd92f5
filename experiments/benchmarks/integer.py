"""Inference with 8-bit weights and 8-bit activations multiplied as integers, against float32.

    python -m experiments.benchmarks.integer

Weights are codes with a scale for each output; ranges of activations are static, from calibration, or taken from each
batch as it comes. Attention scores, norms and the embedding stay float. The error is that of the outputs, relative to
the float model in the Frobenius norm.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.benchmarks import timing
from experiments.benchmarks.train_step import attention, kernel, norm

Model = tuple[str, Callable, Any, tuple]


def mlp(widths: list[int], batch: int) -> Model:
    keys = iter(jax.random.split(jax.random.key(0), len(widths)))
    params = [kernel(next(keys), m, n) for m, n in itertools.pairwise(widths)]

    def fn(params: list, x: jax.Array) -> jax.Array:
        for w in params[:-1]:
            x = jax.nn.relu(x @ w)
        return x @ params[-1]

    return "MLP", fn, params, (jax.random.normal(next(keys), (batch, widths[0])),)


def transformer(width: int, depth: int, heads: int, texts: int, length: int) -> Model:
    """A decoder over bytes with learned positions and a head of its own."""
    keys = iter(jax.random.split(jax.random.key(0), 4 * depth + 4))
    shapes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    params = {
        "embed": jax.random.normal(next(keys), (256, width)),
        "position": 0.1 * jax.random.normal(next(keys), (length, width)),
        "block": [
            {name: {"kernel": kernel(next(keys), *s)} for name, s in shapes.items()}
            | {"norm1": jnp.ones(width), "norm2": jnp.ones(width)}
            for _ in range(depth)
        ],
        "norm": jnp.ones(width),
        "head": kernel(next(keys), width, 256),
    }

    def fn(params: dict, tokens: jax.Array) -> jax.Array:
        x = params["embed"][tokens] + params["position"]
        for block in params["block"]:
            x = x + attention(block, norm(x, block["norm1"]), heads)
            x = x + jax.nn.gelu(norm(x, block["norm2"]) @ block["up"]["kernel"]) @ block["down"]["kernel"]
        return norm(x, params["norm"]) @ params["head"]

    return "transformer", fn, params, (jax.random.randint(next(keys), (texts, length), 0, 256),)


def planned(params: Any) -> jc.Plan:
    kept = [("embed", None), ("position", None)] if isinstance(params, dict) else []
    kernels = ".*/kernel|head" if kept else ".*"
    return jc.plan(params, [*kept, (kernels, jc.quantize.Int(bits=8))])


def compared(model: Model, pairs: int, target: str) -> list[timing.Row]:
    name, fn, params, args = model
    tree = jc.compress(params, planned(params))
    stats = jc.calibrate(fn, params, [args], statistics=("absmax",))
    sides = {
        "static": (tree, jc.quantize.activations(fn, tree, *args, stats=stats)),
        "per tensor": (tree, jc.quantize.activations(fn, tree, *args)),
        "per row": (tree, jc.quantize.activations(fn, tree, *args, scale="row")),
        "weights on the fly": (params, jc.quantize.activations(fn, params, *args, stats=stats)),
        "weights only (accelerate)": (tree, jc.accelerate(fn)),
    }
    float_ = jax.jit(fn)
    y = float_(params, *args)
    size = sum(x.size for x in jax.tree.leaves(params))
    rows = []
    for label, (given, quantized) in sides.items():
        ours = jax.jit(quantized)
        error = float(jnp.linalg.norm(ours(given, *args) - y) / jnp.linalg.norm(y))
        right = functools.partial(ours, given, *args)
        times = timing.paired(functools.partial(float_, params, *args), right, pairs)
        report = quantized.report(given, *args)
        integers = sum("int32" in row.how for row in report.rows)
        rows.append(
            timing.row(
                f"{name}, {size / 1e6:.1f}M, {label}", ("float32", times[0]), ("jcompress", times[1]),
                target if label in ("static", "per tensor") else "", relative_error=error,
                integer_products=integers, products=len(report.rows),
            )
        )  # fmt: skip
    return rows


def main(argv: list[str] | None = None) -> None:
    parser = timing.parser(__doc__, pairs=15)
    parser.add_argument("--widths", type=int, nargs="+", default=[784, 1024, 2048, 1024, 10])
    parser.add_argument("--batch", type=int, default=128)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=8)
    parser.add_argument("--heads", type=int, default=6)
    parser.add_argument("--texts", type=int, default=8)
    parser.add_argument("--length", type=int, default=128)
    parser.add_argument("--only", choices=("mlp", "transformer"), default=None)
    args = parser.parse_args(argv)
    rows = []
    if args.only != "transformer":
        rows += compared(mlp(args.widths, args.batch), args.pairs, "<= 0.75")
    if args.only != "mlp":
        model = transformer(args.width, args.depth, args.heads, args.texts, args.length)
        rows += compared(model, args.pairs, "<= 0.75")
    timing.finish("integer", rows, args.out, **{k: v for k, v in vars(args).items() if k != "out"})


if __name__ == "__main__":
    main()
