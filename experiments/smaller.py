"""Is compressing better than training a smaller network? Bits per byte of text in a file of a given size.

Examples:
  python -m experiments.smaller --data_dir=<folder with tinyshakespeare.txt>
  python -m experiments.smaller --config.widths=16,32 --config.seeds=1 --data_dir=D

Transformers of several widths take the same training steps, are compressed by every way, and trained for as many steps
more: rounded ones straight through their rounding, all others in the numbers that are left. Everything is stored coded,
tables and norms included, and ``bytes`` is the file. For each limit the table has, way by way, the width with the
lowest bits per byte on validation text whose file is within it; the test text is read for these rows alone. ``8 bits``
is the small network as it is: compression that costs it nothing.

Expect from the literature: Li et al. (2020, arXiv:2002.11794) found large transformers, compressed, ahead of small ones
at equal size, where training was cut short by compute; Gale et al. (2019, arXiv:1902.09574) and Blalock et al. (2020,
arXiv:2003.03033) found well-made small networks hard to beat by pruning.
"""

from __future__ import annotations

import dataclasses
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import optax

import jcompress as jc
from experiments import runner, tables
from experiments.compress import State, fit, make_step
from experiments.families.lab import Config as Network
from experiments.families.lab import Lab
from experiments.families.lab import Network as Compressed
from experiments.workdir import Row, Rows, write

PyTree = Any
Q, S = jc.quantize, jc.share
MATRICES, KERNELS = r".*(kernel|embedding|position)", r".*kernel"
HALF = Q.Float("bfloat16")


@dataclasses.dataclass(frozen=True)
class Config:
    """Fork it, or change a value with ``--config.<name>=<value>``."""

    name: str = "text"
    data: str = "text"
    widths: tuple[int, ...] = (24, 40, 64, 96, 128)
    layers: int = 2
    length: int = 32
    steps: int = 1500
    finetuning: int = 150
    batch_size: int = 32
    learning_rate: float = 4e-3
    seeds: int = 3
    limits: tuple[int, ...] = (64 * 1024, 256 * 1024)


def rounded(bits: int) -> tuple[Sequence[tuple[str, Any]], bool]:
    """All matrices in so many bits, trained straight through."""
    return ((MATRICES, jc.chain(Q.Int(bits=bits, clip="mse"), HALF)), (".*", HALF)), True


def reduced(pattern: str, method: Any, rest: Any = None) -> tuple[Sequence[tuple[str, Any]], bool]:
    """Some matrices by a method whose numbers train on; other matrices by ``rest``."""
    others = [(MATRICES, jc.chain(rest, HALF))] if rest is not None else []
    return ((pattern, jc.chain(method, HALF)), *others, (".*", HALF)), False


def zeros(share: float) -> Any:
    """The least weights of all matrices are zero."""
    return jc.chain(jc.prune.Magnitude(share, scope="global"), Q.Int(bits=6))


WAYS: dict[str, tuple[Sequence[tuple[str, Any]], bool]] = {
    "8 bits": rounded(8),
    "4 bits": rounded(4),
    "3 bits": rounded(3),
    "2 bits": rounded(2),
    "16 values": reduced(MATRICES, S.KMeans(16)),
    "4 values": reduced(MATRICES, S.KMeans(4)),
    "half zeros": reduced(MATRICES, zeros(0.5)),
    "80% zeros": reduced(MATRICES, zeros(0.8)),
    "rank 30%": reduced(KERNELS, jc.chain(jc.factorize.SVD(rank=0.3), Q.Int(bits=8)), Q.Int(bits=8)),
}
"""Rules by name, and whether training goes straight through them."""


class Smaller:
    """All widths, ways and seeds of one config, as the runner takes them.

    Raises:
      ValueError: for anything wrong with the config or the data.
    """

    keys = ("seed", "width", "way")

    def __init__(self, config: Config, data_dir: str | None, workdir: str | None) -> None:
        if config.data != "text":
            raise ValueError(f"config.data={config.data!r}, expected text")
        if not config.widths or config.seeds < 1:
            raise ValueError(f"config.widths={config.widths}, config.seeds={config.seeds}: nothing to train")
        self.config, self.workdir = config, Path(workdir or f"runs/smaller/{config.name}")
        self.labs = {width: Lab(self._network(width), data_dir) for width in config.widths}
        lab = next(iter(self.labs.values()))
        setting = {k: v for k, v in dataclasses.asdict(config).items() if k not in ("name", "seeds", "limits")}
        self.setting = {"config": setting, "checksum": lab.load(0).checksum()}

    def _network(self, width: int) -> Network:
        c = self.config
        options = {"width": width, "layers": c.layers, "heads": 2, "longest": c.length}
        return Network(
            name=c.name, data=c.data, data_options={"length": c.length, "val": 0.05}, model="transformer",
            model_options=options, steps=c.steps, finetuning=c.finetuning, batch_size=c.batch_size,
            learning_rate=c.learning_rate,
        )  # fmt: skip

    def todo(self) -> Iterator[Row]:
        for seed in range(self.config.seeds):
            for width in self.config.widths:
                yield from ({"seed": seed, "width": width, "way": way} for way in WAYS)

    def measure(self, rows: Rows, seed: int, width: int, way: str) -> Row:
        lab, (rules, through) = self.labs[width], WAYS[way]
        plan, dense = jc.plan(lab.shapes, rules), lab.dense(seed)
        if through:
            tree = jc.compress(_taught(lab, dense, plan, seed, self.config), plan)
        else:
            tree = lab.finetuned(Compressed(jc.compress(dense, plan)), seed).tree
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "network.jc"
            stored = jc.save(path, tree, coded=True)
            found = jc.load(path)
        return {"bytes": stored, **lab.score(Compressed(found), seed)}

    def line(self, row: Row) -> str:
        told = f"seed {row['seed']}, width {row['width']}, {row['way']}"
        return f"{told}: {row['bytes']:,} bytes, {row['val_bits']:.3f} bits a byte held out"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        return publish(rows, self.workdir / "table.md", self.config.limits), None


def _taught(lab: Lab, dense: PyTree, plan: jc.Plan, seed: int, config: Config) -> PyTree:
    """The weights, trained straight through their rounding."""
    tx = optax.adam(optax.cosine_decay_schedule(config.learning_rate / 4, config.finetuning))
    step = make_step(lab.apply, lambda pace: tx, lambda train, held, step: jc.simulate(train, plan))
    params = jax.tree.map(jnp.copy, dense)
    state = State(params, tx.init(params), jnp.zeros((), jnp.int32))
    key = jax.random.fold_in(jax.random.key(seed), 2)
    options = {"steps": config.finetuning, "batch_size": config.batch_size, "title": config.name}
    return fit(step, state, None, lab.load(seed).train, key=key, **options).params


def best(rows: Sequence[Row], way: str, limit: int) -> list[Row]:
    """Of one way the rows of the width that is best on validation text and whose file is within the limit."""
    widths: dict[int, list[Row]] = {}
    for row in rows:
        if row["way"] == way:
            widths.setdefault(row["width"], []).append(row)
    within = [own for own in widths.values() if max(row["bytes"] for row in own) <= limit]
    return min(within, key=lambda own: tables.mean_std([row["val_bits"] for row in own])[0], default=[])


def publish(rows: Sequence[Row], path: Path, limits: Sequence[int] = Config.limits) -> str:
    """Write the table of all limits, best first; return it."""
    shown = [["at most", "way", "width", "bytes", "bits per byte, held out", "bits per byte, test"]]
    for limit in limits:
        found = [(way, best(rows, way, limit)) for way in dict.fromkeys(row["way"] for row in rows)]
        lines = []
        for way, own in found:
            if own:
                held, test = (tables.mean_std([row[f"{x}_bits"] for row in own]) for x in ("val", "test"))
                size = f"{sum(row['bytes'] for row in own) / len(own):,.0f}"
                line = [way, str(own[0]["width"]), size, tables.spread(*held, 3), tables.spread(*test, 3)]
                lines.append((held[0], [f"{limit // 1024} KB", *line]))
        shown += [line for _, line in sorted(lines, key=lambda x: x[0])]
    text = tables.markdown(shown, (0, 1))
    write(path, text + "\n")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    return runner.of_config(__doc__, "runs/smaller/<name of the config>", lambda data: Config(), Smaller, argv)


if __name__ == "__main__":
    sys.exit(main())
