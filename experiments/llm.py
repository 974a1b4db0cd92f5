"""A decoder language model made smaller in many ways: stored megabytes against perplexity, seconds and peak memory.

Examples:
  python -m experiments.llm --model=<file.gguf or folder of the hub> --data_dir=<folder with wikitext2_valid.txt>
  python -m experiments.llm --model=... --data_dir=... --config.only=half,round3,gptq3-guided

It writes to ``--workdir``: ``results.jsonl``, ``table.md``, ``pareto.png``, ``record.json``, statistics and the
compressed models. Interrupted, the same command continues: rows that are finished are not made again.
``experiments/configs/llm.py`` has the rows; ``--model=tiny`` is a small random one, to try the command.
"""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

import jcompress as jc
from experiments import flags, pictures, runner, tables
from experiments.configs import llm as config_file
from experiments.configs.llm import Config, Recipe
from experiments.language import memory, text
from experiments.language.calibration import Calibration
from experiments.models import llama, llama_files
from experiments.runner import describe
from experiments.workdir import Row, Rows, write

TEXT = "wikitext2_valid.txt"


class Language:
    """All rows of one config, as the runner takes them.

    Raises:
      ValueError: for anything wrong with the config, the model or the text.
      FileNotFoundError: if model or text are missing.
    """

    keys = ("name",)

    def __init__(self, config: Config, model: str, data_dir: str | None, workdir: str | None = None) -> None:
        self.config, self.workdir = config, Path(workdir or f"runs/{config.name}")
        found = loaded(model)
        self.model, self.params = found.config, found.params
        self.tokens = tokens = tokens_of(found, data_dir)
        calibration = text.windows(tokens, config.calibration_length, config.calibration, "first")
        self.evaluation = text.windows(tokens, config.evaluation_length, config.evaluation, "second")
        self.calibration = Calibration(self.params, self.model, calibration, self.workdir / "statistics")
        self.recipes = {r.name: r for r in runner.chosen(config.recipes, config.only)}  # type: ignore[type-var]
        skipped = ("name", "only", "recipes")
        self.setting = {k: describe(v) for k, v in vars(config).items() if k not in skipped}
        self.setting |= {"model": describe(self.model), "ways": {r.name: describe(r) for r in config.recipes}}

    def todo(self) -> Iterator[Row]:
        yield from ({"name": name} for name in self.recipes)

    def measure(self, rows: Rows, name: str) -> Row:
        """Compress, store, load what was stored, and judge that."""
        recipe, path = self.recipes[name], self.workdir / "models" / f"{name}.jc"
        path.parent.mkdir(parents=True, exist_ok=True)
        peak, start = memory.Peak(), time.monotonic()
        half = jc.quantize.Float("float16")
        outer = {name: x for name, x in self.params.items() if name != "layers"}
        tree = jc.compress(outer, jc.plan(outer, [(".*", half)]))
        tree["layers"] = jax.block_until_ready(self._layers(recipe))
        compressed = time.monotonic() - start
        row: Row = {"group": recipe.family, "compress_seconds": round(compressed, 1)}
        row |= {"peak_bytes": peak.bytes(), "before_bytes": peak.before}
        start = time.monotonic()
        jc.save(path, tree, metadata={"row": name})
        row["save_seconds"] = round(time.monotonic() - start, 2)
        kernels = sum(jc.nbits(x["attention"]) + jc.nbits(x["mlp"]) for x in tree["layers"])
        dense = sum(
            x.size for layer in self.params["layers"] for x in jax.tree.leaves((layer["attention"], layer["mlp"]))
        )
        row |= {"bytes": path.stat().st_size, "bits": kernels / dense}
        del tree
        found = text.perplexity(jc.load(path), self.model, self.evaluation, recipe.store)
        path.unlink()
        return row | {"perplexity": found}

    def _layers(self, recipe: Recipe) -> list[Any]:
        cut = recipe.cut(self.calibration, recipe.seed) if recipe.cut else ()
        layers = self.calibration.compress(
            recipe.rules(self.calibration), recipe.kind, recipe.sequential, cut, recipe.seed
        )
        if recipe.healing is None:
            return layers
        healing = dataclasses.replace(recipe.healing, steps=self.config.healing)
        return healing(self.params, layers, self.model, self.tokens, recipe.seed)

    def line(self, r: Row) -> str:
        return f"{r['name']:<22} {r['bytes'] / 1e6:7.1f} MB {r['bits']:5.2f} bits  perplexity {r['perplexity']:.2f}"

    def finish(self, rows: list[Row]) -> tuple[str, Any]:
        return finish(rows, self.workdir / "table.md", self.workdir / "pareto.png"), None


def finish(rows: Sequence[Row], table: Path, picture: Path) -> str:
    """Write the table and the picture; return the table as text."""
    write(table, tables.markdown(cells(rows)) + "\n")
    pictures.language(rows, picture)
    return tables.aligned(cells(rows))


def cells(rows: Sequence[Row]) -> list[list[str]]:
    """The table, the head first."""
    head = [
        "row",
        "MB",
        "bits a kernel weight",
        "perplexity",
        "seconds to compress",
        "peak GB",
        "above the dense model",
    ]
    found = [head]
    for r in rows:
        size = [f"{r['bytes'] / 1e6:.1f}", f"{r['bits']:.2f}", f"{r['perplexity']:.2f}"]
        above = f"{(r['peak_bytes'] - r['before_bytes']) / 1e9:.2f}" if "before_bytes" in r else ""
        found.append([r["name"], *size, f"{r['compress_seconds']:.0f}", f"{r['peak_bytes'] / 1e9:.2f}", above])
    return found


def loaded(model: str) -> llama_files.Loaded:
    """A decoder from a file or folder; ``"tiny"`` is a small random one."""
    if model != "tiny":
        return llama_files.load(model)
    config = llama.Config.tiny()
    return llama_files.Loaded(config, llama.init(jax.random.key(0), config), None)


def tokens_of(found: llama_files.Loaded, data_dir: str | None) -> np.ndarray:
    """Of the text; of a small model without one, random bytes."""
    if data_dir is None:
        if found.tokenizer is not None:
            raise ValueError(f"--data_dir is required, a folder with {TEXT}")
        return np.random.default_rng(0).integers(0, found.config.vocab, 20_000)
    path = Path(data_dir) / TEXT
    if not path.exists():
        raise FileNotFoundError(f"{path}: no such file, expected the validation text of WikiText-2")
    if found.tokenizer is None:
        return np.frombuffer(path.read_bytes(), np.uint8) % found.config.vocab
    return text.of_file(str(path), found.tokenizer)


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/<name of the config>")
    parser.add_argument("--model", required=True, help="a GGUF file, a folder of the hub, or tiny")
    args, config = flags.parse(parser, lambda data: config_file.get_config(), argv)
    return runner.main(lambda signals: Language(config, args.model, args.data_dir, args.workdir), args.overwrite)


if __name__ == "__main__":
    sys.exit(main())
