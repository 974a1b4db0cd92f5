"""Conversion of a transformer's kernels to few bits, against one plain pass over them.

    python -m experiments.benchmarks.quantize

The plain pass takes the largest magnitude of each column and copies the kernel: two reads and a write, which is what
any conversion needs at least, but that it writes fewer bytes. All kernels are converted in one compiled function. Where
qwix can be imported, its conversion to the same format is timed against ours.
"""

from __future__ import annotations

import argparse
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.benchmarks import timing
from experiments.benchmarks.train_step import transformer
from experiments.environment import version

Kernels = dict[str, jax.Array]
Convert = Callable[[Kernels], Any]


def kernels(width: int, depth: int) -> Kernels:
    """The matrices of a decoder's blocks, in float32."""
    params = transformer(width, depth, heads=6, batch=1, length=8).params
    return {
        f"{i}/{name}": block[name]["kernel"]
        for i, block in enumerate(params["block"])
        for name in ("qkv", "out", "up", "down")
    }


def plain(tree: Kernels) -> Any:
    return jax.tree.map(lambda w: (jnp.abs(w).max(-2), w + 1), tree)


def ours(method: Any) -> Convert:
    return lambda tree: jax.tree.map(lambda w: method(w), tree)


def qwix(dtype: str, group_size: int | None) -> Convert | None:
    """The peer's conversion: symmetric, a scale for each output channel and, with groups, each group of inputs."""
    try:
        import qwix as peer
    except ImportError as error:
        print(f"no row for qwix: {error}", file=sys.stderr)
        return None
    tiles = {} if group_size is None else {0: group_size}
    return lambda tree: jax.tree.map(lambda w: peer.quantize(w, dtype, channelwise_axes=(1,), tiled_axes=tiles), tree)


FORMATS = {
    "int8": (jc.quantize.Int(bits=8), lambda: qwix("int8", None)),
    "int4, groups of 64": (jc.quantize.Int(bits=4, group_size=64), lambda: qwix("int4", 64)),
    "NF4, groups of 64": (jc.quantize.NF4(group_size=64), lambda: qwix("nf4", 64)),
    "MXFP8": (jc.quantize.Microscaling("e4m3"), lambda: None),
}


def cases(args: argparse.Namespace) -> Iterator[timing.Case]:
    tree = jax.block_until_ready(kernels(args.width, args.depth))
    size = sum(w.size for w in tree.values()) / 1e6
    for name, (method, peer) in FORMATS.items():
        make = functools.partial(sides, tree, lambda: plain, lambda method=method: ours(method))
        yield timing.Case(f"{size:.1f}M: {name}", "plain pass", "jcompress", make)
        make = functools.partial(sides, tree, lambda method=method: ours(method), peer)
        yield timing.Case(f"{size:.1f}M: {name}", "jcompress", "qwix", make, ">= 1")


def sides(tree: Kernels, left: Callable[[], Convert | None], right: Callable[[], Convert | None]) -> tuple | None:
    made = left(), right()
    if None in made:
        return None
    a, b = map(jax.jit, made)
    return lambda: a(tree), lambda: b(tree)


def main(argv: Sequence[str] | None = None) -> None:
    options = {"width": (384, "of the transformer"), "depth": (6, "of the transformer")}
    about = {"qwix": version("qwix")}
    timing.run("quantize", __doc__, cases, options, argv, pairs=21, about=lambda args: about)


if __name__ == "__main__":
    main()
