"""A pretrained ResNet with fewer multiply-adds, taught by itself: ranks chosen over the network beside units cut.

Examples:
  python -m experiments.lighter --data_dir=<folder with CIFAR-10 and resnet56_cifar10.npz>
  python -m experiments.lighter --config.model=resnet20 --config.epochs=5 --data_dir=D
  python -m experiments.lighter --config.blended=1 --config.ways="('chosen CP',)" --data_dir=D

``chosen CP`` gives each convolution a rank of its own under one budget (``jc.budget.multiply_adds``), or leaves it
dense; ``units`` are cut from all groups by their norms. Both are then trained towards the dense network's outputs on
augmented training images, in the form in which they run, for equally many epochs. The dense network knows these by
heart and says little of them but their labels; it says more of two images in one, as ``blended`` has them (Beyer et
al. 2022, arXiv:2106.05237). Nothing is chosen on test images.

Expect from the literature: Torch-Pruning (Fang et al. 2023, arXiv:2301.12900) reports 2.13 times fewer multiply-adds at
0.24 points more accuracy and 2.57 times at 0.11 more, by units, after 100 epochs of all 50,000 images (as remembered).
"""

from __future__ import annotations

import dataclasses
import functools
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jcompress as jc
from experiments import lab as labs
from experiments import runner, tables
from experiments.families import lab as families
from experiments.families import ways
from experiments.families.__main__ import lab_of
from experiments.families.ways import Network
from experiments.models import resnet
from experiments.workdir import Row, Rows, write

PyTree = Any


@dataclasses.dataclass(frozen=True)
class Config:
    """Fork it, or change a value with ``--config.<name>=<value>``."""

    name: str = "cifar10"
    data: str = "cifar10"
    model: str = "resnet56"
    fewer: tuple[float, ...] = (2.15,)
    epochs: float = 1.0
    batch_size: int = 64
    learning_rate: float = 2e-4  # of Adam at its peak, in root mean squares of each array
    temperature: float = 2.0
    blended: float = 0.0  # each training image with up to so much of another, under statistics that stay as they are
    calibration: int = 512  # training images for statistics
    ways: tuple[str, ...] = ("chosen CP", "units")
    seeds: int = 1
    test: int = 10_000


WAYS: dict[str, Callable[[families.Lab, int, float], Network]] = {
    "dense": lambda lab, seed, share: Network(lab.dense(seed)),
    "chosen CP": ways.chosen(ways.chains, ways.multiplied),
    "units": ways.units,
}


class Lighter:
    """All ways, budgets and seeds of one config, as the runner takes them.

    Raises:
      ValueError: for anything wrong with the config or the data.
    """

    keys = ("seed", "way", "fewer")

    def __init__(self, config: Config, data_dir: str | None, workdir: str | None) -> None:
        if config.data != "cifar10" or not config.fewer or config.epochs <= 0 or not 0 <= config.blended <= 1:
            raise ValueError(
                f"config: found {config}, expected data=cifar10, some fewer=2.1, positive epochs and blended in [0, 1]"
            )
        if unknown := set(config.ways) - set(WAYS):
            raise ValueError(f"config.ways: {sorted(unknown)} unknown; use some of {', '.join(WAYS)}")
        self.config, self.workdir = config, Path(workdir or f"runs/lighter/{config.name}")
        own = families.Config(
            name=config.name, data=config.data, data_options={"val": 0.02}, model=config.model, steps=0,
            rules=r".*conv\d/weight", kept="conv1/weight", test=config.test,
            calibration=config.calibration,
        )  # fmt: skip
        self.lab: Any = lab_of(own, data_dir)
        skipped = ("name", "fewer", "ways", "seeds")
        setting = {k: v for k, v in dataclasses.asdict(config).items() if k not in skipped}
        self.setting = {"config": setting, "checksum": self.lab.load(0).checksum()}

    def todo(self) -> Iterator[Row]:
        for seed in range(self.config.seeds):
            yield {"seed": seed, "way": "dense", "fewer": 1.0}
            yield from ({"seed": seed, "way": way, "fewer": x} for x in self.config.fewer for way in self.config.ways)

    def measure(self, rows: Rows, seed: int, way: str, fewer: float) -> Row:
        network = WAYS[way](self.lab, seed, 1 / fewer)
        row: Row = {f"{name}_before": x for name, x in self.lab.score(network, seed).items()} | self.lab.size(network)
        if way == "dense":
            return row
        if not self.config.blended:
            return row | self.lab.score(self._taught(network, seed), seed)
        # It is scored under the statistics that it was taught under; the lab's own score would estimate them anew.
        return row | families.Lab.score(self.lab, self._taught(self.lab.settled(network, seed), seed), seed)

    def _taught(self, network: Network, seed: int) -> Network:
        """Trained towards the dense network's outputs, factors as they are multiplied."""
        config, data, dense = self.config, self.lab.load(seed).train, self.lab.dense(seed)
        steps = labs.steps_in(config.epochs, len(data), config.batch_size)
        order = labs.batches(jax.random.key(seed), len(data), config.batch_size)
        images = (resnet.augmented(data.x[index], i) for i, index in zip(range(steps), order, strict=False))
        student, held = jc.accelerate(network.training or resnet.in_training), {}
        if config.blended:  # batch statistics of two images in one are not those of images
            student = jc.accelerate(network.apply or self.lab.apply)
            held = {path: x for path, x in network.tree.items() if "/running_" in path}
            images = (blended(x, config.blended, i) for i, x in enumerate(images))
        tree = families.taught(
            lambda tree, x: student({**tree, **held}, x),
            {path: x for path, x in network.tree.items() if path not in held},
            lambda x: self.lab.apply(dense, x),
            images,
            families.sized(config.learning_rate, steps),
            functools.partial(jc.distill.soft_targets, temperature=config.temperature),
        )
        return network._replace(tree={**tree, **held})

    def line(self, row: Row) -> str:
        before, after = (error(row, x) for x in ("_before", ""))
        return f"{row['way']} {row['fewer']:g}x: {before:.2f}, {after:.2f} taught, {row['multiply_adds']:,.0f}"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        return publish(rows, self.workdir / "table.md"), None


def blended(x: np.ndarray, most: float, seed: int) -> np.ndarray:
    """Images, each with up to so much of another of them."""
    rng = np.random.default_rng(seed)
    share = rng.uniform(0, most, (len(x), 1, 1, 1)).astype(x.dtype)
    return (1 - share) * x + share * x[rng.permutation(len(x))]


def error(row: Row, when: str = "") -> float:
    """The test error in percent; of what was not trained that of before."""
    return 100 * (1 - row.get(f"test_accuracy{when}", row["test_accuracy_before"]))


def publish(rows: Sequence[Row], path: Path) -> str:
    """Write the table, in means over seeds; return it."""
    shown = [["way", "multiply-adds", "fewer", "bytes", "test error, %: as it is", "taught"]]
    whole = next(row for row in rows if row["way"] == "dense")["multiply_adds"]
    for key in dict.fromkeys((row["way"], row["fewer"]) for row in rows):
        own = [row for row in rows if (row["way"], row["fewer"]) == key]
        count, stored = (sum(row[x] for row in own) / len(own) for x in ("multiply_adds", "bytes"))
        found = [tables.spread(*tables.mean_std([error(row, x) for row in own])) for x in ("_before", "")]
        shown.append([key[0], f"{count:,.0f}", f"{whole / count:.2f}x", f"{stored:,.0f}", *found])
    text = tables.markdown(shown, (0,))
    write(path, text + "\n")
    return text


def main(argv: Sequence[str] | None = None) -> int:
    return runner.of_config(__doc__, "runs/lighter/<name of the config>", lambda data: Config(), Lighter, argv)


if __name__ == "__main__":
    sys.exit(main())
