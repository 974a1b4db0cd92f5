"""``jcompress plan`` and ``jcompress compress``: one plan, tried on shapes or put to work."""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any

import jax

import jcompress as jc
from jcompress import core, io
from jcompress.cli.rules import PlanFile, layouts_of, read_rules
from jcompress.io import reading
from jcompress.measure.units import in_bytes
from jcompress.rules import Plan
from jcompress_command import SAME, say


def plan(given: argparse.Namespace) -> int:
    """Print what every parameter would take, and what one call would cost where the plan names the function."""
    source, made, told = _planned(given)
    tree = source.tree
    after = jax.eval_shape(lambda p, key: jc.compress(p, made, 0, key), tree, jax.random.key(0))
    cost = None if told.fn is None else jc.trace.cost(told.fn, tree, *told.args)
    say(str(jc.report(tree, after, made, cost=cost)))
    for note in made.notes:
        say(note)
    return SAME


def compress(given: argparse.Namespace) -> int:
    """Write the compressed file, and a line on what became of it."""
    source, made, _ = _planned(given)
    key = None if given.seed is None else jax.random.key(given.seed)
    with _progress(len(source), given.quiet) as progress:
        size = jc.compress_file(
            source, made, given.output, step=given.step, key=key, coded=given.coded, progress=progress
        )
    if not given.quiet:
        before = sum(source.sizes.values())
        say(f"{given.output}: {in_bytes(size)} of {in_bytes(before)}, {before / max(size, 1):.1f}x")
    return SAME


def _planned(given: argparse.Namespace) -> tuple[io.Tensors, Plan, PlanFile]:
    told = read_rules(given.plan)
    kind = reading.kind_of(given.source)
    source = io.read_tensors(given.source)
    made = jc.plan(source.tree, told.rules, layouts_of(source, kind, given.layout, told.layout))
    for path, method in made.items():
        needs = core.needs(method) if method is not None else ()
        if asked := [need for need in needs if need.split(".")[0] in ("stats", "grad", "previous")]:
            raise ValueError(
                f"{path}: {method!r} needs {', '.join(asked)}, and the command has no data; compress in Python, with "
                "jc.calibrate"
            )
    return source, made, told


@contextlib.contextmanager
def _progress(total: int, quiet: bool) -> Iterator[Callable[[str, int, int], Any] | None]:
    """A bar by tqdm or rich, whichever is installed, where somebody looks on."""
    if quiet or not sys.stderr.isatty() or "CI" in os.environ:
        yield None
        return
    try:
        from tqdm import tqdm
    except ImportError:
        yield lambda path, done, of: sys.stderr.write(f"\r{done}/{of} ")
        return
    with tqdm(total=total, unit="array", file=sys.stderr) as bar:

        def step(path: str, done: int, of: int) -> None:
            bar.set_postfix_str(path[-40:], refresh=False)
            bar.update(done - bar.n)

        yield step
