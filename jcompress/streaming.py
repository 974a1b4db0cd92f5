"""Compression from file to file, array by array: neither the model nor what comes of it is ever in memory whole."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import jax
import numpy as np

from jcompress import apply, io
from jcompress.io import files, joining, plans, tensors
from jcompress.rules import Plan

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]


def compress_file(
    source: io.Tensors,
    plan: Plan,
    path: str | os.PathLike[str],
    *,
    step: Any = None,
    key: jax.Array | None = None,
    stats: Mapping[str, Any] | None = None,
    metadata: Any = None,
    coded: bool = False,
    progress: Callable[[str, int, int], Any] | None = None,
) -> int:
    """Compress the arrays of a file one by one, and write what ``jc.save`` writes of them all.

    Memory holds one array and its node, or those of the leaves that a method decides for together. What is done stays
    in the folder ``<path>.parts`` until all is: the same call goes on there after an interruption. The file is written
    whole or not at all, and is the same, bit for bit, as ``jc.save(path, jc.compress(params, plan), plan=plan)``.

    Args:
      source: from :func:`jcompress.io.read_tensors`.
      plan: from :func:`jcompress.plan`, made of ``source.tree``.
      path: the file to write. An existing one is replaced at the end.
      step: as in :func:`jcompress.compress`.
      key: as in :func:`jcompress.compress`.
      stats: ``{path: statistics}`` for methods that need them; those of :func:`jcompress.load_stats` are read leaf by
        leaf.
      metadata: as in :func:`jcompress.save`.
      coded: as in :func:`jcompress.save`.
      progress: called with a path, how many leaves are done, and how many there are.

    Returns:
      The number of bytes written.

    Raises:
      ValueError: as :func:`jcompress.compress` does; the leaves before stay done.
      StorageError: if the folder holds parts of another job, or another process works there; for a full disk, as an
        ``OSError`` too.

    Example:
      >>> import os, tempfile, numpy as np, jcompress as jc
      >>> with tempfile.TemporaryDirectory() as folder:
      ...     model, small = os.path.join(folder, "model.safetensors"), os.path.join(folder, "small.jc")
      ...     size = jc.io.write_safetensors(model, {"w": np.ones((64, 32), np.float32)})
      ...     source = jc.io.read_tensors(model)
      ...     size = jc.compress_file(source, jc.plan(source.tree, [("w", jc.quantize.Int(bits=4))]), small)
      ...     node = jc.load(small)["w"]
      >>> node
      Quantized(codes=int8[64,32], scale=float32[1,32], bits=4)
    """
    apply.check_plan("compress_file", plan)
    apply.check_paths(source.shapes, plan)
    files.check_target(path)
    folder = f"{os.fspath(path)}.parts"
    with _claimed(folder, _about(source, plan, step, key, coded, stats)):
        parts = {name: os.path.join(folder, f"{i}.jc") for i, name in enumerate(source)}
        done = 0
        for unit in plan.units(source):
            if not all(os.path.exists(parts[name]) for name in unit):
                _compress_unit(source, unit, plan, parts, coded, step, key, stats)
            done += len(unit)
            if progress is not None:
                progress(unit[-1], done, len(source))
        size = joining.join(path, parts, plan=plan, metadata=metadata, coded=coded)
    shutil.rmtree(folder)
    return size


def _compress_unit(
    source: io.Tensors, unit: list[str], plan: Plan, parts: Mapping[str, str], coded: bool, *known: Any
) -> None:
    """Read, compress and write what is decided together; arrays are let go before nodes are written."""
    nodes = _fitted({name: _array(source, name, plan) for name in unit}, plan, *known)
    jax.device_put(0)  # JAX lets go of what it took without a copy when it is called the next time
    for name, leaf in nodes.items():
        joining.save_part(parts[name], leaf, coded=coded)


def _array(source: io.Tensors, name: str, plan: Plan) -> Any:
    """What is not compressed stays as it was read: JAX would narrow 64 bits. The rest JAX takes without a copy."""
    return source[name] if plan[name] is None else jax.device_put(source[name], may_alias=True)


def _fitted(leaves: dict[str, Any], plan: Plan, step: Any, key: Any, stats: Any) -> dict[str, Any]:
    part = Plan(
        {name: plan[name] for name in leaves},
        {name: plan.groups[name] for name in leaves},
        {name: np.shape(x) for name, x in leaves.items()},
        layouts={name: x for name, x in plan.layouts.items() if name in leaves},
    )
    known = None if stats is None else {name: stats[name] for name in leaves if name in stats}
    return apply.compress(leaves, part, step, key, known)


def _about(source: io.Tensors, plan: Plan, step: Any, key: Any, coded: bool, stats: Any) -> dict[str, Any]:
    """What tells one job from another."""
    arrays = {name: [source.kinds[name], list(x.shape)] for name, x in source.shapes.items()}
    kept: dict[str, Any] = {
        "stamp": source.stamp,
        "arrays": arrays,
        "plan": plans.texts(plan),
        "values": plans.values(plan),
    }
    kept |= {"layouts": {name: repr(x) for name, x in plan.layouts.items()}, "coded": coded}
    kept |= {"stats": getattr(stats, "stamp", stats is not None)}
    kept |= {"step": repr(step), "key": None if key is None else np.asarray(jax.random.key_data(key)).tolist()}
    return json.loads(json.dumps(kept))


@contextlib.contextmanager
def _claimed(folder: str, about: dict[str, Any]) -> Iterator[None]:
    """The folder of the parts, for this job and this process alone."""
    name = os.path.join(folder, "job.json")
    with files.told(folder, "writing"):
        os.makedirs(folder, exist_ok=True)
    with _locked(folder):
        if os.path.exists(name):
            with open(name, "rb") as file:
                found = tensors.parsed(name, file.read(), "the job")
            if different := sorted(x for x in about if found.get(x) != about[x]):
                raise io.StorageError(
                    f"{folder}: holds parts of another job, of other {', '.join(different)}; give another path, or "
                    "remove it"
                )
        files.replace(name, lambda file: file.write(json.dumps(about).encode()))
        yield


@contextlib.contextmanager
def _locked(folder: str) -> Iterator[None]:
    with open(os.path.join(folder, "lock"), "wb") as file:
        if fcntl is not None:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise io.StorageError(
                    f"{folder}: another process works here; wait for it, or give another path"
                ) from None
            except OSError:  # some file systems have no locks
                pass
        yield
