"""All stored records on one page: what was measured, by which command, on what, beside what, and who published what.

``python -m experiments.results`` writes it as ``results/index.md`` and as ``results/index.html``, which needs nothing
but a browser. The columns are those that ShrinkBench asks a paper for (Blalock et al. 2020, arXiv:2003.03033): the
splits, the seeds, the control, and more than one size for each way; sizes are those of files, speeds are ratios.
"""

from __future__ import annotations

import dataclasses
import html
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from experiments import models, tables
from experiments.workdir import Row


@dataclasses.dataclass(frozen=True)
class Source:
    """A kind of record.

    Attributes:
      pattern: of its files in the folder of results.
      what: in a few words.
      command: that wrote it.
      data: networks, data and splits.
      control: what the rows are compared with.
      published: figures of papers, as remembered unless it says that they were read.
    """

    pattern: str
    what: str
    command: str
    data: str
    control: str
    published: str = ""


_MNIST = "LeNet-300-100, CNN on MNIST-10k: 7,200 train, 800 validation, 2,000 test"
_DIGITS = "LeNet-300-100, CNN on digits: 1,078 train, 360 validation, 359 test"
_TEXT = "byte transformer on tinyshakespeare: the last 10% test"
_LARGE = "MNIST: 60,000 train, the last 5,000 or 6,000 of them validation, 10,000 test, read once"
SOURCES = (
    Source("compress/*.jsonl", "the main job", "experiments.compress", _DIGITS,
           "dense, trained as long; a random mask"),
    Source("pruning/digits.jsonl", "pruning", "experiments.prune", _DIGITS, "dense; random masks"),
    Source("pruning/mnist.jsonl", "pruning", "experiments.prune --config.data=mnist", _MNIST, "dense; random masks"),
    Source("pruning/text.jsonl", "pruning", "experiments.prune --config.data=text", _TEXT, "dense; random masks"),
    Source("claims/*.json", "accuracy at size", "experiments.claims.lenet", "LeNet-300-100, LeNet-5 in folds",
           "dense, trained as long; a random mask", "Deep Compression 40x at 1.58%, 39x at 0.74%, on MNIST-60k"),
    Source("families/mnist.jsonl", "all families on one network", "experiments.families --config.data=mnist", _LARGE,
           "dense, trained as long; random masks and factors"),
    Source("families/mnist_lenet5.jsonl", "families on a convolutional network",
           "experiments.families --config.data=mnist --config.model=lenet5", _LARGE, "dense, trained as long"),
    Source("families/text.jsonl", "all families on a byte transformer", "experiments.families --config.data=text",
           _TEXT, "dense, trained as long; random factors"),
    Source("families/sts.jsonl", "families of matrices on a sentence encoder", "experiments.families --config.data=sts",
           "all-MiniLM-L6-v2: two sets of STS 2015, judged pairs", "dense, taught as long; random factors"),
    Source("families/cifar10*.jsonl", "all families on pretrained networks",
           "experiments.families --config.data=cifar10",
           "ResNet-20 and ResNet-56 on CIFAR-10, the first 2,000 test images",
           "dense, trained as long; random factors"),
    Source("pipelines/*.jsonl", "from a dense network to a file",
           "experiments.pipelines --data=mnist --shift=1 --epochs=2", _LARGE, "dense",
           "LeNet-300-100: 40x at 1.58% (Deep Compression), 124x at 1.8% (entropy-penalized)"),
    Source("search/*.jsonl", "the smallest file by search, killed and resumed", "experiments.search --kills=2",
           "ResNet-20; MiniLM; LeNet-300-100: data held out of training and calibration, test read once a row",
           "dense; plans of one family for all layers"),
    Source("orders/*.jsonl", "all orders of four stages", "experiments.orders --data=mnist", _LARGE, "dense"),
    Source("codec/*.jsonl", "whole files after training only", "experiments.codec",
           "ResNet-20 and 56 on 9,806 test images; MiniLM on STS 2015; a pruned LeNet-300-100",
           "NNCodec 2.1.3, run beside it"),
    Source("factorize/*.json", "factors without training", "experiments.factorize --model=resnet56",
           "ResNet-56 and ResNet-20 on CIFAR-10, the first 2,000 test images",
           "dense; random factors"),
    Source("sharing/permute_*.json", "units in another order, before words",
           "experiments.permute --model=resnet56 --steps=60",
           "ResNet-56 and ResNet-20 on CIFAR-10, the first 2,000 test images", "as it is; random orders",
           "lower errors in the layers that are permuted (Martinez et al. 2021)"),
    Source("alternation/*.jsonl", "learning-compression beside compressing first",
           "experiments.alternation --data=mnist", _LARGE, "compressed, then trained, equal steps",
           "LeNet-300-100 with one bit a weight at the dense error (Carreira-Perpinan & Idelbayev 2017)"),
    Source("lighter/*.jsonl", "fewer multiply-adds, taught by itself", "experiments.lighter",
           "ResNet-56 on CIFAR-10, 9,806 test images", "dense; units cut",
           "Torch-Pruning 2.13x at +0.24, 2.57x at +0.11 points of accuracy"),
    Source("smaller/*.jsonl", "small networks beside large ones made small", "experiments.smaller", _TEXT,
           "the small network as it is, in 8 bits"),
    Source("early_exit/*.json", "early exits", "experiments.early_exit", "ResNet-56 on CIFAR-10, 9,806 test images",
           "dense"),
    Source("quantization/minilm.jsonl", "a sentence encoder", "experiments.minilm",
           "all-MiniLM-L6-v2; 1,500 judged pairs of STS 2015, other sentences to choose by", "dense; 8 bits"),
    Source("quantization/resnet20.json", "few bits after training only", "experiments.quantization.networks",
           "ResNet-20 on CIFAR-10, 9,806 test images", "dense; rounding"),
    Source("quantization/training.json", "training in few bits", "experiments.quantization.training",
           f"{_DIGITS}; {_MNIST}; {_TEXT}", "dense, trained as long; rounded only"),
    Source("distillation/losses_resnet*.jsonl", "a ResNet-56 teaches a ResNet-20, and its own cut self",
           "experiments.distillation.losses --config.data=cifar10", "CIFAR-10, the first 2,000 test images",
           "plain; permuted targets"),
    Source("distillation/losses_[!r]*.jsonl", "a small network under every loss of distillation",
           "experiments.distillation.losses --config.data=mnist, text", f"{_LARGE}; {_TEXT}", "plain; permuted targets",
           "MNIST: soft targets halve the gap to the teacher (Hinton et al. 2015)"),
    Source("distillation/studies_*.jsonl", "born-again networks, mean teachers, no data, ten images",
           "experiments.distillation.studies --config.data=mnist", _LARGE, "equal steps without the teacher",
           "in the table, beside each"),
    Source("distillation/minilm.jsonl", "three layers taught by six, compressed", "experiments.distillation.minilm",
           "all-MiniLM-L6-v2; 35,271 sentences without labels; 1,500 judged pairs of STS 2015",
           "dense; cut, not taught"),
    Source("zoo/*.jsonl", "models of other packages", "experiments.zoo", "one row a model, random parameters",
           "counts and gradients taken without the library"),
    Source("llm/*.jsonl", "a decoder made smaller", "experiments.llm", "a pretrained decoder on WikiText-2",
           "dense; rounded"),
    Source("scale/*.json", "runs that are killed", "experiments.kill --points 20", "8 simulated devices",
           "a run left alone"),
    Source("benchmarks/*.json", "speed", "experiments.benchmarks.<name>", "ratios within one run", "the same without"),
)  # fmt: skip


def found(folder: Path) -> Iterator[tuple[Path, Source]]:
    """The records that are there, in the order of the sources."""
    for source in SOURCES:
        for path in sorted(folder.glob(source.pattern)):
            yield path, source


def rows_of(path: Path) -> list[Row]:
    """The rows of a record, as many as it has."""
    if path.suffix == ".jsonl":
        return [json.loads(line) for line in path.read_text().splitlines()]
    record = json.loads(path.read_text())
    rows = record.get("rows", record) if isinstance(record, dict) else record
    return [row for row in (rows.values() if isinstance(rows, dict) else rows) if isinstance(row, dict)]


def seeds(rows: Sequence[Row]) -> str:
    """How many seeds, or splits, a record has; nothing where rows name none."""
    for key in ("seed", "split"):
        if values := {row[key] for row in rows if key in row}:
            return str(len(values))
    return ""


def cells(folder: Path) -> list[list[str]]:
    """The table, the head first."""
    table = [["record", "what", "command", "networks, data, splits", "seeds", "rows", "controls", "published"]]
    for path, source in found(folder):
        rows, name = rows_of(path), path.relative_to(folder).with_suffix("").as_posix()
        told = [name, source.what, f"python -m {source.command}", source.data, seeds(rows), str(len(rows))]
        table.append([*told, source.control, source.published])
    return table


def networks() -> list[list[str]]:
    """The networks that these are of, and how many numbers each has; those at 28 x 28 where that decides."""
    table = [["network", "parameters", "where from"]]
    for name, shape in (("lenet_300_100", (1, 28, 28, 1)), ("lenet5", (1, 28, 28, 1)), ("cnn", (1, 28, 28, 1))):
        table.append([name, f"{_size(name, shape):,}", "trained by the experiments"])
    table.append(["transformer", f"{_size('transformer', (1, 128)):,}", "trained by the experiments, at its defaults"])
    table.append(["ResNet-20, ResNet-56", "269,722; 853,018", "pretrained, `experiments/models/resnet.py`"])
    table.append(["all-MiniLM-L6-v2", "22.6 million", "pretrained, `experiments/models/minilm.py`"])
    return table


def _size(name: str, shape: tuple[int, ...]) -> int:
    import jax
    import jax.numpy as jnp

    net = models.build(name, 256 if name == "transformer" else 10)
    shapes: Any = jax.eval_shape(net.init, jax.random.key(0), jax.ShapeDtypeStruct(shape, jnp.float32))
    return sum(x.size for x in jax.tree.leaves(shapes["params"]))


def write(folder: Path) -> None:
    """Both forms of the page."""
    about = "Written by `python -m experiments.results` from the rows in this folder."
    parts = [("All records", cells(folder)), ("Networks", networks())]
    text = "\n\n".join(f"## {title}\n\n{tables.markdown(table, left=range(len(table[0])))}" for title, table in parts)
    (folder / "index.md").write_text(f"# What was measured\n\n{about}\n\n{text}\n")
    (folder / "index.html").write_text(_page(folder, parts))


_STYLE = """body{font:14px/1.5 sans-serif;margin:2em auto;max-width:80em;padding:0 1em;color:#222}
table{border-collapse:collapse;margin:1em 0}td,th{padding:.3em .7em;text-align:left;vertical-align:top;
border-bottom:1px solid #ddd}img{max-width:100%;margin:1em 0}code{font-size:90%}"""


def _page(folder: Path, parts: Sequence[tuple[str, list[list[str]]]]) -> str:
    body = ["<h1>What was measured</h1>"]
    for title, table in parts:
        body += [f"<h2>{title}</h2>", "<table>"]
        for i, row in enumerate(table):
            kind = "td" if i else "th"
            line = "".join(f"<{kind}>{_linked(folder, x, i, j)}</{kind}>" for j, x in enumerate(row))
            body.append(f"<tr>{line}</tr>")
        body.append("</table>")
    body.append("<h2>Pictures</h2>")
    for picture in sorted(folder.rglob("*.png")):
        name = picture.relative_to(folder).as_posix()
        body.append(f'<h3>{html.escape(name.removesuffix(".png"))}</h3><img loading="lazy" src="{name}" alt="{name}">')
    head = f'<meta charset="utf-8"><title>jcompress: results</title><style>{_STYLE}</style>'
    return f"<!doctype html><html><head>{head}</head><body>\n" + "\n".join(body) + "\n</body></html>\n"


def _linked(folder: Path, text: str, row: int, column: int) -> str:
    """The name of a record as a link to its table, where it has one."""
    name = html.escape(text.replace("`", ""))
    is_linked = row and not column and (folder / f"{text}.md").exists()
    return f'<a href="{name}.md">{name}</a>' if is_linked else name
