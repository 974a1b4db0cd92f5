"""The smallest file within an allowed loss, found by ``jc.search`` unattended, beside plans of one family for all.

    python -m experiments.search --networks=resnet20 --data_dir=D --kills=2
    python -m experiments.search --networks=minilm --data_dir=D --model_dir=M --kills=2
    python -m experiments.search --networks=lenet --data=mnist --data_dir=D --kills=2

Families: bits by GPTQ, steps by water-filling, pruning, shared values and ranks, each with the bits of an entropy-coded
file; what is no kernel and no table takes 8 bits in all of them. *Uniform* rows use one family for every kernel. The
search *smallest* may lose as much as the uniform plan of ``--reference`` does, and *front* goes along the front of both
bytes and loss. Losses are those of data held out of training's and calibration's: the divergence from the dense
network (of LeNet the cross entropy). Test data is read once for each row, after everything is chosen.

``--kills=n``: the command runs itself in a child that gets SIGKILL at n random evaluations, each time anew, and then
goes on to the end. It writes ``--workdir``/results.jsonl, table.md, the files of the models, and kills.json.
"""

from __future__ import annotations

import functools
import json
import random
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments import flags, runner, tables
from experiments.codec import networks
from experiments.codec.networks import BITS, Network
from experiments.families import lab as families
from experiments.workdir import Row, Rows, clear, write

PyTree = Any
Q, F = jc.quantize, jc.factorize
DENSE, SEARCHES = "dense", ("smallest", "front")
STEPS = (0.25, 0.35, 0.5, 0.7, 1.0, 1.4)
WIDTHS = (2, 3, 4, 5, 6, 8)
OTHERS: dict[str, tuple[Any, Any]] = {
    "half-int4": (
        jc.chain(jc.prune.SparseGPT(sparsity=0.5), Q.Int(bits=4)),
        jc.chain(jc.prune.Magnitude(sparsity=0.5), Q.Int(bits=4)),
    ),
    "quarter-int8": (
        jc.chain(jc.prune.SparseGPT(sparsity=0.75), Q.Int(bits=8)),
        jc.chain(jc.prune.Magnitude(sparsity=0.75), Q.Int(bits=8)),
    ),
    "values16": (jc.share.KMeans(clusters=16), jc.share.KMeans(clusters=16)),
    "values64": (jc.share.KMeans(clusters=64), jc.share.KMeans(clusters=64)),
    "rank-half-int8": (jc.chain(F.WhitenedSVD(rank=0.5), Q.Int(bits=8)), jc.chain(F.SVD(rank=0.5), Q.Int(bits=8))),
    "rank-quarter-int8": (
        jc.chain(F.WhitenedSVD(rank=0.25), Q.Int(bits=8)),
        jc.chain(F.SVD(rank=0.25), Q.Int(bits=8)),
    ),
}
"""For a kernel, and for a table that is looked up and has no statistics."""
FAMILIES = (*(f"gptq{b}" for b in WIDTHS), *(f"steps{s:g}" for s in STEPS), *OTHERS)


class Small(Network):
    """LeNet-300-100, trained here once; judged by cross entropy on held-out images."""

    name, kernels = "LeNet-300-100", ".*/kernel"

    def __init__(self, data: str, data_dir: str | None, steps: int, folder: Path) -> None:
        self.lab = families.Lab(families.Config(name=data, data=data, steps=steps), data_dir)
        path = folder / "lenet.jc"
        if not path.exists():
            folder.mkdir(parents=True, exist_ok=True)
            jc.save(path, self.lab.dense(0))
        self.params = jax.tree.map(np.asarray, jc.load(path))
        self.data, layout = self.lab.load(0), self.lab.layout
        self.layout = {p: x for p, x in layout.items() if p in self.leaves()}
        batches = [self.data.train.x[i : i + 100] for i in range(0, min(1000, len(self.data.train) - 99), 100)]
        plan = jc.plan(self.params, [(self.kernels, Q.WaterFilling()), (".*", None)], layout=self.layout)
        self.stats = families.quietly(jc.calibrate, self.lab.apply, self.params, batches, plan)

    def divergence(self, params: PyTree) -> Any:
        found = jax.nn.log_softmax(self.lab.apply(params, jnp.asarray(self.data.val.x)))
        return -jnp.take_along_axis(found, jnp.asarray(self.data.val.y)[:, None], axis=-1).mean()

    def judged(self, params: PyTree) -> float:
        return 100 * (1 - self.lab.evaluate(params, self.data.test).accuracy)


class Subject:
    """A network by its leaves: those that are searched over, and the others in 8 bits."""

    def __init__(self, network: Network, folder: Path) -> None:
        self.network, self._dense = network, dict(jc.paths(network.params))
        if not folder.exists():
            jc.save_stats(folder.with_name("unfinished"), network.stats)
            folder.with_name("unfinished").rename(folder)
        self.stats = jc.load_stats(folder)  # the same to the bit after a kill, as a search asks for
        self.leaves = {path: jnp.asarray(self._dense[path]) for path in network.leaves()}
        others = {path: x for path, x in self._dense.items() if path not in self.leaves}
        self.rest = jc.compress(others, jc.plan(others, [(".*", BITS)]))
        layout = network.layout
        self.layout = {p: x for p, x in layout.items() if p in self.leaves} if isinstance(layout, Mapping) else layout
        self._judge = jax.jit(network.divergence)

    def method(self, path: str, family: str) -> Any:
        """What a family does to a leaf."""
        is_table = re.fullmatch(self.network.kernels, path) is None
        if family in OTHERS:
            return OTHERS[family][is_table]
        if family.startswith("gptq"):
            bits = int(family.removeprefix("gptq"))
            return Q.Int(bits=bits) if is_table else Q.GPTQ(bits=bits)
        return self.network._method(path, float(family.removeprefix("steps")), 0.1, 0)

    def plan(self, names: Mapping[str, str]) -> jc.Plan:
        """The plan that gives each leaf the family of its name; dense without one."""
        chosen = {path: self.method(path, names[path]) if path in names else None for path in self.leaves}
        return jc.plan(self.leaves, list(chosen.items()), layout=self.layout)

    def tree(self, names: Mapping[str, str]) -> PyTree:
        """The leaves by these families, and the others."""
        return self.rest | families.quietly(jc.compress, self.leaves, self.plan(names), stats=self.stats)

    def params(self, tree: Mapping[str, Any]) -> PyTree:
        """The network's own tree of dense arrays."""
        dense = jc.materialize(dict(self.rest) | dict(tree))
        return jax.tree.unflatten(jax.tree.structure(self.network.params), [dense[path] for path in self._dense])

    def measure(self, path: str, w: Any, value: Any) -> Any:
        """The relative error of outputs; of a table, which has no statistics, that of its entries."""
        if path in self.stats:
            return jc.budget.output_error(self.stats, relative=True)(path, w, value)
        return jnp.sum(jnp.square(value - w)) / jnp.sum(jnp.square(w))

    def lost(self, tree: Mapping[str, Any]) -> float:
        """On data held out."""
        return float(self._judge(self.params(tree)))

    def dense(self) -> Row:
        """The network as it was, and what is lost where the others take 8 bits."""
        lost = float(self._judge(jax.tree.map(jnp.asarray, self.network.params)))
        sizes = [x.size for x in self._dense.values()]
        score, others = self.network.judged(self.network.params), self.lost(self.leaves)
        return {"bytes": 4 * sum(sizes), "held out": lost, "others": others, "score": score}

    def stored(self, tree: PyTree, path: Path) -> Row:
        """The file of a tree, and how what is read from it does."""
        path.parent.mkdir(parents=True, exist_ok=True)
        size, again = jc.save(path, tree, coded=True), jc.load(path)
        bits = sum(jc.nbits(tree[path], coded=True) for path in self.leaves)
        return {
            "bytes": size, "cost": bits, "held out": self.lost(again), "score": self.network.judged(self.params(again)),
        }  # fmt: skip


class Searches:
    """A row for each uniform plan and each search, as the runner takes them."""

    keys = ("network", "way")

    def __init__(self, args: Any) -> None:
        self.args, self.workdir, self.networks = args, Path(args.workdir or "runs/search"), args.networks.split(",")
        self.families = args.families.split(",") if args.families else list(FAMILIES)
        for flag, names in (("families", self.families), ("reference", [args.reference])):
            known = FAMILIES if flag == "families" else self.families
            if unknown := [x for x in names if x not in known]:
                raise ValueError(f"--{flag}: {unknown[0]!r} is unknown; use some of {','.join(known)}")
        names = ("networks", "reference", "evaluations", "data", "steps")
        self.setting = {name: getattr(args, name) for name in names} | {"families": self.families}

    @functools.lru_cache(maxsize=1)  # noqa: B019  # one network at a time
    def subject(self, name: str) -> Subject:
        """The network of a name."""
        args = self.args
        if name == "lenet":
            network: Network = Small(args.data, args.data_dir, args.steps, self.workdir)
        else:
            network = networks.named([name], args)[0]
        return Subject(network, self.workdir / name / "stats")

    def todo(self) -> Iterator[Row]:
        for network in self.networks:
            yield from ({"network": network, "way": way} for way in (DENSE, *self.families, *SEARCHES))

    def measure(self, rows: Rows, network: str, way: str) -> Row:
        subject, folder = self.subject(network), self.workdir / network
        if way == DENSE:
            return subject.dense()
        if way in self.families:
            return subject.stored(subject.tree(dict.fromkeys(subject.leaves, way)), folder / f"{way}.jc")
        known = {row["way"]: row for row in rows if row["network"] == network}
        drop = known[self.args.reference]["held out"] - known[DENSE]["others"] if way == "smallest" else None
        found = families.quietly(
            jc.search,
            lambda tree: -subject.lost(tree),
            subject.leaves,
            {family: subject.plan(dict.fromkeys(subject.leaves, family)) for family in self.families},
            None if drop is None else max(drop, 0.0),
            subject.stats,
            folder / way,
            coded=True,
            measure=subject.measure,
            evaluations=self.args.evaluations,
        )
        measured = [{"stage": x.stage, "cost": x.cost, "held out": -x.score, "names": x.names} for x in found.rows]
        row = {"names": found.best.names, "drop": drop, "measured": measured}
        if way == "smallest":
            return row | subject.stored(subject.rest | found.tree, folder / "smallest.jc")
        return row | {"picks": self._picks(subject, rows, network, measured)}

    def _picks(self, subject: Subject, rows: Rows, network: str, measured: Sequence[Row]) -> list[Row]:
        """For each uniform plan that no other beats: the best model of both searches that costs no more."""
        smallest = rows.find(network=network, way="smallest")
        known = [x for x in [*measured, *(smallest or {}).get("measured", [])] if x["names"]]
        picks = []
        for way in uniform_front([row for row in rows if row["network"] == network]):
            best = min((x for x in known if x["cost"] <= way["cost"]), key=lambda x: x["held out"])
            path = self.workdir / network / f"beside-{way['way']}.jc"
            picks.append(
                {"way": way["way"], "names": best["names"], **subject.stored(subject.tree(best["names"]), path)}
            )
        return picks

    def line(self, row: Row) -> str:
        if "bytes" not in row:
            return f"{row['network']}, {row['way']}: {len(row['measured'])} models"
        return f"{row['network']}, {row['way']}: {row['bytes']:,} bytes, {row['held out']:.5f}, {row['score']:.4f}"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        publish(rows, self.workdir / "table.md")
        return "\n\n".join(f"{a}\n{tables.aligned(b)}" for a, b in told(rows)), None


def told(rows: Sequence[Row]) -> Iterator[tuple[str, list[list[str]]]]:
    """Titles and tables, two for each network."""
    for network in dict.fromkeys(row["network"] for row in rows):
        own = [row for row in rows if row["network"] == network]
        yield f"{network}: plans of one family, and the search", summary(own)
        yield _BESIDE, beside(own)


def publish(rows: Sequence[Row], path: Path) -> None:
    """Write the tables in Markdown."""
    write(path, "\n\n".join(f"{title}\n\n{tables.markdown(x)}" for title, x in told(rows)) + "\n")


_BESIDE = "At equal bytes: each uniform plan on the front, and the best of the search that costs no more"


def uniform_front(rows: Sequence[Row]) -> list[Row]:
    """The plans of one family that no other beats in both cost and loss, from cheap to dear."""
    found: list[Row] = []
    for row in sorted((row for row in rows if row["way"] in FAMILIES), key=lambda row: (row["cost"], row["held out"])):
        if not found or row["held out"] < found[-1]["held out"]:
            found.append(row)
    return found


def summary(rows: Sequence[Row]) -> list[list[str]]:
    """A line for each file, from small to large."""
    dense = next(row for row in rows if row["way"] == DENSE)
    found = [["way", "bytes", "smaller", "loss held out", "score", "difference"]]
    for row in sorted((row for row in rows if "bytes" in row), key=lambda row: row["bytes"]):
        more = [
            f"{row['held out'] - dense['held out']:+.5f}",
            f"{row['score']:.4f}",
            f"{row['score'] - dense['score']:+.4f}",
        ]
        found.append([row["way"], f"{row['bytes']:,}", f"{dense['bytes'] / row['bytes']:.2f}x", *more])
    return found


def beside(rows: Sequence[Row]) -> list[list[str]]:
    """Uniform plans and the picks of the search, at equal bytes."""
    known = {row["way"]: row for row in rows}
    lost, found = known[DENSE]["held out"], [["uniform", "bytes", "of the search", "rise of the loss", "", "score", ""]]
    for pick in known["front"]["picks"]:
        own = known[pick["way"]]
        rises = [f"{x['held out'] - lost:.5f}" for x in (own, pick)]
        scores = [f"{x['score']:.4f}" for x in (own, pick)]
        found.append([pick["way"], f"{own['bytes']:,}", f"{pick['bytes']:,}", *rises, *scores])
    return found


def kill(argv: Sequence[str], folder: Path, evaluations: int, kills: int, seed: int) -> None:
    """Run the command in children that get SIGKILL at random evaluations of a search; what happened is kept."""
    rng, told = random.Random(seed), []
    targets = sorted(rng.randrange(1, max(evaluations * 9 // 10, 2)) for _ in range(kills))

    def there() -> int:
        return len(list((folder / "evaluations").glob("*.json")))

    for target in targets:
        with subprocess.Popen([sys.executable, "-m", "experiments.search", *argv]) as process:
            while process.poll() is None and there() < target:
                time.sleep(0.02)
            time.sleep(0.1 * rng.random())
            process.kill()
            told.append({"target": target, "code": process.wait(), "evaluations": there()})
        print(f"killed: {json.dumps(told[-1])}", flush=True)
        write(folder.parents[1] / "kills.json", json.dumps(told, indent=1) + "\n")
        if told[-1]["code"] != -9:
            return  # it ended before, or failed: the run that follows says why


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/search")
    parser.add_argument("--networks", default="lenet", help="of lenet, resnet20 and minilm; lenet by default")
    parser.add_argument("--model_dir", help="folder with the weights of all-MiniLM-L6-v2")
    parser.add_argument("--data", default="digits", help="of LeNet: digits or mnist")
    parser.add_argument("--steps", type=flags.positive, default=1200, help="of LeNet's training")
    parser.add_argument("--families", default="", help="some of them, joined by commas; all by default")
    parser.add_argument("--reference", default="gptq4", help="the uniform plan whose loss the smallest file may have")
    parser.add_argument("--evaluations", type=flags.positive, default=150, help="of each search")
    parser.add_argument("--kills", type=int, default=0, help="how often it gets SIGKILL")
    parser.add_argument("--seed", type=int, default=0, help="of the points where it is killed")
    args = parser.parse_args(argv)
    given = [x for x in (sys.argv[1:] if argv is None else argv) if x != "--overwrite"] + ["--kills=0"]
    workdir = Path(args.workdir or "runs/search")
    if args.kills:
        if args.overwrite:
            clear(workdir)
        kill(given, workdir / args.networks.split(",")[0] / SEARCHES[0], args.evaluations, args.kills, args.seed)
    return runner.main(lambda signals: Searches(args), args.overwrite and not args.kills)


if __name__ == "__main__":
    sys.exit(main())
