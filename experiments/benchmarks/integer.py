"""Inference with 8-bit weights and 8-bit activations multiplied as integers, against float32.

    python -m experiments.benchmarks.integer

Weights are codes with a scale for each output; ranges of activations are static, from calibration, or taken from each
batch as it comes. Attention scores, norms and the embedding stay float. The error is that of the outputs, relative to
the float model in the Frobenius norm.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.benchmarks import timing
from experiments.benchmarks.train_step import MODELS, attention, kernel, norm

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


SIDES = {
    "static": lambda fn, tree, params, args, stats: (tree, jc.quantize.activations(fn, tree, *args, stats=stats)),
    "per tensor": lambda fn, tree, params, args, stats: (tree, jc.quantize.activations(fn, tree, *args)),
    "per row": lambda fn, tree, params, args, stats: (tree, jc.quantize.activations(fn, tree, *args, scale="row")),
    "weights on the fly": lambda fn, tree, params, args, stats: (
        params,
        jc.quantize.activations(fn, params, *args, stats=stats),
    ),
    "weights only (accelerate)": lambda fn, tree, params, args, stats: (tree, jc.accelerate(fn)),
}


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    for name in args.models:
        make = {
            "mlp": lambda: mlp(args.widths, args.batch),
            "transformer": lambda: transformer(args.width, args.depth, args.heads, args.texts, args.length),
        }[name]
        model = make()
        size = sum(x.size for x in jax.tree.leaves(model[2])) / 1e6
        for label in SIDES:
            target = "<= 0.75" if label in ("static", "per tensor") else ""
            title = f"{model[0]}, {size:.1f}M, {label}"
            yield timing.Case(title, "float32", "jcompress", functools.partial(sides, model, label), target)


def sides(model: Model, label: str) -> tuple:
    """The float model and the quantized one, with its error and how many of its products are of integers."""
    _, fn, params, args = model
    tree = jc.compress(params, planned(params))
    stats = jc.calibrate(fn, params, [args], statistics=("absmax",))
    given, quantized = SIDES[label](fn, tree, params, args, stats)
    ours, plain = jax.jit(quantized), jax.jit(fn)
    y = plain(params, *args)
    report = quantized.report(given, *args)
    extra = {
        "relative_error": float(jnp.linalg.norm(ours(given, *args) - y) / jnp.linalg.norm(y)),
        "integer_products": sum("int32" in row.how for row in report.rows),
        "products": len(report.rows),
    }
    return functools.partial(plain, params, *args), functools.partial(ours, given, *args), extra


def main(argv: Sequence[str] | None = None) -> None:
    timing.run("integer", __doc__, cases, MODELS, argv, pairs=15)


if __name__ == "__main__":
    main()
