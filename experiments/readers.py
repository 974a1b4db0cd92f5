"""A pretrained decoder, rounded and written as GGUF: its perplexity in llama.cpp and by the plain function here.

    pip install llama-cpp-python gguf tokenizers
    python -m experiments.readers --model=<SmolLM2-135M-Instruct.Q4_1.gguf> --data_dir=<folder with wikitext2_valid.txt>

It prints a table and writes it with its settings as JSON to ``--workdir``, beside the files. Both see the same tokens,
the first windows of the text. GGUF keeps scales as float16 and llama.cpp rounds activations to 8 bits, so the two
agree to some tenths of a percent.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

import jcompress as jc
from experiments import flags, tables
from experiments.environment import environment
from experiments.language.text import perplexity
from experiments.models import llama_files
from experiments.runner import refuse
from experiments.workdir import write

Int = jc.quantize.Int
KERNELS = r"blk\..*(attn_[qkv]|attn_output|ffn_(up|down|gate))\.weight"
GRIDS = {"Q4_1": Int(bits=4, group_size=32, symmetric=False), "Q4_0": Int(bits=4, group_size=32)}


def by_llama_cpp(file: Path, windows: np.ndarray) -> float:
    """The exponential of the mean loss of all predicted tokens, as llama.cpp gives logits."""
    import llama_cpp

    length, total = windows.shape[1], []
    model = llama_cpp.Llama(str(file), n_ctx=length, n_batch=length, logits_all=True, verbose=False)
    for window in windows:
        model.reset()
        model.eval(window.tolist())
        logits = np.asarray(model.scores[: length - 1], np.float64)
        most = logits.max(-1, keepdims=True)
        true = logits[np.arange(length - 1), window[1:]]
        total.append(np.log(np.exp(logits - most).sum(-1)) + most[:, 0] - true)
    model.close()
    return float(np.exp(np.mean(total)))


def measured(model: Path, text: str, count: int, length: int, folder: Path) -> list[dict[str, Any]]:
    """A row for the file as it is, and one for each grid."""
    loaded, source = llama_files.load(model), jc.io.read_gguf(model)
    windows = np.asarray(loaded.tokenizer.encode(text).ids[: count * length]).reshape(count, length)

    def row(name: str, file: Path, arrays: Mapping[str, Any]) -> dict[str, Any]:
        params = llama_files.from_arrays(arrays, loaded.config, "gguf")
        ours = perplexity(params, loaded.config, windows)
        return {"name": name, "bytes": file.stat().st_size, "llama.cpp": by_llama_cpp(file, windows), "ours": ours}

    arrays = {name: source[name] for name in source if name != "rope_freqs.weight"}
    layout = {name: jc.Layout(inputs=1, outputs=0) for name, x in arrays.items() if x.ndim == 2}
    rows = [row("as it is", model, arrays)]
    for name, grid in GRIDS.items():
        plan = jc.plan(arrays, [(KERNELS, grid), ("token_embd.*", Int(bits=8, group_size=32)), (".*", None)], layout)
        small, file = jc.compress(arrays, plan), folder / f"{name}.gguf"
        jc.io.export_gguf(file, small, metadata=source.metadata)
        rows.append(row(name, file, jc.materialize(small)))
    return rows


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    cells = [["file", "bytes", "llama.cpp", "ours"]]
    cells += [[r["name"], f"{r['bytes']:,}", f"{r['llama.cpp']:.3f}", f"{r['ours']:.3f}"] for r in rows]
    return tables.markdown(cells)


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.parser(__doc__, "runs/readers")
    parser.add_argument("--model", type=Path, required=True, help="a GGUF file of the Llama architecture")
    parser.add_argument("--windows", type=flags.positive, default=2, help="how many")
    parser.add_argument("--length", type=flags.positive, default=512, help="tokens of a window")
    args = parser.parse_args(argv)
    folder = Path(args.workdir or "runs/readers")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        text = (Path(args.data_dir or ".") / "wikitext2_valid.txt").read_text(encoding="utf-8")
        rows = measured(args.model, text, args.windows, args.length, folder)
    except (ValueError, OSError, ImportError) as error:
        return refuse(error)
    settings = {"windows": args.windows, "length": args.length}
    write(
        folder / "readers.json",
        json.dumps({"settings": settings, "environment": environment(), "rows": rows}, indent=1),
    )
    print(table(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
