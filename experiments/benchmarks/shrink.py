"""Shrunk networks against the dense ones, and the time it takes to read a function.

    python -m experiments.benchmarks.shrink

A CNN and a transformer lose the same part of every group, so that about half of their multiply-adds stay (as
``jc.trace.cost`` counts them), and their forward passes are timed in turns with the dense ones. Coupling is timed for
transformers of 12, 24 and 48 unrolled layers, and for the same depths under ``scan``.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments.benchmarks import timing

PyTree = Any


def cnn(params: dict, x: jax.Array) -> jax.Array:
    """Three pairs of 3x3 convolutions with pooling between, then two dense layers."""
    for i, kernel in enumerate(params["conv"]):
        x = jax.nn.relu(
            jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        )
        if i % 2:
            x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
    x = jax.nn.relu(x.reshape(x.shape[0], -1) @ params["hidden"])
    return x @ params["head"]


def cnn_model(key: jax.Array, widths: tuple[int, ...] = (64, 64, 128, 128, 256, 256), batch: int = 16) -> tuple:
    keys = iter(jax.random.split(key, 16))
    sizes = (3, *widths)
    conv = [normal(next(keys), 3, 3, a, b) for a, b in zip(sizes, widths, strict=False)]
    params = {"conv": conv, "hidden": normal(next(keys), 16 * widths[-1], 256), "head": normal(next(keys), 256, 10)}
    return cnn, params, (jax.random.normal(next(keys), (batch, 32, 32, 3)),)


def normal(key: jax.Array, *shape: int) -> jax.Array:
    return jax.random.normal(key, shape) / np.prod(shape[:-1]) ** 0.5


def norm(x: jax.Array, scale: jax.Array) -> jax.Array:
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + 1e-6) * scale


def block(x: jax.Array, layer: dict) -> jax.Array:
    y = norm(x, layer["norm_0"])
    query, key, value = (jnp.einsum("btd,dhk->bthk", y, layer[name]) for name in ("query", "key", "value"))
    scores = jnp.einsum("bthk,bshk->bhts", query, key) / layer["query"].shape[-1] ** 0.5
    mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(scores), value)
    x = x + jnp.einsum("bthk,hkd->btd", mixed, layer["out"])
    return x + jax.nn.gelu(norm(x, layer["norm_1"]) @ layer["up"]) @ layer["down"]


def layer(key: jax.Array, width: int, heads: int) -> dict:
    keys = iter(jax.random.split(key, 6))
    into = {name: normal(next(keys), width, heads, width // heads) * heads**0.5 for name in ("query", "key", "value")}
    return {
        **into, "out": normal(next(keys), heads, width // heads, width), "norm_0": jnp.ones(width),
        "norm_1": jnp.ones(width), "up": normal(next(keys), width, 4 * width),
        "down": normal(next(keys), 4 * width, width),
    }  # fmt: skip


def unrolled(params: dict, tokens: jax.Array) -> jax.Array:
    x = params["embed"][tokens]
    for one in params["layers"]:
        x = block(x, one)
    return x @ params["head"]


def scanned(params: dict, tokens: jax.Array) -> jax.Array:
    x, _ = jax.lax.scan(lambda x, one: (block(x, one), None), params["embed"][tokens], params["layers"])
    return x @ params["head"]


def transformer(key: jax.Array, width: int, depth: int, heads: int, batch: int, length: int) -> tuple:
    keys = jax.random.split(key, depth + 3)
    params = {
        "embed": normal(keys[0], 256, width), "head": normal(keys[1], width, 256),
        "layers": [layer(k, width, heads) for k in keys[3:]],
    }  # fmt: skip
    return unrolled, params, (jax.random.randint(keys[2], (batch, length), 0, 256),)


def cut(groups: jc.trace.Groups, part: float, multiple: int) -> dict[str, np.ndarray]:
    """Keep the first part of every group, rounded to a multiple where the group is longer than that."""
    keep = {}
    for name, group in groups.prunable.items():
        step = multiple if group.size > multiple else 1
        keep[name] = np.arange(group.size) < min(group.size, max(step, round(part * group.size / step) * step))
    return keep


def halved(fn: Callable, params: PyTree, args: tuple, multiple: int, target: float = 0.5) -> tuple[Any, PyTree, float]:
    """The network shrunk until at most ``target`` of its multiply-adds stay, and the part that does."""
    groups, dense = jc.trace.coupling(fn, params, *args), jc.trace.cost(fn, params, *args).total.multiply_adds
    for part in np.linspace(1, 0.2, 81):
        small, cut_params = jc.shrink(fn, params, cut(groups, float(part), multiple), *args)
        stays = jc.trace.cost(small, cut_params, *args).total.multiply_adds / dense
        if stays <= target:
            return small, cut_params, stays
    raise ValueError("no cut reaches the target")


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    for name, model in (
        ("CNN, batch 16", lambda: cnn_model(jax.random.key(0))),
        ("transformer, 4 x 128 tokens", lambda: transformer(jax.random.key(1), 384, 6, 6, 4, 128)),
    ):
        yield timing.Case(name, "shrunk", "dense", functools.partial(sides, model, args.multiple), ">= 1.7")


def sides(model: Callable[[], tuple], multiple: int) -> tuple:
    fn, params, args = model()
    small, cut_params, stays = halved(fn, params, args, multiple)
    left, right = jax.jit(small), jax.jit(fn)
    return lambda: left(cut_params, *args), lambda: right(params, *args), {"part_of_multiply_adds": stays}


def coupling_times(depths: list[int]) -> list[dict[str, Any]]:
    found = []
    for depth in depths:
        _, params, args = transformer(jax.random.key(0), 64, depth, 4, 2, 16)
        stacked = {**params, "layers": jax.tree.map(lambda *x: jnp.stack(x), *params["layers"])}
        row: dict[str, Any] = {"depth": depth}
        for name, fn, p in (("unrolled", unrolled, params), ("scan", scanned, stacked)):
            start = time.perf_counter()
            groups = jc.trace.coupling(fn, p, *args)
            row[f"{name}_s"], row[f"{name}_groups"] = time.perf_counter() - start, len(groups.prunable)
        found.append(row)
        print("  ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in row.items()), flush=True)
    return found


def main(argv: Sequence[str] | None = None) -> None:
    options = {
        "multiple": (8, "sizes are rounded to a multiple of this"),
        "depths": ([12, 24, 48], "layers of the transformers whose coupling is timed"),
    }
    about = {"about": lambda args: {"coupling": coupling_times(args.depths)}}
    for row in timing.run("shrink", __doc__, cases, options, argv, pairs=21, **about):
        print(f"{row.name}: {100 * row.extra['part_of_multiply_adds']:.0f}% of the multiply-adds stay")


if __name__ == "__main__":
    main()
