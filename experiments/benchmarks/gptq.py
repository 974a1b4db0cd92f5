"""GPTQ on the matrices of a sentence encoder, against the same sweep column by column.

    python -m experiments.benchmarks.gptq

The sizes are those of all-MiniLM-L6-v2: a layer has four matrices of 384 x 384, one of 384 x 1536 and one of 1536 x
384, and there are six layers. The other side is the published loop as one writes it: one column at a time, whose error
moves all columns after it, under ``jit``, matrices of one shape compiled once. Both take the same damped Cholesky
factor, and both give codes and scales. Weights and activations are random; the time does not depend on them.
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
from jcompress.numeric.damping import damped, inverse_factor


def shapes(width: int) -> dict[str, tuple[int, int]]:
    square = dict.fromkeys(("query", "key", "value", "output"), (width, width))
    return {**square, "up": (width, 4 * width), "down": (4 * width, width)}


def matrices(width: int, layers: int, seed: int = 0) -> tuple[dict[str, jax.Array], dict[str, jc.trace.Stats]]:
    """Weights and Gram matrices by path; inputs have some directions in common, as activations do."""
    rng = np.random.default_rng(seed)
    params, stats = {}, {}
    for layer in range(layers):
        for name, (k, n) in shapes(width).items():
            path = f"layer{layer}_{name}"
            x = rng.normal(size=(2 * k, k)) + rng.normal(size=(2 * k, 16)) @ rng.normal(size=(16, k))
            params[path] = jnp.asarray(rng.normal(size=(k, n)) / k**0.5, jnp.float32)
            stats[path] = jc.trace.Stats(gram=jnp.asarray(x.T @ x, jnp.float32), axes=(-2,))
    return params, stats


def stacked(params: dict[str, jax.Array], stats: dict[str, jc.trace.Stats], width: int) -> tuple[Any, Any]:
    """The same, layers stacked as for ``jax.lax.scan``."""
    paths = {name: [p for p in params if p.endswith("_" + name)] for name in shapes(width)}
    together = {name: jnp.stack([params[p] for p in found]) for name, found in paths.items()}
    known = {name: jax.tree.map(lambda *xs: jnp.stack(xs), *[stats[p] for p in found]) for name, found in paths.items()}
    return together, known


@functools.partial(jax.jit, static_argnames=("bits", "group_size"))
def by_columns(w: jax.Array, gram: jax.Array, bits: int, group_size: int | None) -> tuple[jax.Array, jax.Array]:
    """Codes and scales, one input after the other."""
    k, most = len(w), 2 ** (bits - 1) - 1
    group = group_size or k
    factor = inverse_factor(damped(gram, 0.01))

    def one(j: jax.Array, state: tuple) -> tuple:
        w, codes, scales = state

        def refit(scales: jax.Array) -> jax.Array:
            high = jnp.abs(jax.lax.dynamic_slice_in_dim(w, j, group)).max(0)
            return scales.at[j // group].set(jnp.where(high > 0, high / most, 1))

        scales = jax.lax.cond(j % group == 0, refit, lambda scales: scales, scales)
        code = jnp.clip(jnp.round(w[j] / scales[j // group]), -most, most)
        error = (w[j] - code * scales[j // group]) / factor[j, j]
        later = jnp.where(jnp.arange(k) > j, factor[j], 0)
        return w - later[:, None] * error, codes.at[j].set(code.astype(jnp.int8)), scales

    start = (w, jnp.zeros(w.shape, jnp.int8), jnp.ones((k // group, w.shape[1])))
    return jax.lax.fori_loop(0, k, one, start)[1:]


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    for layers in sorted({1, args.layers}):
        for group in (None, args.group_size):
            label = f"{layers} layers of {args.width}, " + (f"groups of {group}" if group else "one scale an output")
            make = functools.partial(sides, args.width, layers, args.bits, group, scan=False)
            yield timing.Case(label, "GPTQ", "columns", make, ">= 2")
    label = f"{args.layers} layers of {args.width} stacked, groups of {args.group_size}"
    make = functools.partial(sides, args.width, args.layers, args.bits, args.group_size, scan=True)
    yield timing.Case(label, "GPTQ", "columns", make, ">= 2")


def sides(width: int, layers: int, bits: int, group_size: int | None, *, scan: bool) -> tuple:
    """Ours and the loop, and how far the codes agree."""
    params, stats = matrices(width, layers)
    tree, known = stacked(params, stats, width) if scan else (params, stats)
    method = jc.quantize.GPTQ(bits=bits, group_size=group_size)
    plan = jc.plan(tree, [(".*", jc.stacked(method) if scan else method)])

    def ours() -> Any:
        return jc.compress(tree, plan, stats=known)

    def loop() -> Any:
        return {path: by_columns(w, stats[path].gram, bits, group_size) for path, w in params.items()}

    small, plain = ours(), loop()
    same = [np.mean(np.asarray(small[p].codes) == np.asarray(plain[p][0])) for p in params if not scan]
    return ours, loop, {"codes_agree": float(np.mean(same)) if same else None}


def main(argv: Sequence[str] | None = None) -> None:
    options = {
        "width": (384, "of the encoder"),
        "layers": (6, "how many"),
        "bits": (4, "of a weight"),
        "group-size": (64, "inputs that share a scale"),
    }
    rows = timing.run("gptq", __doc__, cases, options, argv, pairs=5)
    if len(rows) == 5:
        print(f"all layers take {rows[2].left_s / rows[0].left_s:.2f} times the time of one")


if __name__ == "__main__":
    main()
