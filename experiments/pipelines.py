"""From a dense network to the smallest file, stage by stage, each stage on disk.

    python -m experiments.pipelines --data=mnist --model=lenet_300_100 --data_dir=D
    python -m experiments.pipelines --data=mnist --model=lenet5 --data_dir=D

A stage is a function from a tree to a tree of nodes, ``stage(bench, tree, seed)``; a pipeline is a list of them
(:data:`PIPELINES`). What each stage gave is saved, plain and coded, and its row has both sizes and the error on the
last 5,000 training images, by which everything is chosen. Only the last stage's row has the error on the test images.
Stopped, the same command goes on after the last stage on disk; a stage whose file is there is not made again.

Expect, with ``lenet_300_100`` on MNIST-60k: ``results/pipelines/``, with published numbers beside each row.
What the order of distillation, pruning, quantization and an early exit does: ``experiments/orders.py``.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jcompress as jc
from experiments import data as datasets
from experiments import flags, runner, tables
from experiments.lab import Lab, batches, cross_entropy, make_evaluate, steps_in
from experiments.workdir import Row, Rows, write

PyTree = Any
T = jc.quantize.training
HELD_OUT = {"mnist": 5000 / 60000}
_APART = 100  # of the seeds of pipelines; stages take those between


class Bench(Lab):
    """A model, its data, and a loop that trains whatever a stage gives it.

    Args:
      model: its name.
      load: ``load(seed) -> Data``, with a split to choose by.
      batch_size: examples a step.
      scale: of all epochs.
      shift: pixels by which training images are moved at most, each by its own, zeros where nothing was.
      dense: ``dense(seed)``, the network that a pipeline started from, for the stages that it teaches.
    """

    def __init__(
        self,
        model: str,
        load: Callable[[int], datasets.Data],
        batch_size: int = 128,
        scale: float = 1.0,
        shift: int = 0,
        dense: Callable[[int], PyTree] | None = None,
    ) -> None:
        super().__init__(model, load)
        self.batch_size, self.scale, self.shift, self.dense = batch_size, scale, shift, dense
        self.whole = self

    @functools.cached_property
    def groups(self) -> dict[str, Any]:
        """The units that may be cut."""
        found = jc.trace.coupling(self.apply, self.shapes, self.load(0).test.x[:1])
        return {name: group for name, group in found.items() if group.prunable}

    def constants(self, params: PyTree, name: str) -> jax.Array:
        """What the units of a group put out whose kernels are zero: after a dense layer the positive part of biases."""
        layer = name.partition("/")[0]
        bias = params[layer]["bias"]
        return jax.nn.relu(bias) if layer.startswith("dense") else bias

    def sized(self, params: PyTree) -> Bench:
        """The bench of the network that these parameters are of, which may have fewer units."""
        shapes = jax.eval_shape(lambda: params)
        if _shapes(shapes) == _shapes(self.shapes):
            return self
        kept = {name: jnp.arange(g.size) < _length(params, g.producers[0]) for name, g in self.groups.items()}
        small = copy.copy(self)
        small.__dict__.pop("groups")
        small.apply = jc.shrink(self.apply, self.shapes, kept, self.load(0).test.x[:1])[0]
        small.shapes, small.evaluate, small._once = shapes, make_evaluate(small.apply), {}
        return small

    def steps(self, epochs: float) -> int:
        """Steps in so many epochs of the training split."""
        return steps_in(self.scale * epochs, len(self.load(0).train), self.batch_size)

    def fit(
        self, name: Any, start: PyTree, held: PyTree, loss: Any, tx: Any, epochs: float, seed: int, teacher: PyTree
    ) -> Any:
        """Train ``start``; returns it and the state of the optimizer.

        Args:
          name: of what is compiled; one for all calls of one loss and optimizer.
          start: leaves to train.
          held: passed through to the loss.
          loss: ``loss(train, held, x, y, targets, key)``, a scalar.
          tx: an optax transform.
          epochs: how long.
          seed: of the order of examples, of shifts and of noise.
          teacher: parameters whose outputs are the targets, of this network or of the whole one, or None.
        """
        own = teacher is None or _shapes(teacher) == _shapes(self.shapes)
        taught_by = self.apply if own else self.whole.apply

        def one(train: PyTree, state: Any, held: PyTree, teacher: PyTree, x: Any, y: Any, key: Any) -> tuple:
            x = shifted(x, self.shift, key)
            targets = None if teacher is None else taught_by(teacher, x)
            grads = jax.grad(loss)(train, held, x, y, targets, key)
            updates, state = tx.update(grads, state, train)
            return optax.apply_updates(train, updates), state

        step, split = self.once(("step", name), lambda: jax.jit(one, donate_argnums=(0, 1))), self.load(0).train
        train, key = jax.tree.map(jnp.copy, start), jax.random.key(seed)
        state = self.once(("init", name), lambda: jax.jit(tx.init))(train)
        order = batches(key, len(split), self.batch_size)
        for i, index in zip(range(self.steps(epochs)), order, strict=False):
            own = jax.random.fold_in(key, i)
            train, state = step(train, state, held, teacher, split.x[index], split.y[index], own)
        return train, state

    def hard(self, params: PyTree, x: Any, y: Any, targets: Any) -> jax.Array:
        """Cross entropy, and of what a teacher said where there is one."""
        logits = self.apply(params, x)
        own = cross_entropy(logits, y).mean()
        return own if targets is None else own / 2 + jc.distill.soft_targets(logits, targets, temperature=2.0)


def shifted(x: jax.Array, most: int, key: jax.Array) -> jax.Array:
    """Images, each moved by up to so many pixels in both directions."""
    if not most:
        return x
    wide = jnp.pad(x, ((0, 0), (most, most), (most, most), (0, 0)))
    starts = jax.random.randint(key, (len(x), 2), 0, 2 * most + 1)
    return jax.vmap(lambda image, at: jax.lax.dynamic_slice(image, (at[0], at[1], 0), x.shape[1:]))(wide, starts)


def _shapes(tree: PyTree) -> PyTree:
    return jax.tree.map(jnp.shape, tree)


def _length(params: PyTree, member: tuple[str, int]) -> int:
    path, axis = member
    return dict(jc.paths(params))[path].shape[axis]


Stage = Callable[[Bench, PyTree, int], PyTree]


def dense(bench: Bench, tree: PyTree, seed: int, *, epochs: float) -> PyTree:
    """A network trained from scratch, with decoupled weight decay."""
    tx = optax.adamw(_falling(bench, 1e-3, epochs), weight_decay=1e-2)

    def loss(train: PyTree, held: Any, x: Any, y: Any, targets: Any, key: Any) -> jax.Array:
        return bench.hard(train, x, y, targets)

    return bench.fit(("dense", epochs), bench.start(seed), None, loss, tx, epochs, seed, None)[0]


def prune(bench: Bench, tree: PyTree, seed: int, *, sparsity: dict[str, float], epochs: float) -> PyTree:
    """Magnitudes along a cubic ramp over the first half, the dense network its own teacher."""
    params, half = jc.materialize(tree), bench.steps(epochs) // 2
    rules = [
        (f"{layer}/kernel", jc.prune.Magnitude(optax.polynomial_schedule(0.0, s, 3, half)))
        for layer, s in sparsity.items()
    ]
    plan = jc.plan(params, rules)
    tx = optax.chain(optax.adam(_falling(bench, 1e-3, epochs)), jc.project(plan, every=20))

    def loss(train: PyTree, held: Any, x: Any, y: Any, targets: Any, key: Any) -> jax.Array:
        return bench.hard(train, x, y, targets)

    name = ("prune", epochs, *sparsity.items())
    params, state = bench.fit(name, params, None, loss, tx, epochs, seed + 1, params)
    return jc.nodes(params, state)


def share(bench: Bench, tree: PyTree, seed: int, *, clusters: dict[str, int], epochs: float) -> PyTree:
    """A codebook for what each mask keeps, its values trained (Han, Mao & Dally 2016, arXiv:1510.00149)."""
    params, layers = jc.materialize(tree), clusters.items()
    rules = [(f"{x}/kernel", jc.chain(jc.prune.Nonzero(), jc.share.KMeans(n, exact=True))) for x, n in layers]
    train, held = jc.split(jc.compress(params, jc.plan(params, rules)))
    tx = optax.adam(_falling(bench, 3e-4, epochs))

    def loss(train: PyTree, held: Any, x: Any, y: Any, targets: Any, key: Any) -> jax.Array:
        return bench.hard(jc.materialize(jc.merge(train, held)), x, y, targets)

    name = ("share", epochs, *clusters.items())
    tuned, _ = bench.fit(name, train, held, loss, tx, epochs, seed + 2, params)
    return _halved(jc.merge(tuned, held))


def learn(
    bench: Bench,
    tree: PyTree,
    seed: int,
    *,
    price: float,
    epochs: float,
    what: str = ".*/kernel",
    by: Literal["itself", "dense"] = "itself",
) -> PyTree:
    """Integers, steps and densities trained for loss and bits (Oktay et al. 2020, arXiv:1906.06624).

    The teacher is what the stage starts from, or the dense network: ``by="itself"`` or ``"dense"``.
    """
    params = _wide(tree)
    teacher = params if by == "itself" else bench.dense(seed)
    bench = bench.sized(params)
    plan = jc.plan(params, [(what, T.EntropyPenalized(levels=15)), (".*", None)])
    train, held = jc.split(jc.compress(params, plan))
    rates = {"values": 0.03, "log_step": 1e-3, "density": 1e-2, "dense": 5e-4}
    named = {name: optax.adam(_falling(bench, rate, epochs)) for name, rate in rates.items()}
    tx = optax.multi_transform(named, functools.partial(_named, rates=rates))

    def loss(train: PyTree, held: Any, x: Any, y: Any, targets: Any, key: Any) -> jax.Array:
        tree = jc.merge(train, held)
        return bench.hard(jc.materialize(tree), x, y, targets) + price * T.rate(tree, key)

    name = ("learn", price, epochs, what, by)
    trained, _ = bench.fit(name, train, held, loss, tx, epochs, seed + 3, teacher)
    return _halved(jc.finalize(jc.merge(trained, held)))


def self_distil(bench: Bench, tree: PyTree, seed: int, *, bits: int, epochs: float) -> PyTree:
    """Straight-through training in few bits by the dense network's own outputs (O'Neill & Dutta 2023, 2307.05972)."""
    params = jc.materialize(tree)
    plan = jc.plan(params, [(".*/kernel", jc.quantize.Int(bits=bits, clip="mse")), (".*", None)])
    tx = optax.adam(_falling(bench, 3e-4, epochs))

    def loss(train: PyTree, held: Any, x: Any, y: Any, targets: Any, key: Any) -> jax.Array:
        logits = bench.apply(jc.simulate(train, plan), x)
        return jc.distill.soft_targets(logits, targets, temperature=2.0) + cross_entropy(logits, y).mean() / 2

    trained, _ = bench.fit(("sdq", bits, epochs), params, None, loss, tx, epochs, seed + 4, params)
    return _halved(jc.compress(trained, plan))


def code(bench: Bench, tree: PyTree, seed: int, *, price: float) -> PyTree:
    """After training only: what is not zero on a trellis, by error and bits."""
    params = jc.materialize(tree)
    grid = jc.quantize.Int(bits=5, axis=None)
    return _halved(
        jc.compress(params, jc.plan(params, [(".*/kernel", jc.quantize.Dependent(price, grid)), (".*", None)]))
    )


def cut(bench: Bench, tree: PyTree, seed: int) -> PyTree:
    """Units cut out whose kernels are zero or that nothing reads; what the former put out goes into the next biases.

    Where those leave their grid and take more bytes than the units did, all stays as it is.
    """
    params = _wide(tree)
    bench = bench.sized(params)
    groups = bench.groups
    score = functools.partial(jc.prune.structured.l1, groups=groups)
    before, units = -1, sum(group.size for group in groups.values())
    while before != units:
        made = {name: x > 0 for name, x in score(params, members="kernels").items()}
        read = {name: x > 0 for name, x in score(params, members="consumers").items()}
        constants = {name: bench.constants(params, name) for name in groups}
        params = jc.rewrite.fold_constants(params, groups, made, constants)
        keep = {name: made[name] & read[name] for name in groups}
        params = jc.trace.mask(params, groups, keep)
        before, units = units, sum(int(x.sum()) for x in keep.values())
    small = jc.shrink(bench.apply, params, keep, bench.load(0).test.x[:1])[1]
    found = jax.tree.map(_on_grid, tree, small, is_leaf=lambda x: isinstance(x, jc.Compressed))
    return min((found, tree), key=lambda x: jc.nbits(x, coded=True))


def _on_grid(node: Any, small: jax.Array) -> Any:
    """A smaller array in the codes of a node, where it lies on their grid; else in 16 bits."""
    if not isinstance(node, jc.Compressed):
        return small.astype(node.dtype)
    found = dataclasses.replace(node, codes=jnp.round(small / node.scale.astype(jnp.float32)).astype(node.codes.dtype))
    return found if np.allclose(found.materialize(), small, atol=1e-6) else small.astype(jnp.bfloat16)


def _named(train: PyTree, rates: dict[str, float]) -> PyTree:
    def name(path: Any, _: Any) -> str:
        last = str(getattr(path[-1], "name", ""))
        return last if last in rates else "dense"

    return jax.tree_util.tree_map_with_path(name, train)


def _falling(bench: Bench, peak: float, epochs: float) -> optax.Schedule:
    return optax.cosine_decay_schedule(peak, bench.steps(epochs), alpha=0.01)


def _wide(tree: PyTree) -> PyTree:
    """What nodes stand for, in float32."""
    return jax.tree.map(lambda x: x.astype(jnp.float32), jc.materialize(tree))


def _halved(tree: PyTree) -> PyTree:
    """All floats that are stored in 16 bits: scales, codebooks, biases."""
    return jax.tree.map(lambda x: x.astype(jnp.bfloat16) if x.dtype == jnp.float32 else x, tree)


@dataclasses.dataclass(frozen=True)
class Pipeline:
    """Named stages, and the published figures that its row stands beside."""

    stages: dict[str, Stage]
    published: str = ""


def _start(epochs: float, pruned: float, sparsity: dict[str, float]) -> dict[str, Stage]:
    return {
        "dense": functools.partial(dense, epochs=epochs),
        "prune": functools.partial(prune, sparsity=sparsity, epochs=pruned),
    }


_MLP = {"dense_0": 0.94, "dense_1": 0.92, "head": 0.7}
_CAFFE = {"conv_0": 0.3, "conv_1": 0.88, "dense_0": 0.97, "head": 0.8}
_PAPERS = {
    "lenet_300_100": ("Deep Compression 40x at 1.58", "entropy-penalized 124x at 1.8"),
    "lenet5": ("Deep Compression 39x at 0.74", "entropy-penalized 606x at 0.9"),
}


def pipelines(model: str) -> dict[str, Pipeline]:
    """The pipelines of one model; those that begin alike share the files of their beginnings."""
    sparsity = _MLP if model == "lenet_300_100" else _CAFFE
    start, (deep, penalized) = _start(8, 8, sparsity), _PAPERS[model]
    shared = functools.partial(share, clusters=dict.fromkeys(sparsity, 16), epochs=2)
    cheap = {**start, "learn few bits": functools.partial(learn, price=2e-5, epochs=8)}
    relearn = functools.partial(learn, what=".*", by="dense")  # biases too, and what is left of the units alone
    again: dict[str, Stage] = {
        **cheap,
        "cut": cut,
        "relearn": functools.partial(relearn, price=4.5e-5, epochs=12),
        "cut again": cut,
        "relearn longer": functools.partial(relearn, price=4.5e-5, epochs=24),
        "cut once more": cut,
    }
    return {
        "deep compression": Pipeline({**start, "share": shared}, deep),
        "learned, mild": Pipeline({**start, "learn mildly": functools.partial(learn, price=3e-6, epochs=8)}, deep),
        "learned": Pipeline({**start, "learn": functools.partial(learn, price=1e-5, epochs=8)}, penalized),
        "learned, smallest": Pipeline(cheap, penalized),
        "learned, cut": Pipeline({**cheap, "cut": cut}, penalized),
        "learned, biases too": Pipeline(
            {**start, "learn all": functools.partial(learn, price=5e-5, epochs=12, what=".*")}, penalized
        ),
        "learned twice": Pipeline(
            {
                **cheap,
                "learn fewer": functools.partial(learn, price=4.5e-5, epochs=12, what=".*"),
                "cut again": cut,
            },
            penalized,
        ),
        "learned again": Pipeline(again, penalized),
        "learned again, dearer": Pipeline(
            {**again, "relearn dearer": functools.partial(relearn, price=1e-4, epochs=24), "cut at last": cut},
            penalized,
        ),
        "trellis": Pipeline({**start, "code": functools.partial(code, price=0.1)}),
        "self-distilled": Pipeline(
            {"dense": start["dense"], "4 bits": functools.partial(self_distil, bits=4, epochs=4)}
        ),
    }


class Staged:
    """All pipelines of one model, a row for each stage and seed, as the runner takes them."""

    keys = ("seed", "stages")

    def __init__(self, args: Any) -> None:
        load = functools.partial(load_split, args.data, args.data_dir)
        self.bench = Bench(args.model, load, scale=args.epochs, shift=args.shift, dense=self._dense)
        self.model, self.pipelines = args.model, pipelines(args.model)
        self.orders = {[*p.stages][-1]: list(p.stages) for p in self.pipelines.values()}
        if unknown := set(args.only.split(",") if args.only else ()) - set(self.orders):
            raise ValueError(f"--only: {sorted(unknown)} unknown; use some of {','.join(self.orders)}")
        self.only = args.only.split(",") if args.only else list(self.orders)
        self.workdir = Path(args.workdir or f"runs/pipelines/{args.data}_{args.model}")
        self.seeds = args.seeds
        self.setting = {
            "data": str(self.bench.load(0)),
            "epochs": args.epochs,
            "shift": args.shift,
            "ways": {
                name: {stage: _told(make) for stage, make in p.stages.items()} for name, p in self.pipelines.items()
            },
        }

    def todo(self) -> Iterator[Row]:
        for seed in range(self.seeds):
            done = set()
            for names in (self.orders[last] for last in self.only):
                for i in range(1, len(names) + 1):
                    stages = " > ".join(names[:i])
                    if stages not in done:
                        done.add(stages)
                        yield {"seed": seed, "stages": stages}

    def measure(self, rows: Rows, seed: int, stages: str) -> Row:
        """Run the last of these stages on what the one before left on disk, and save what it gives."""
        *before, last = stages.split(" > ")
        stage = next(
            p.stages[last] for p in self.pipelines.values() if [*p.stages][: len(before) + 1] == [*before, last]
        )
        tree = jc.load(self._file(seed, before)) if before else None
        tree = stage(self.bench, tree, _APART * seed)
        path = self._file(seed, [*before, last])
        path.parent.mkdir(parents=True, exist_ok=True)
        plain, coded = jc.save(path.with_suffix(".plain"), tree), jc.save(path, tree, coded=True)
        path.with_suffix(".plain").unlink()
        final = any([*p.stages] == [*before, last] for p in self.pipelines.values())
        return {"plain": plain, "bytes": coded, **self._judged(jc.load(path), final)}

    def _dense(self, seed: int) -> PyTree:
        return _wide(jc.load(self._file(seed // _APART, ["dense"])))

    def _judged(self, tree: PyTree, final: bool) -> Row:
        data, params = self.bench.load(0), _wide(tree)
        evaluate = self.bench.sized(params).evaluate
        row = {"validation": 100 * (1 - evaluate(params, data.val).accuracy)}
        return row | ({"test": 100 * (1 - evaluate(params, data.test).accuracy)} if final else {})

    def _file(self, seed: int, stages: Sequence[str]) -> Path:
        name = "-".join(stages).replace(" ", "_").replace(",", "")
        return self.workdir / "models" / f"{seed}-{name}.jc"

    def line(self, row: Row) -> str:
        ratio = 4 * self.bench.size / row["bytes"]
        return f"seed {row['seed']}, {row['stages']}: {row['bytes']:,} bytes, {ratio:.1f}x, {row['validation']:.2f}%"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        return publish(rows, self.model, self.workdir / "table.md"), None


SIZES = {"lenet_300_100": 266_610, "lenet5": 431_080}
"""Parameters at 28 x 28 pixels."""


def publish(rows: Sequence[Row], model: str, path: Path) -> str:
    """Write the table of a model; return it as text."""
    told = {" > ".join(p.stages): p.published for p in pipelines(model).values()}
    cells = table(rows, SIZES[model], told)
    write(path, tables.markdown(cells) + "\n")
    return tables.aligned(cells)


def table(rows: Sequence[Row], size: int, published: dict[str, str]) -> list[list[str]]:
    """Means over seeds, the head first; ``size`` in numbers of the dense network."""
    found = [
        [
            "stages",
            "seeds",
            "bytes, plain",
            "bytes, coded",
            "smaller",
            "validation error, %",
            "test error, %",
            "published",
        ]
    ]
    for stages in dict.fromkeys(row["stages"] for row in rows):
        own = [row for row in rows if row["stages"] == stages]
        plain, coded = (sum(row[name] for row in own) / len(own) for name in ("plain", "bytes"))
        errors = [_spread([row[name] for row in own if name in row]) for name in ("validation", "test")]
        told = published.get(stages, "")
        found.append(
            [stages, str(len(own)), f"{plain:,.0f}", f"{coded:,.0f}", f"{4 * size / coded:.1f}x", *errors, told]
        )
    return found


def _spread(values: list[float]) -> str:
    return tables.spread(*tables.mean_std(values)) if values else ""


def _told(stage: Any) -> Any:
    """What tells a stage from another of the same name."""
    return {"does": stage.func.__name__, **stage.keywords} if isinstance(stage, functools.partial) else stage.__name__


def load_split(name: str, folder: str | None, seed: int) -> datasets.Data:
    """The data, the last training images held out; one split for all seeds."""
    return datasets.load(name, folder, 0, val=HELD_OUT.get(name))


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/pipelines/<data>_<model>")
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--model", choices=["lenet_300_100", "lenet5"], default="lenet_300_100")
    parser.add_argument("--seeds", type=flags.positive, default=3)
    parser.add_argument("--only", default="", help="last stages of some of the pipelines, joined by commas")
    parser.add_argument("--shift", type=int, default=0, help="pixels by which training images are moved at most")
    parser.add_argument("--epochs", type=float, default=1.0, help="scale of all epochs, to try things out")
    args = parser.parse_args(argv)
    return runner.main(lambda signals: Staged(args), args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
