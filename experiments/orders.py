"""Distillation, pruning, quantization and an early exit in every order (Shen et al. 2024, arXiv:2403.17447).

    python -m experiments.orders --data=mnist --data_dir=D

The network is LeNet-300-100. Each stage is a function from parameters to parameters that keeps what stages before it
fixed: zeros stay zeros, and
quantized weights are trained as they will be stored. D cuts both hidden layers to half of their units and trains by the
dense network's outputs; P prunes 90% of the kernels along a ramp; Q trains 4-bit weights straight-through; E trains a
head on the first hidden layer, by which examples leave where its confidence passes a threshold. All stages of all
orders that begin alike are trained once: 64 trainings a seed, and the dense network.

Rows have error, coded bytes and expected bit operations (multiply-adds times bits of weights, 32 of activations, the
part of weights kept, and the part of examples that reach the layer) of every prefix, on the last 5,000 training images
by which thresholds are chosen; those of whole orders on the test images too. The table of interactions says, for each
pair of stages, what is gained by the first before the second: means over the twelve orders of either kind. Nothing is
assumed of which order wins.
"""

from __future__ import annotations

import functools
import itertools
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jcompress as jc
from experiments import data as datasets
from experiments import flags, runner, tables
from experiments.lab import cross_entropy
from experiments.pipelines import Bench, load_split
from experiments.workdir import Row, Rows, write

PyTree = Any
STAGES = "DPQE"
SPARSITY, BITS, LOST = 0.9, 4, 0.1
KERNELS = "(dense_.|head)/kernel"


def apply(params: PyTree, x: jax.Array) -> tuple[jax.Array, jax.Array | None]:
    """Logits, and those of the exit where there is one."""
    hidden = jax.nn.relu(_affine(params["dense_0"], x.reshape(len(x), -1)))
    early = _affine(params["exit"], hidden) if "exit" in params else None
    return _affine(params["head"], jax.nn.relu(_affine(params["dense_1"], hidden))), early


def _affine(layer: PyTree, x: jax.Array) -> jax.Array:
    return x @ layer["kernel"] + layer["bias"]


class Orders:
    """A row for each prefix of each order, as the runner takes them."""

    keys = ("seed", "order")

    def __init__(self, args: Any) -> None:
        load = functools.partial(load_split, args.data, args.data_dir)
        self.bench = Bench("lenet_300_100", load, scale=args.epochs)
        self.workdir, self.seeds = Path(args.workdir or f"runs/orders/{args.data}"), args.seeds
        self.setting = {"data": str(self.bench.load(0)), "epochs": args.epochs, "ways": {}}
        self._logits = jax.jit(apply)

    def todo(self) -> Iterator[Row]:
        for seed, length in itertools.product(range(self.seeds), range(len(STAGES) + 1)):
            yield from ({"seed": seed, "order": "".join(x)} for x in itertools.permutations(STAGES, length))

    def measure(self, rows: Rows, seed: int, order: str) -> Row:
        """The last stage on what the ones before left on disk."""
        params = self._dense(seed) if not order else self._stage(order, jc.load(self._file(seed, order[:-1])), seed)
        self._file(seed, order).parent.mkdir(parents=True, exist_ok=True)
        jc.save(self._file(seed, order), params)
        nodes = jc.compress(params, stored(params, order))
        data, dense = self.bench.load(0), jc.materialize(nodes)
        row = {"bytes": -(-jc.nbits(nodes, coded=True) // 8)}
        found, threshold = self._outputs(dense, data.val), None
        if "E" in order:
            threshold = _threshold(*found, data.val.y)
        error, early = _judged(*found, data.val.y, threshold)
        row |= {"validation": error, "early": early, "bit operations": operations(nodes, order, early)}
        if len(order) == len(STAGES):
            error, early = _judged(*self._outputs(dense, data.test), data.test.y, threshold)
            row |= {"test": error, "test bit operations": operations(nodes, order, early)}
        return row

    def _dense(self, seed: int) -> PyTree:
        return self._train("", self.bench.start(seed), 4, seed, optax.adam)

    def _stage(self, order: str, params: PyTree, seed: int) -> PyTree:
        *_, last = order
        if last == "D":
            return self._train(order, narrowed(params), 2, seed, optax.adam)
        if last == "E":
            params = {**params, "exit": jax.tree.map(lambda x: x[: len(params["dense_0"]["bias"])], self._exit())}
        return self._train(order, params, 1 if last in "QE" else 2, seed, optax.adam)

    def _exit(self) -> PyTree:
        return {"kernel": jnp.zeros((300, 10)), "bias": jnp.zeros(10)}

    def _train(self, order: str, params: PyTree, epochs: float, seed: int, optimizer: Any) -> PyTree:
        """Train under what these stages fix; the last one says how."""
        quantized = jc.plan(params, [(KERNELS, _grid())], layout=None) if "Q" in order else None
        soft = jc.load(self._file(seed, "")) if order.endswith("D") else None
        tx = optimizer(optax.cosine_decay_schedule(1e-3, self.bench.steps(epochs), alpha=0.01))
        tx = optax.chain(tx, jc.project(self._masks(params, order, epochs), every=20)) if "P" in order else tx
        if order.endswith("E"):  # the head alone
            tx = optax.chain(tx, _only("exit"))

        def loss(train: PyTree, held: Any, x: Any, y: Any, targets: Any, key: Any) -> jax.Array:
            late, early = apply(train if quantized is None else jc.simulate(train, quantized), x)
            total = sum(cross_entropy(z, y).mean() for z in (late, early) if z is not None)
            return total if targets is None else total + jc.distill.soft_targets(late, targets, temperature=2.0)

        shapes = tuple(x.shape for x in jax.tree.leaves(params))
        return self.bench.fit((order, shapes), params, None, loss, tx, epochs, seed + len(order), soft)[0]

    def _masks(self, params: PyTree, order: str, epochs: float) -> jc.Plan:
        if not order.endswith("P"):
            return jc.plan(params, [(KERNELS, jc.prune.Nonzero())])
        ramp = optax.polynomial_schedule(0.0, SPARSITY, 3, self.bench.steps(epochs) // 2)
        return jc.plan(params, [(KERNELS, jc.prune.Magnitude(ramp))])

    def _outputs(self, params: PyTree, split: datasets.Split) -> tuple[np.ndarray, np.ndarray | None]:
        late, early = self._logits(params, split.x)
        return np.asarray(late), None if early is None else np.asarray(early)

    def _file(self, seed: int, order: str) -> Path:
        return self.workdir / "models" / f"{seed}-{order or 'dense'}.jc"

    def line(self, row: Row) -> str:
        return f"seed {row['seed']}, {row['order'] or 'dense'}: {row['bytes']:,} bytes, {row['validation']:.2f}%"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        return publish(rows, self.workdir / "table.md"), None


def _only(name: str) -> optax.GradientTransformation:
    """Updates of one subtree alone."""

    def update(updates: PyTree, state: Any, params: Any = None) -> tuple[PyTree, Any]:
        return {k: x if k == name else jax.tree.map(jnp.zeros_like, x) for k, x in updates.items()}, state

    return optax.GradientTransformation(lambda params: optax.EmptyState(), update)


def _grid() -> Any:
    return jc.quantize.Int(bits=BITS, clip="mse")


def narrowed(params: PyTree) -> PyTree:
    """Half of the units of each hidden layer, those whose weights in and out have the largest product of norms."""
    found = {name: dict(layer) for name, layer in params.items()}
    for layer, readers in (("dense_0", ("dense_1", "exit")), ("dense_1", ("head",))):
        inner = [name for name in readers if name in found]
        size = jnp.linalg.norm(found[layer]["kernel"], axis=0)
        out = sum(jnp.linalg.norm(found[name]["kernel"], axis=1) for name in inner)
        kept = jnp.sort(jnp.argsort(-size * out)[: len(size) // 2])
        found[layer] = {"kernel": found[layer]["kernel"][:, kept], "bias": found[layer]["bias"][kept]}
        for name in inner:
            found[name]["kernel"] = found[name]["kernel"][kept]
    return found


def stored(params: PyTree, order: str) -> jc.Plan:
    """What a file holds after these stages."""
    methods = [jc.prune.Nonzero()] * ("P" in order) + [_grid()] * ("Q" in order)
    kernel = jc.chain(*methods) if len(methods) > 1 else (methods or [None])[0]
    return jc.plan(params, [(KERNELS, kernel), (".*", jc.quantize.Float("bfloat16"))])


def operations(nodes: PyTree, order: str, early: float) -> float:
    """Expected bit operations of an example, of which a part leaves early."""
    total = 0.0
    for name, layer in nodes.items():
        node = layer["kernel"]
        kept = int(np.asarray(node.mask).sum()) if isinstance(node, jc.formats.Masked) else math.prod(node.shape)
        bits = BITS if "Q" in order and name != "exit" else 16 if name == "exit" else 32
        total += 32 * kept * bits * (1.0 if name in ("dense_0", "exit") else 1 - early)
    return total


def _confidence(logits: np.ndarray) -> np.ndarray:
    z = np.exp(logits - logits.max(-1, keepdims=True))
    return (z / z.sum(-1, keepdims=True)).max(-1)


def _judged(late: np.ndarray, early: np.ndarray | None, y: np.ndarray, threshold: float | None) -> tuple[float, float]:
    """Error in percent, and the part that leaves early."""
    answers, leaves = late.argmax(-1), np.zeros(len(y), bool)
    if early is not None and threshold is not None:
        leaves = _confidence(early) > threshold
        answers = np.where(leaves, early.argmax(-1), answers)
    return 100 * float((answers != y).mean()), float(leaves.mean())


def _threshold(late: np.ndarray, early: np.ndarray | None, y: np.ndarray) -> float:
    """The lowest at which at most a tenth of a point is lost on these examples."""
    alone = _judged(late, None, y, None)[0]
    tried = [float(x) for x in 1 - np.geomspace(0.5, 1e-4, 60)]
    return next((t for t in tried if _judged(late, early, y, t)[0] <= alone + LOST), 1.0)


def publish(rows: Sequence[Row], path: Path) -> str:
    """Write both tables; return them as text."""
    both = [table(rows), interactions(rows)]
    write(path, "\n\n".join(map(tables.markdown, both)) + "\n")
    return "\n\n".join(map(tables.aligned, both))


def table(rows: Sequence[Row]) -> list[list[str]]:
    """All whole orders, by bit operations, the head first."""
    found = []
    for order in dict.fromkeys(row["order"] for row in rows if len(row["order"]) == len(STAGES)):
        own = [row for row in rows if row["order"] == order]
        error, size, work = (float(np.mean([r[k] for r in own])) for k in ("test", "bytes", "test bit operations"))
        found.append((work, [" > ".join(order), str(len(own)), f"{error:.2f}", f"{size:,.0f}", f"{work / 1e6:.2f}"]))
    head = ["order", "seeds", "test error, %", "bytes, coded", "bit operations, millions"]
    return [head, *(cells for _, cells in sorted(found))]


def interactions(rows: Sequence[Row]) -> list[list[str]]:
    """For each pair what the one before the other changes: error in points, bytes and bit operations in percent."""
    whole = [row for row in rows if len(row["order"]) == len(STAGES)]
    found = [["first", "second", "error, points", "bytes, %", "bit operations, %"]]
    for first, second in itertools.combinations(STAGES, 2):
        mean = {}
        for name in ("test", "bytes", "test bit operations"):
            sides = [[r[name] for r in whole if (r["order"].index(first) < r["order"].index(second)) == is_first]
                     for is_first in (True, False)]  # fmt: skip
            mean[name] = [float(np.mean(side)) if side else math.nan for side in sides]
        ahead = [f"{mean['test'][0] - mean['test'][1]:+.2f}"]
        ahead += [f"{100 * (mean[name][0] / mean[name][1] - 1):+.1f}" for name in ("bytes", "test bit operations")]
        found.append([first, second, *ahead])
    return found


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/orders/<data>")
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--seeds", type=flags.positive, default=3)
    parser.add_argument("--epochs", type=float, default=1.0, help="scale of all epochs, to try things out")
    args = parser.parse_args(argv)
    return runner.main(lambda signals: Orders(args), args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
