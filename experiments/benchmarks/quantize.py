"""Conversion of a transformer's kernels to few bits, against one plain pass over them.

    python -m experiments.benchmarks.quantize

The plain pass takes the largest magnitude of each column and copies the kernel: two reads and a write, which is what
any conversion needs at least, but that it writes fewer bytes. All kernels are converted in one compiled function. Where
qwix can be imported, its conversion to the same format is timed against ours.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.benchmarks import timing
from experiments.benchmarks.train_step import transformer

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


def peer_version() -> str | None:
    try:
        return metadata.version("qwix")
    except metadata.PackageNotFoundError:
        return None


FORMATS = {
    "int8": (jc.quantize.Int(bits=8), lambda: qwix("int8", None)),
    "int4, groups of 64": (jc.quantize.Int(bits=4, group_size=64), lambda: qwix("int4", 64)),
    "NF4, groups of 64": (jc.quantize.NF4(group_size=64), lambda: qwix("nf4", 64)),
    "MXFP8": (jc.quantize.Microscaling("e4m3"), lambda: None),
}


def compare(
    name: str, left: tuple[str, Convert], right: tuple[str, Convert], tree: Kernels, pairs: int, target: str = ""
) -> timing.Row:
    base, side = jax.jit(left[1]), jax.jit(right[1])
    times = timing.paired(lambda: base(tree), lambda: side(tree), pairs)
    found = timing.row(name, (left[0], times[0]), (right[0], times[1]), target)
    print(timing.table([found]).splitlines()[1], flush=True)
    return found


def main(argv: list[str] | None = None) -> None:
    parser = timing.parser(__doc__, pairs=21)
    parser.add_argument("--width", type=int, default=384)
    parser.add_argument("--depth", type=int, default=6)
    parser.add_argument("--only", default="", help="formats whose name has this in it")
    args = parser.parse_args(argv)
    tree = jax.block_until_ready(kernels(args.width, args.depth))
    size = sum(w.size for w in tree.values()) / 1e6
    rows = []
    for name, (method, peer) in FORMATS.items():
        if args.only not in name:
            continue
        mine, convert = ("jcompress", ours(method)), peer()
        rows.append(compare(f"{size:.1f}M: {name}", ("plain pass", plain), mine, tree, args.pairs))
        if convert is not None:
            rows.append(compare(f"{size:.1f}M: {name}", mine, ("qwix", convert), tree, args.pairs, ">= 1"))
    settings = {k: v for k, v in vars(args).items() if k != "out"}
    timing.finish("quantize", rows, args.out, qwix=peer_version(), **settings)


if __name__ == "__main__":
    main()
