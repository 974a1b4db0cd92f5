"""What 2 bits a weight leave: of Gaussian weights, and of a layer's outputs where its inputs are correlated.

    python -m experiments.benchmarks.two_bits

The first rows are the mean squared error of Gaussian weights of variance 1, the scale of each output stored beside the
codes; no code of 2 bits leaves less than 1/16. The others are ``tr(dW^T H dW) / tr(W^T H W)`` of a 256 x 256 matrix, as
its square root: the relative error of the outputs. Means over seeds. Each bit of memory doubles the time of a trellis.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments import flags, tables
from experiments.environment import environment
from experiments.workdir import write

Q = jc.quantize
SHAPE = 512, 64
"""Of Gaussian weights."""


def gaussian(memories: Sequence[int]) -> dict[str, Any]:
    """Codes of Gaussian weights."""
    trellises = {f"trellis, memory {m}": Q.Trellis(memory=m) for m in memories}
    return {"four values": jc.share.KMeans(clusters=4, exact=True), "E8P": Q.E8P(), **trellises}


def outputs(memories: Sequence[int]) -> dict[str, Any]:
    """Codes of a layer by the error of its outputs, all of them rotated."""
    trellises = {f"trellis, memory {m}": Q.Trellis(memory=m, block=(4, 16), weigh="gram") for m in memories if m < 16}
    gptq = Q.GPTQ(bits=2, symmetric=False, clip="mse")
    methods = {"GPTQ, clipped": gptq, "E8P": Q.E8P(weigh="gram"), **trellises}
    return {name: Q.Rotation(method) for name, method in methods.items()}


def mean_squared(method: Any, seed: int) -> tuple[float, float]:
    """The error of Gaussian weights, and bits a weight."""
    w = jax.random.normal(jax.random.key(seed), SHAPE)
    node = method(w)
    return float(jnp.mean(jnp.square(node.materialize() - w))), node.nbits() / w.size


def of_outputs(method: Any, size: int, seed: int) -> tuple[float, float]:
    """The relative error of a layer's outputs, and bits a weight."""
    rng = np.random.default_rng(seed)
    x = rng.normal(size=(8 * size, size)) @ (rng.normal(size=(size, size)) * np.exp(-np.arange(size) / 80)[:, None])
    w, gram = jnp.asarray(rng.normal(size=(size, size)), jnp.float32), jnp.asarray(x.T @ x, jnp.float32)
    node = method(w, jc.Context(stats=jc.trace.Stats(gram=gram, axes=(-2,)), path="w", key=jax.random.key(seed)))
    change = node.materialize() - w
    moved, whole = (float(jnp.sum(y * jnp.matmul(gram, y, precision="highest"))) for y in (change, w))
    return float(np.sqrt(moved / whole)), node.nbits() / w.size


def row(what: str, name: str, one: Callable[[int], tuple[float, float]], seeds: int) -> dict[str, Any]:
    """Means over seeds, and the time of the last, compiled."""
    found = []
    for seed in range(seeds):
        start = time.process_time()
        found.append(one(seed))
    error, bits = np.mean(found, axis=0)
    spread = float(np.std([x for x, _ in found]))
    seconds = round(time.process_time() - start, 3)
    return {"what": what, "code": name, "error": float(error), "deviation": spread, "bits": float(bits), "s": seconds}


def rows(args: Any) -> list[dict[str, Any]]:
    """All of them."""
    memories = [int(x) for x in args.memories.split(",")]
    found = []
    for name, method in gaussian(memories).items():
        found.append(row("Gaussian", name, lambda seed, m=method: mean_squared(m, seed), args.seeds))
    for name, method in outputs(memories).items():
        found.append(row("outputs", name, lambda seed, m=method: of_outputs(m, args.size, seed), args.seeds))
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.Parser(description=__doc__)
    parser.add_argument("--seeds", type=flags.positive, default=3)
    parser.add_argument("--size", type=flags.positive, default=256, help="inputs and outputs of the layer")
    parser.add_argument("--memories", default="8,10,12,16", help="bits of the trellises, joined by commas")
    parser.add_argument("--out", default="runs/benchmarks/two_bits.json", help="the JSON file to write")
    args = parser.parse_args(argv)
    found = rows(args)
    cells = [["", "code", "error", "deviation", "bits a weight", "s"]]
    cells += [
        [x["what"], x["code"], f"{x['error']:.4f}", f"{x['deviation']:.4f}", f"{x['bits']:.2f}", f"{x['s']:.1f}"]
        for x in found
    ]
    print(tables.aligned(cells, left=(0, 1), ruled=True))
    settings = {name: value for name, value in vars(args).items() if name != "out"}
    Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    record = {"benchmark": "two_bits", "settings": settings, "environment": environment(), "rows": found}
    write(Path(args.out), json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
