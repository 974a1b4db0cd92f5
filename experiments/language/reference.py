"""One matrix after the other beside the code that SparseGPT and GPTQ were published with: the error of its outputs.

    git clone https://github.com/IST-DASLab/sparsegpt && git clone https://github.com/IST-DASLab/gptq
    pip install torch
    python -m experiments.language.reference --model=<file.gguf> --data_dir=<folder with wikitext2_valid.txt> \\
        --sparsegpt=sparsegpt --gptq=gptq

Both sides take the same weights and the same Gram matrix of what these meet in the text, with the same damping, blocks
and groups. It prints a table and writes it with its settings as JSON to ``--workdir``. The error is
``tr(dW^T gram dW) / tr(W^T gram W)``, of each setting the geometric mean over matrices; ``theirs / ours`` above 1 is
in our favour.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
import types
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jcompress as jc
from experiments import flags, tables
from experiments.environment import environment
from experiments.language import calibration, text
from experiments.models import llama_files
from experiments.runner import refuse
from experiments.workdir import write

Solve = Callable[[Any], None]


def module(folder: Path, name: str) -> Any:
    """A module of theirs. It wants transformers for a class that no matrix here is of, and a GPU to wait for."""
    sys.modules.setdefault("transformers", types.SimpleNamespace(Conv1D=type(None)))  # type: ignore[arg-type]
    for known in (name, "quant"):
        sys.modules.pop(known, None)
    sys.path.insert(0, str(folder.resolve()))
    try:
        found = importlib.import_module(name)
        found.torch.cuda.synchronize = lambda *_: None
        return found
    except ModuleNotFoundError as error:
        raise ValueError(f"{folder}: {error}; expected the published code, {name}.py and quant.py") from None
    finally:
        sys.path.pop(0)


def by_them(solver: Any, solve: Solve, w: np.ndarray, gram: np.ndarray) -> np.ndarray:
    """The matrix (inputs, outputs) as their solver leaves it."""
    import torch

    layer = torch.nn.Linear(*w.shape, bias=False)
    layer.weight.data = torch.from_numpy(w.T.copy())
    found = solver(layer)
    found.H = torch.from_numpy(gram.copy())
    solve(found)
    return layer.weight.data.numpy().T


def settings(sparsegpt: Path | None, gptq: Path | None) -> Iterator[tuple[str, Any, Any, Any, Solve]]:
    """Names, the method without data, ours, their solver, and how it is called."""
    if sparsegpt is not None:
        solver = module(sparsegpt, "sparsegpt").SparseGPT
        prune = jc.prune
        half = {"sparsity": 0.5}
        yield "50%", prune.Magnitude(**half), prune.SparseGPT(**half), solver, lambda s: s.fasterprune(0.5)
        pattern = {"pattern": prune.NM(2, 4)}
        yield "2:4", prune.Magnitude(**pattern), prune.SparseGPT(**pattern), solver, lambda s: s.fasterprune(0, 2, 4)
    if gptq is not None:
        theirs = module(gptq, "gptq")
        for bits in (3, 2):
            grid: dict[str, Any] = {"bits": bits, "group_size": 64, "symmetric": False}

            def solve(solver: Any, bits: int = bits, quantizer: Any = theirs.Quantizer) -> None:
                solver.quantizer = quantizer()
                solver.quantizer.configure(bits, perchannel=True, sym=False)
                solver.fasterquant(groupsize=64)

            yield f"{bits} bits", jc.quantize.Int(**grid), jc.quantize.GPTQ(**grid), theirs.GPTQ, solve


def measured(found: Any, known: calibration.Calibration, layers: Sequence[int], ways: Sequence[tuple]) -> list[dict]:
    """A row for each matrix and setting."""
    rows = []
    for i in layers:
        for path, stats in known.stats("plain", i).items():
            _, _, part, kernel, _ = path.split("/")
            w, gram = np.asarray(found.params["layers"][i][part][kernel]["kernel"]), np.asarray(stats.gram)
            for name, free, ours, solver, solve in ways:
                start = time.process_time()
                made = by_them(solver, solve, w, gram)
                row = {"matrix": path, "setting": name, "their_seconds": time.process_time() - start}
                row["theirs"] = error(made, w, gram)
                for side, method in (("free", free), ("ours", ours)):
                    start, tree = time.process_time(), {"w": jnp.asarray(w)}
                    node = jc.compress(tree, jc.plan(tree, [("w", method)]), stats={"w": stats})["w"]
                    row[side] = error(np.asarray(jax.block_until_ready(node.materialize())), w, gram)
                    row[f"{side}_seconds"] = time.process_time() - start
                rows.append(row)
    return rows


def error(made: np.ndarray, w: np.ndarray, gram: np.ndarray) -> float:
    """The energy of the change of outputs, as a part of theirs."""
    wide = gram.astype(np.float64)
    change = (made - w).astype(np.float64)
    return float(np.sum(change * (wide @ change)) / np.sum(w * (wide @ w)))


def table(rows: Sequence[dict]) -> str:
    """One line for each setting and kind of matrix, geometric means over layers."""
    cells = [["setting", "matrix", "without data", "theirs", "ours", "theirs / ours"]]
    for name in dict.fromkeys(r["setting"] for r in rows):
        own = [r for r in rows if r["setting"] == name]
        for kernel in [*dict.fromkeys(r["matrix"].split("/", 2)[2] for r in own), ""]:
            some = [r for r in own if r["matrix"].split("/", 2)[2].startswith(kernel)]
            free, theirs, ours = (np.exp(np.mean(np.log([r[s] for r in some]))) for s in ("free", "theirs", "ours"))
            label = kernel.removesuffix("/kernel") or "all"
            cells.append([name, label, f"{free:.4f}", f"{theirs:.4f}", f"{ours:.4f}", f"{theirs / ours:.3f}"])
    return tables.markdown(cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/reference")
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file or a folder of the hub")
    parser.add_argument("--sparsegpt", type=Path, help="the folder of their code")
    parser.add_argument("--gptq", type=Path, help="the folder of their code")
    parser.add_argument("--windows", type=flags.positive, default=4, help="of text")
    parser.add_argument("--length", type=flags.positive, default=512, help="tokens of a window")
    parser.add_argument("--layers", default="1,15,28", help="which, joined by commas")
    args = parser.parse_args(argv)
    folder = Path(args.workdir or "runs/reference")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        ways = list(settings(args.sparsegpt, args.gptq))
        found = llama_files.load(args.model)
        tokens = text.of_file(str(Path(args.data_dir or ".") / "wikitext2_valid.txt"), found.tokenizer)
        windows = text.windows(tokens, args.length, args.windows, "first")
        known = calibration.Calibration(found.params, found.config, windows, folder / "statistics")
        rows = measured(found, known, [int(i) for i in args.layers.split(",")], ways)
    except (ValueError, OSError, ImportError) as problem:
        return refuse(problem)
    about = {"windows": args.windows, "length": args.length, "environment": environment()}
    write(folder / "reference.json", json.dumps({"settings": about, "rows": rows}, indent=1))
    write(folder / "reference.md", table(rows) + "\n")
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
