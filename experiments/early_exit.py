"""Early exits on a pretrained ResNet-56: expected multiply-adds beside test error, and latency at a batch of one.

Examples:
  python -m experiments.early_exit --data_dir=<folder with CIFAR-10 and resnet56_cifar10.npz>
  python -m experiments.early_exit --data_dir=<the same, with resnet20_cifar10.npz> --first=resnet20 --cuts=

The trunk is as it was; small heads are trained on its frozen features, a few epochs on a part of the training images.
With ``--first`` an exit stands before the trunk, whose head is a pretrained network that reads the image: a cascade.

Thresholds of the exits' entropies are calibrated for a budget of expected multiply-adds on ``--held`` of the test
images, the first: pretrained networks have seen all training images, and are surer of these than of any others. The
table is of the other test images, which are read once, at the end; nothing is chosen on them.

``--smoke`` runs the same on random images with a small random network and needs no files: a test of the code.

It writes ``--workdir``/early_exit.json, or cascade.json with ``--first``, and prints the table.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

import jcompress as jc
from experiments import data as datasets
from experiments import flags
from experiments.models import resnet
from experiments.runner import refuse


class Head(nnx.Module):
    """Two convolutions and a mean: reads features (n, channels, height, width)."""

    def __init__(self, channels: int, width: int, *, rngs: nnx.Rngs) -> None:
        self.first = nnx.Conv(channels, width, (3, 3), strides=2, rngs=rngs)
        self.second = nnx.Conv(width, width, (3, 3), rngs=rngs)
        self.out = nnx.Linear(width, 10, rngs=rngs)

    def __call__(self, x: jax.Array) -> jax.Array:
        x = nnx.relu(self.first(x.transpose(0, 2, 3, 1)))
        return self.out(nnx.relu(self.second(x)).mean((1, 2)))


@dataclasses.dataclass
class Network:
    """A frozen trunk in parts, and the heads at their ends but the last.

    Attributes:
      params: of the trunk.
      statistics: of its batch norms.
      cuts: the blocks after which exits stand.
      first: parameters and statistics of a network that reads the image before the trunk does, or None.
      heads: a graph and a state each, at the cuts.
    """

    params: Any
    statistics: Any
    cuts: tuple[int, ...]
    first: tuple[Any, Any] | None = None
    heads: list[tuple[Any, Any]] = dataclasses.field(default_factory=list)

    @property
    def trunk(self) -> list[tuple[Any, Any]]:
        """Its parts, each a function of parameters and of what stands before, and the parameters."""
        parts = zip((0, *self.cuts), (*self.cuts, None), strict=True)
        return [(functools.partial(_part, self.statistics, begin, end), self.params) for begin, end in parts]

    @property
    def exits(self) -> list[tuple[Any, Any]]:
        """What reads each stage, in the same form; the trunk's own head is in its last part."""
        before = [(functools.partial(_part, self.first[1], 0, None), self.first[0])] if self.first else []
        heads = [(lambda state, x, graph=graph: nnx.merge(graph, state)(x), state) for graph, state in self.heads]
        return [*before, *heads, (_same, None)]

    @property
    def parts(self) -> list[tuple[Any, Any]]:
        """The trunk's, behind the image itself where a network reads that."""
        return [*([(_same, None)] if self.first else []), *self.trunk]

    @property
    def stages(self) -> list[Any]:
        return [functools.partial(run, params) for run, params in self.parts]

    @property
    def functions(self) -> list[Any]:
        return [functools.partial(run, params) for run, params in self.exits]

    def costs(self) -> list[float]:
        """Multiply-adds of an image that leaves at each exit."""
        x, spent, found = jnp.zeros((1, 32, 32, 3)), 0.0, []
        for (part, params), (head, own) in zip(self.parts, self.exits, strict=True):
            spent += jc.trace.cost(part, params, x).total.multiply_adds
            x = jax.eval_shape(part, params, x)
            spent += jc.trace.cost(head, own, x).total.multiply_adds
            found.append(spent)
        return found


def _part(statistics: Any, begin: int, end: int | None, params: Any, x: jax.Array) -> jax.Array:
    return resnet.segment(params, x, statistics, begin, end)[0]


def _same(_: None, x: jax.Array) -> jax.Array:
    return x


def features(stages: Sequence[Any], images: np.ndarray, batch: int) -> list[np.ndarray]:
    """What each stage gives, in 16 bits."""
    found: list[list[np.ndarray]] = [[] for _ in stages]
    runs = [jax.jit(stage) for stage in stages]
    for i in range(0, len(images), batch):
        x = images[i : i + batch]
        for e, run in enumerate(runs):
            x = run(x)
            found[e].append(np.asarray(x, np.float16))
    return [np.concatenate(parts) for parts in found]


def train_head(x: np.ndarray, y: np.ndarray, width: int, epochs: int, seed: int, batch: int = 100) -> tuple[Any, Any]:
    """A head trained on features; half of them are flipped."""
    graph, state = nnx.split(Head(x.shape[1], width, rngs=nnx.Rngs(seed)))
    steps = epochs * (len(x) // batch)
    tx = optax.adamw(optax.cosine_onecycle_schedule(max(steps, 2), 4e-3), weight_decay=1e-2)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(state: Any, memory: Any, x: jax.Array, y: jax.Array, flip: jax.Array) -> Any:
        x = x.astype(jnp.float32)
        x = jnp.where(flip[:, None, None, None], x[..., ::-1], x)

        def loss(state: Any) -> jax.Array:
            return optax.softmax_cross_entropy_with_integer_labels(nnx.merge(graph, state)(x), y).mean()

        updates, memory = tx.update(jax.grad(loss)(state), memory, state)
        return optax.apply_updates(state, updates), memory

    memory, rng = tx.init(state), np.random.default_rng(seed)
    for _ in range(epochs):
        order = rng.permutation(len(x))
        for i in range(0, len(x) - batch + 1, batch):
            chosen = order[i : i + batch]
            state, memory = step(state, memory, x[chosen], y[chosen], rng.random(batch) < 0.5)
    return graph, state


def all_logits(net: Network, images: np.ndarray, batch: int) -> np.ndarray:
    """(exits, images, 10)."""
    found: list[list[np.ndarray]] = [[] for _ in net.exits]
    stages, heads = ([jax.jit(run) for run in runs] for runs in (net.stages, net.functions))
    for i in range(0, len(images), batch):
        x = images[i : i + batch]
        for e, (stage, head) in enumerate(zip(stages, heads, strict=True)):
            x = stage(x)
            found[e].append(np.asarray(head(x)))
    return np.stack([np.concatenate(rows) for rows in found])


def latency(net: Network, images: np.ndarray, thresholds: Sequence[float]) -> tuple[float, float]:
    """Mean milliseconds an image, one at a time in turns: whole, and with exits."""
    whole = jax.jit(lambda x: resnet.logits(net.params, x, net.statistics))
    parts = [jax.jit(lambda x, s=s, h=h: _sure(s(x), h)) for s, h in zip(net.stages, net.functions, strict=True)]
    spent = np.zeros((2, len(images)))

    def early(x: jax.Array) -> jax.Array:
        # The host looks at each exit: convolutions inside of control flow are slow on CPU.
        for part, limit in zip(parts, [*thresholds, np.inf], strict=True):
            x, z, entropy = part(x)
            if float(entropy) < limit:
                break
        return z

    for part, x in zip(parts, _along(net, images[:1]), strict=True):
        jax.block_until_ready(part(x))
    for i, image in enumerate([images[0], *images]):
        for side, run in enumerate((whole, early)):
            start = time.perf_counter()
            jax.block_until_ready(run(image[None]))
            spent[side, max(i - 1, 0)] = 1e3 * (time.perf_counter() - start)
    return float(spent[0].mean()), float(spent[1].mean())


def _sure(y: jax.Array, head: Any) -> tuple[jax.Array, jax.Array, jax.Array]:
    z = head(y)
    return y, z, jc.nn.exit_entropy(z)[0]


def _along(net: Network, x: Any) -> list[Any]:
    """What each stage reads."""
    found = [x]
    for stage in net.stages[:-1]:
        found.append(jax.jit(stage)(found[-1]))
    return found


def run(args: Any, net: Network, data: datasets.Data, batch: int = 100) -> dict[str, Any]:
    """Train the heads, calibrate, and read the test images once."""
    x, y = data.train.x[: args.train], data.train.y[: args.train]
    at_cuts = [functools.partial(run, params) for run, params in net.trunk[:-1]]
    for seed, found in enumerate(features(at_cuts, x, batch) if at_cuts else []):
        net.heads.append(train_head(found, y, args.width, args.epochs, seed))
    costs = net.costs()
    dense = jc.trace.cost(lambda p, x: resnet.logits(p, x, net.statistics), net.params, jnp.zeros((1, 32, 32, 3)))
    whole = dense.total.multiply_adds
    held, rest = data.test.take(slice(args.held)), data.test.take(slice(args.held, None))
    val, test = (all_logits(net, part.x, batch) for part in (held, rest))
    errors = 100 * (test.argmax(-1) != rest.y).mean(-1)
    rows = []
    for speedup in map(float, args.speedups.split(",")):
        chosen = jc.nn.calibrate_exits(val, held.y, costs, cost=whole / speedup, unused=True)
        found = jc.nn.exits_at(test, rest.y, costs, chosen.thresholds)
        slow, fast = latency(net, rest.x[: args.timed], chosen.thresholds)
        rows.append(
            {
                "budget": speedup,
                "fewer": whole / found.cost,
                "error": 100 * (1 - found.accuracy),
                "drop": 100 * (1 - found.accuracy) - float(errors[-1]),
                "shares": [round(share, 4) for share in found.shares],
                "held_fewer": whole / chosen.cost,
                "thresholds": list(chosen.thresholds),
                "milliseconds": fast,
                "milliseconds_dense": slow,
            }
        )
    return {"costs": costs, "dense": whole, "errors": errors.tolist(), "images": len(rest), "rows": rows}


def table(found: dict[str, Any]) -> str:
    """The rows as text."""
    errors = ", ".join(f"{e:.2f}" for e in found["errors"])
    costs = ", ".join(f"{c / found['dense']:.3f}" for c in found["costs"])
    lines = [f"test error of each exit: {errors}; cost of each: {costs} of {found['dense'] / 1e6:.1f}M multiply-adds"]
    lines.append(f"{'budget':>6} {'fewer':>6} {'error':>6} {'drop':>6} {'latency':>8}  shares")
    for row in found["rows"]:
        ratio = row["milliseconds_dense"] / row["milliseconds"]
        line = f"{row['budget']:6.2f} {row['fewer']:6.2f} {row['error']:6.2f} {row['drop']:6.2f} {ratio:7.2f}x"
        lines.append(f"{line}  {' '.join(f'{share:.2f}' for share in row['shares'])}")
    return "\n".join(lines)


def smoke() -> tuple[Network, datasets.Data]:
    """A random network of a block a stage, and random images."""
    rng = np.random.default_rng(0)
    params, statistics = {}, {}

    def layer(name: str, norm: str, inputs: int, outputs: int) -> None:
        params[f"{name}/weight"] = jnp.asarray(rng.normal(size=(outputs, inputs, 3, 3)) * 0.1, jnp.float32)
        params[f"{norm}/weight"], params[f"{norm}/bias"] = jnp.ones(outputs), jnp.zeros(outputs)
        statistics[f"{norm}/running_mean"], statistics[f"{norm}/running_var"] = jnp.zeros(outputs), jnp.ones(outputs)

    layer("conv1", "bn1", 3, 4)
    for stage, (inputs, outputs) in enumerate(((4, 4), (4, 8), (8, 16)), 1):
        layer(f"layer{stage}/0/conv1", f"layer{stage}/0/bn1", inputs, outputs)
        layer(f"layer{stage}/0/conv2", f"layer{stage}/0/bn2", outputs, outputs)
    params["linear/weight"], params["linear/bias"] = jnp.asarray(rng.normal(size=(10, 16)), jnp.float32), jnp.zeros(10)
    images = rng.random((60, 32, 32, 3)).astype(np.float32)
    whole = datasets.Split(images, rng.integers(0, 10, 60).astype(np.int32))
    parts = [whole.take(slice(i, i + 20)) for i in (0, 20, 40)]
    return Network(params, statistics, (1, 2)), datasets.Data("random", "image", 10, *parts)


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command."""
    parser = flags.parser(__doc__, "results/early_exit")
    parser.add_argument("--cuts", default="11,15,19", help="blocks of 27 after which exits stand")
    parser.add_argument("--first", default="", choices=("", "resnet20"), help="a network that reads the image first")
    parser.add_argument("--held", type=flags.positive, default=2000, help="test images by which thresholds are set")
    parser.add_argument("--train", type=flags.positive, default=15000, help="training images for the heads")
    parser.add_argument("--epochs", type=flags.positive, default=5)
    parser.add_argument("--width", type=flags.positive, default=80, help="channels of the heads")
    parser.add_argument("--speedups", default="1.5,1.8,2.0,2.2", help="budgets: so many times fewer multiply-adds")
    parser.add_argument("--timed", type=flags.positive, default=200, help="test images that are timed one by one")
    parser.add_argument("--smoke", action="store_true", help="random images and a small random network")
    args = parser.parse_args(argv)
    command = flags.told("experiments.early_exit", parser, args)
    try:
        if args.smoke:
            net, data = smoke()
            args.train, args.epochs, args.width, args.timed, args.speedups, args.held = 20, 1, 4, 3, "1.01", 10
            if args.first:  # the trunk itself, which saves nothing
                net.first, args.speedups = (net.params, net.statistics), "0.5"
        else:
            data = datasets.load("cifar10", args.data_dir, val=0.1)
            trunk = resnet.load(Path(args.data_dir) / "resnet56_cifar10.npz")
            first = resnet.load(Path(args.data_dir) / f"{args.first}_cifar10.npz") if args.first else None
            net = Network(*trunk, tuple(int(cut) for cut in args.cuts.split(",") if cut), first)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)
    found = run(args, net, data, 10 if args.smoke else 100)
    print(table(found))
    folder = Path(args.workdir or ("runs/early_exit_smoke" if args.smoke else "results/early_exit"))
    folder.mkdir(parents=True, exist_ok=True)
    config = {name: value for name, value in vars(args).items() if name not in flags.FOLDERS}
    record = {"command": command, "config": config, **found}
    (folder / f"{'cascade' if args.first else 'early_exit'}.json").write_text(json.dumps(record, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
