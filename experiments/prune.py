"""One network pruned in many ways at one training budget: score against sparsity.

Examples:
  python -m experiments.prune
  python -m experiments.prune --config.data=mnist --data_dir=<folder with MNIST's idx files>
  python -m experiments.prune --config.data=text --data_dir=<folder with tinyshakespeare.txt>
  python -m experiments.prune --config.ways="('random','RigL')" --config.seeds=5

It writes ``results.jsonl``, ``table.md``, ``curve.png`` and ``record.json`` to ``--workdir``. Interrupted, the same
command continues.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from absl import app, flags, logging
from ml_collections import ConfigDict, config_flags
from tqdm import tqdm

from experiments import data as datasets
from experiments.pruning import summary, ways
from experiments.pruning.lab import Lab
from experiments.runs import Interrupted, Record, Results, Signals, command


def config_of_data(argv: Sequence[str]) -> str:
    """The config file of the data that ``--config.data=<data>`` names, else that of the digits."""
    folder = Path(__file__).parent / "configs" / "pruning"
    named = [a.split("=", 1)[1] for a in argv if a.lstrip("-").startswith("config.data=")]
    path = folder / f"{named[-1]}.py" if named and named[-1].isidentifier() else folder / "digits.py"
    return str(path if path.exists() else folder / "digits.py")


_CONFIG = config_flags.DEFINE_config_file("config", config_of_data(sys.argv), "What to train and prune.")
_DATA_DIR = flags.DEFINE_string("data_dir", None, "Folder with the files of the data, where it is not embedded.")
_WORKDIR = flags.DEFINE_string("workdir", None, "Where to write; runs/pruning/<name of the config> by default.")
_OVERWRITE = flags.DEFINE_bool("overwrite", False, "Delete what an earlier run wrote to the workdir.")
_NOT_RESULTS = ("name", "ways", "sparsities", "seeds", "models")


def todo(config: ConfigDict) -> Iterator[tuple[str, int, str, float]]:
    """Model, seed, way and sparsity of each measurement, the dense control first."""
    for model in config.models:
        for seed in range(config.seeds):
            yield model, seed, "dense", 0.0
            for way in config.ways:
                for sparsity in config.sparsities:
                    yield model, seed, way, sparsity


def check(config: ConfigDict) -> None:
    """Raise for what cannot be run."""
    unknown = [way for way in config.ways if way not in ways.WAYS]
    if unknown:
        raise ValueError(f"config.ways: {unknown[0]!r} is unknown; use some of {', '.join(ways.WAYS)}")
    if not all(0 < s < 1 for s in config.sparsities):
        raise ValueError(f"config.sparsities={config.sparsities} must lie between 0 and 1")
    for model in config.models:
        if model not in config.steps or model not in config.batch_size:
            raise ValueError(f"config.steps and config.batch_size need an entry for model {model!r}")


def run(config: ConfigDict, data_dir: str | None, workdir: Path, overwrite: bool, signals: Signals) -> str:
    """Make every measurement that is not there yet, then write the table and the picture."""
    check(config)

    def load(seed: int) -> datasets.Data:
        return datasets.load(config.data, data_dir, seed, **config.data_options.to_dict())

    labs = {model: Lab(model, config, load) for model in config.models}
    kind = next(iter(labs.values())).kind
    setting = {k: v for k, v in config.to_dict().items() if k not in _NOT_RESULTS}
    record = Record(workdir, {"config": setting, "checksum": load(0).checksum()}, overwrite)
    results = Results(workdir / "results.jsonl")
    every = list(todo(config))
    print(f"{load(0)}; {len(every)} measurements, {len(results.rows)} there, to {workdir}", flush=True)
    for number, (model, seed, way, sparsity) in enumerate(every, 1):
        signals.check()
        if results.find(model=model, seed=seed, way=way, sparsity=sparsity) is not None:
            continue
        row = measure(labs[model], way, sparsity, seed)
        results.add(row)
        line = f"{model} seed {seed} {way} {sparsity:g}: {summary.score(row, kind):.2f}, {row['kept']} of {row['of']}"
        tqdm.write(f"[{number}/{len(every)}] {line}, {row['seconds']} s")
        sys.stdout.flush()
    wanted = [r for r in results.rows if (r["model"], r["seed"], r["way"], r["sparsity"]) in set(every)]
    text = summary.markdown(wanted, kind, config.sparsities)
    (workdir / "table.md").write_text(text + "\n")
    summary.picture(wanted, kind, workdir / "curve.png", str(load(0)))
    record.save(finished=True)
    return f"{text}\n\nwritten to {workdir}: results.jsonl, table.md, curve.png, record.json"


def measure(lab: Lab, way: str, sparsity: float, seed: int) -> dict[str, Any]:
    """One network, pruned and tested."""
    start = time.monotonic()
    params = ways.dense(lab, 0.0, seed) if way == "dense" else ways.WAYS[way](lab, sparsity, seed)
    about = {"model": lab.name, "seed": seed, "way": way, "sparsity": sparsity}
    return {**about, **lab.score(params, seed), "seconds": round(time.monotonic() - start, 2)}


def main(argv: Sequence[str]) -> int:
    logging.set_verbosity(logging.WARNING)
    if len(argv) > 1:
        print(f"error: {argv[1]!r} is no flag; see --help", file=sys.stderr)
        return 2
    config = _CONFIG.value
    workdir = Path(_WORKDIR.value or f"runs/pruning/{config.name}")
    with Signals() as signals:
        try:
            print(run(config, _DATA_DIR.value, workdir, _OVERWRITE.value, signals))
        except Interrupted as signal:
            print(f"interrupted by {signal}; to continue: {command().replace(' --overwrite', '')}", file=sys.stderr)
            return 128 + signal.number
        except (ValueError, OSError) as error:
            print("error:", " ".join(str(error).split()), file=sys.stderr)
            return 2
    return 0


if __name__ == "__main__":
    app.run(main)
