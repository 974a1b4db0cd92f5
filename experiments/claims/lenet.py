"""Magnitude ramp, then k-means on the kept weights, then fine-tuned centroids: bytes on disk against accuracy.

    python -m experiments.claims.lenet --data digits --model lenet_300_100
    python -m experiments.claims.lenet --data mnist --model lenet_300_100 --data_dir DIR
    python -m experiments.claims.lenet --data mnist --model lenet5 --data_dir DIR

Every split has its own dense net. From it start, with the same number of further epochs: the control (dense), the
compressed net, and the same pipeline with a random mask. The drop is paired: control minus compressed, on one test
split and seed. A claim holds if the mean drop plus 1.65 standard errors is within the bound and the whole saved file,
manifest included, is small enough on average. ``--validate`` measures on a part of the training split of other seeds
instead of the test split; that is how the recipes below were chosen.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jcompress as jc
from experiments import data as datasets
from experiments import flags, runner
from experiments.compress import State, fit, make_step
from experiments.lab import Lab
from experiments.runner import Way
from experiments.workdir import Row, Rows

PyTree = Any
NEVER = 1 << 30


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Hyperparameters of one claim. Epochs are of the training split; ``sparsity`` is per kernel, or one for all."""

    sparsity: dict[str, float]
    clusters: dict[str, int]
    dense_epochs: float
    ramp_epochs: float
    settle_epochs: float
    tune_epochs: float
    batch_size: int = 128
    learning_rate: float = 1e-3
    tune_rate: float = 3e-4
    weight_decay: float = 1e-4
    every: int = 10

    @property
    def extra_epochs(self) -> float:
        """What the control trains for after the dense net."""
        return self.ramp_epochs + self.settle_epochs + self.tune_epochs


@dataclasses.dataclass(frozen=True)
class Claim:
    """At least ``ratio`` times smaller within ``bound`` points over ``splits`` splits."""

    ratio: float
    bound: float
    splits: int
    recipe: Recipe


CLAIMS = {
    ("digits", "lenet_300_100"): Claim(
        25, 0.5, 24,
        Recipe(
            sparsity={"dense_0": 0.87, "dense_1": 0.93, "head": 0.5},
            clusters={"dense_0": 16, "dense_1": 16, "head": 16},
            dense_epochs=60, ramp_epochs=60, settle_epochs=80, tune_epochs=20, batch_size=32, every=40,
        ),
    ),
    ("mnist", "lenet_300_100"): Claim(
        50, 0.3, 5,
        Recipe(
            sparsity={"dense_0": 0.945, "dense_1": 0.92, "head": 0.7},
            clusters={"dense_0": 8, "dense_1": 16, "head": 16},
            dense_epochs=15, ramp_epochs=12, settle_epochs=18, tune_epochs=5, batch_size=64, every=20,
        ),
    ),
    ("mnist", "lenet5"): Claim(
        50, 0.3, 5,
        Recipe(
            sparsity={"conv_0": 0.25, "conv_1": 0.75, "dense_0": 0.955, "head": 0.75},
            clusters={"conv_0": 16, "conv_1": 16, "dense_0": 16, "head": 16},
            dense_epochs=5, ramp_epochs=6, settle_epochs=16, tune_epochs=3, batch_size=64, every=20,
        ),
    ),
}  # fmt: skip


class Pipeline(Lab):
    """All that is compiled once and serves every split."""

    def __init__(self, model: str, load: Callable[[int], datasets.Data], recipe: Recipe) -> None:
        super().__init__(model, load)
        self.recipe = recipe
        self.per_epoch = max(len(self.load(0).train) // recipe.batch_size, 1)
        self.final = self._final_plan(self.shapes)
        self.dense = functools.lru_cache(maxsize=1)(self._dense)
        pruned = self._rates(recipe.settle_epochs + recipe.ramp_epochs, recipe.learning_rate)
        tuned = self._rates(recipe.tune_epochs, recipe.tune_rate)
        first = self._steps(recipe.settle_epochs + recipe.ramp_epochs)
        self.tx = {
            "dense": self._adamw(self._rates(recipe.dense_epochs, recipe.learning_rate)),
            "control": self._adamw(optax.join_schedules([pruned, tuned], [first])),
            "tune": optax.adam(tuned),
        }
        for kind, every in (("magnitude", recipe.every), ("random", NEVER)):
            project = jc.project(self._ramp_plan(self.shapes, kind), every=every, key=jax.random.key(0))
            self.tx[kind] = optax.chain(self._adamw(pruned), project)
        merged = {"tune": lambda tree, held, _: jc.materialize(jc.merge(tree, held))}
        self.step = {
            name: make_step(self.apply, lambda pace, tx=tx: tx, merged.get(name)) for name, tx in self.tx.items()
        }

    def _steps(self, epochs: float) -> int:
        return round(epochs * self.per_epoch)

    def _rates(self, epochs: float, peak: float) -> optax.Schedule:
        return optax.cosine_decay_schedule(peak, self._steps(epochs), alpha=0.01)

    def _adamw(self, rates: optax.Schedule) -> optax.GradientTransformation:
        return optax.adamw(rates, weight_decay=self.recipe.weight_decay)

    def _ramp_plan(self, shapes: PyTree, kind: str) -> jc.Plan:
        """Masks that close along a cubic ramp; a random mask, which no training informs, is drawn once."""
        steps, rules = self._steps(self.recipe.ramp_epochs), []
        for layer, sparsity in self.recipe.sparsity.items():
            ramp = optax.polynomial_schedule(0.0, sparsity, power=3, transition_steps=steps)
            method = jc.prune.Magnitude(ramp) if kind == "magnitude" else jc.prune.Random(sparsity)
            rules.append((f"{layer}/kernel", method))
        return jc.plan(shapes, rules)

    def _final_plan(self, shapes: PyTree) -> jc.Plan:
        """What is stored: masks, codebooks, 16 bits. Pruned weights are 0.0, so magnitude finds either kind of mask."""
        rules = []
        for layer, sparsity in self.recipe.sparsity.items():
            means = jc.share.KMeans(self.recipe.clusters[layer], exact=True)
            method = jc.chain(jc.prune.Magnitude(sparsity), means, jc.quantize.Float("bfloat16"))
            rules.append((f"{layer}/kernel", method))
        return jc.plan(shapes, [*rules, (".*/bias", jc.quantize.Float("bfloat16"))])

    def fit(self, name: str, params: PyTree, held: PyTree, split: int, epochs: float, seed: int) -> PyTree:
        params = jax.tree.map(jnp.copy, params)  # training donates its arguments
        state = State(params, self.tx[name].init(params), jnp.zeros((), jnp.int32))
        return fit(
            self.step[name], state, held, self.load(split).train, steps=self._steps(epochs),
            batch_size=self.recipe.batch_size, key=jax.random.key(seed), title=name,
        ).params  # fmt: skip

    def _dense(self, split: int) -> PyTree:
        """The net from which all ways start."""
        seed = 100 * split
        return self.fit("dense", self.start(seed), None, split, self.recipe.dense_epochs, seed)

    def control(self, split: int) -> PyTree:
        """The dense net after the further epochs that every way gets."""
        return self.fit("control", self.dense(split), None, split, self.recipe.extra_epochs, 100 * split + 1)

    def compressed(self, split: int, kind: str) -> PyTree:
        """The net as it is stored, by a mask of magnitudes or a random one."""
        r, seed = self.recipe, 100 * split
        params = self.fit(kind, self.dense(split), None, split, r.ramp_epochs + r.settle_epochs, seed + 1)
        small = jc.compress(params, self.final)
        stored, held = jc.split(small)
        # The 16-bit values train in float32 and are rounded once, at the end.
        tuned = jax.tree.map(lambda x: x.astype(jnp.float32), stored)
        tuned = self.fit("tune", tuned, held, split, r.tune_epochs, seed + 2)
        return jc.merge(jax.tree.map(lambda x, like: x.astype(like.dtype), tuned, stored), held)

    def measured(self, tree: PyTree, split: int) -> tuple[float, int]:
        """Accuracy of the saved and loaded tree, and the bytes of its file."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "net.jc"
            jc.save(path, tree)
            size, loaded = path.stat().st_size, jc.load(path)
        return self.evaluate(jc.materialize(loaded), self.load(split).test).accuracy, size


WAYS = (
    Way("dense", lambda pipeline, split: pipeline.dense(split)),
    Way("control", lambda pipeline, split: pipeline.control(split)),
    Way("compressed", lambda pipeline, split: pipeline.compressed(split, "magnitude")),
    Way("random", lambda pipeline, split: pipeline.compressed(split, "random")),
)


def split(name: str, index: int, folder: str | None = None, validate: bool = False) -> datasets.Data:
    """Split ``index``. To validate: other shuffles, and a fifth of their training part in place of the test part."""
    seed = 1000 if validate else 0
    if name == "digits":
        data = datasets.load(name, seed=seed + index, val=0.0)
    else:
        data = datasets.fold(datasets.load(name, folder), index, seed=seed)
    if not validate:
        return data
    cut = len(data.train) * 4 // 5
    return dataclasses.replace(data, train=data.train.take(slice(cut)), test=data.train.take(slice(cut, None)))


def summary(claim: Claim, rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Means over the splits, and whether the claim holds."""
    drops = 100 * np.array([r["control"] - r["compressed"] for r in rows])
    error = float(drops.std(ddof=1) / len(drops) ** 0.5) if len(drops) > 1 else float("nan")
    ratio, upper = float(np.mean([r["ratio"] for r in rows])), float(drops.mean()) + 1.65 * error
    means = {f"mean_{k}": float(np.mean([r[k] for r in rows if k in r])) for k in ("dense", "control", "compressed")}
    random = [100 * (r["control"] - r["random"]) for r in rows if "random" in r]
    return {
        "splits": len(rows), **means, "drop_points": float(drops.mean()), "standard_error": error,
        "drop_upper_95": upper, "bound": claim.bound, "mean_bytes": float(np.mean([r["bytes"] for r in rows])),
        "ratio": ratio, "smallest_ratio": min(r["ratio"] for r in rows), "target_ratio": claim.ratio,
        "random_drop_points": float(np.mean(random)) if random else None, "random_splits": len(random),
        "holds": bool(len(rows) >= claim.splits and upper <= claim.bound and ratio >= claim.ratio),
    }  # fmt: skip


def table(rows: Sequence[dict[str, Any]], found: dict[str, Any]) -> str:
    lines = ["split  dense   control  compressed  drop    random   bytes  ratio"]
    for r in rows:
        drop, random = 100 * (r["control"] - r["compressed"]), f"{100 * r['random']:.2f}" if "random" in r else "-"
        lines.append(
            f"{r['split']:<5}  {100 * r['dense']:.2f}   {100 * r['control']:.2f}    {100 * r['compressed']:.2f}       "
            f"{drop:+.2f}   {random:<7}  {r['bytes']:<6} {r['ratio']:.1f}"
        )
    lines.append(
        f"drop {found['drop_points']:+.3f} points, standard error {found['standard_error']:.3f}, drop + 1.65 errors "
        f"{found['drop_upper_95']:+.3f} (bound {found['bound']}); {found['ratio']:.1f}x smaller on disk "
        f"(target {found['target_ratio']:g}x): the claim {'holds' if found['holds'] else 'DOES NOT HOLD'}"
    )
    return "\n".join(lines)


class Claimed:
    """One claim, a row for each split, as the runner takes it.

    Raises:
      ValueError: for anything wrong with the data.
    """

    keys = ("split",)

    def __init__(self, args: argparse.Namespace) -> None:
        self.claim, name = CLAIMS[args.data, args.model], f"{args.data}_{args.model}"
        self.name = name + ("_validation" if args.validate else "")
        self.workdir = Path(args.workdir or "runs/claims") / self.name
        self.splits, self.random = args.splits or self.claim.splits, args.random
        recipe = scaled(self.claim.recipe, args.epochs)
        load = functools.partial(split, args.data, folder=args.data_dir, validate=args.validate)
        self.pipeline = Pipeline(args.model, load, recipe)
        self.setting = {"claim": self.name, "recipe": dataclasses.asdict(recipe)}

    def todo(self) -> Iterator[Row]:
        yield from ({"split": index} for index in range(self.splits))

    def measure(self, rows: Rows, split: int) -> Row:
        """The dense net, the control, the compressed net and, if asked, the random mask, on one split."""
        row: Row = {"data": str(self.pipeline.load(split)), "seed": 100 * split}
        for way in WAYS:
            if way.name != "random" or self.random is None or split < self.random:
                row[way.name], size = self.pipeline.measured(way.make(self.pipeline, split), split)
                if way.name == "compressed":
                    row |= {"bytes": size, "ratio": 4 * self.pipeline.size / size}
        return row

    def line(self, row: Row) -> str:
        drop = 100 * (row["control"] - row["compressed"])
        return f"split {row['split']}: drop {drop:+.2f} points, {row['ratio']:.1f}x smaller"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        found = summary(self.claim, rows)
        return table(rows, found), found


def scaled(recipe: Recipe, factor: float) -> Recipe:
    names = ("dense_epochs", "ramp_epochs", "settle_epochs", "tune_epochs")
    return dataclasses.replace(recipe, **{name: factor * getattr(recipe, name) for name in names})


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "a folder of the claim's name in runs/claims")
    parser.add_argument("--data", choices=["digits", "mnist"], default="digits")
    parser.add_argument("--model", choices=["lenet_300_100", "lenet5"], default="lenet_300_100")
    parser.add_argument("--splits", type=flags.positive, help="how many; the protocol's number by default")
    parser.add_argument("--random", type=int, default=None, help="splits that also get the random mask; all by default")
    parser.add_argument("--validate", action="store_true", help="see above")
    parser.add_argument("--epochs", type=float, default=1.0, help="scale of all epochs, to try things out")
    args = parser.parse_args(argv)
    if (args.data, args.model) not in CLAIMS:
        parser.error(f"there is no claim for {args.model} on {args.data}; there are {list(CLAIMS)}")
    return runner.main(lambda signals: Claimed(args), args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
