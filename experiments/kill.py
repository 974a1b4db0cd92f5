"""A sharded training run is killed at random points, also while it saves, and must go on bit for bit.

    python -m experiments.kill --points 20 --out results/scale/kill.json

One run on 8 simulated devices gets SIGKILL again and again and is started anew each time by the same command; at the
end its whole state must be that of a run nobody killed. Of every kill a copy of the folder is kept, torn saves
included, and goes on with 4 devices too; that must end where the run that nobody killed ends, continued with 4 devices
from the same checkpoint.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from experiments import flags, train
from experiments.configs import train_decoder
from experiments.environment import environment
from experiments.workdir import write

PyTree = Any
EVERY = 3
"""Steps between two saves."""


def config(points: int) -> Any:
    """A small decoder, pruned on a ramp, with enough steps for so many kills."""
    found = train_decoder.get_config("tiny")
    found.steps = EVERY * 2 * (points + 2)
    found.update({"batch_size": 16, "log_every": 1, "eval_every": 0, "eval_batches": 1})
    found.model.update({"width": 16, "heads": 4, "head_dim": 4, "hidden": 32})
    found.data.options.update({"length": 8, "examples": 64})
    found.update({"optimizer": {"warmup": 1}, "compress": {"every": 4}, "checkpoint": {"every": EVERY, "keep": 3}})
    found.mesh = {"fsdp": -1, "tensor": 2}
    return found


def digest(tree: PyTree) -> str:
    """SHA-256 of all bits of all arrays."""
    found = hashlib.sha256()
    for x in jax.tree.leaves(tree):
        found.update(np.asarray(x).tobytes())
    return found.hexdigest()


# ---- What runs in processes of its own -------------------------------------------------------------------------------


def worker(folder: Path, points: int, keep: bool) -> None:
    """A run from wherever it stands to its end; the digest of its last state goes to a file."""
    chosen = config(points)
    chosen.checkpoint.keep = chosen.steps if keep else chosen.checkpoint.keep
    state = train.run(chosen, folder).state
    write(folder / "digest", digest(jax.device_get(state)))


def ends(folder: Path, points: int, kills: Sequence[Path]) -> None:
    """For each copy that a kill left: its last checkpoint, and where it leads; the same of the run nobody killed."""
    prepared = train.Run(config(points), folder)
    known: dict[int, tuple[str, str]] = {}
    rows = []
    for copy in kills:
        step, *killed = _followed(prepared, copy)
        if step not in known:
            known[step] = _followed(prepared, folder, step)[1:]
        equal = [a == b for a, b in zip(killed, known[step], strict=True)]
        rows.append({"checkpoint": step, "restored_equal": equal[0], "end_equal": equal[1]})
    write(folder / "ends.json", json.dumps(rows))


def _followed(prepared: train.Run, folder: Path, step: int | None = None) -> tuple[int, str, str]:
    """A checkpoint: its step, the digest of what is restored, and that of the end from there."""
    prepared.workdir = folder
    with prepared.checkpoints() as checkpoints:
        state = prepared.begin(checkpoints, step)
    first, before = int(state.step), digest(jax.device_get(state))
    for _ in range(first, prepared.config.steps):
        state, _ = prepared.step(state, next(prepared.batches))
    return first, before, digest(jax.device_get(state))


# ---- What kills them -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def started(devices: int, *arguments: str) -> Iterator[subprocess.Popen]:
    """This module in a process of its own, on so many simulated devices."""
    count = f"--xla_force_host_platform_device_count={devices}"
    environ = {**os.environ, "XLA_FLAGS": count, "JAX_PLATFORMS": "cpu"}
    program = [sys.executable, "-m", "experiments.kill", *arguments]
    with subprocess.Popen(program, env=environ, stdout=subprocess.DEVNULL) as process:
        try:
            yield process
        finally:
            process.kill()


def finished(devices: int, *arguments: str) -> None:
    """The same to its end.

    Raises:
      RuntimeError: if it fails.
    """
    with started(devices, *arguments) as process:
        if process.wait() != 0:
            raise RuntimeError(f"{' '.join(arguments)} ended with {process.returncode}")


def saved(folder: Path) -> list[int]:
    """The steps of whole checkpoints."""
    return sorted(int(path.name) for path in folder.glob("checkpoints/*") if path.name.isdigit())


def torn(folder: Path) -> dict[str, int]:
    """Saves that are under way, or were, by name, and when their folders were made."""
    found = {}
    for path in folder.glob("checkpoints/*"):
        with contextlib.suppress(FileNotFoundError):  # it was finished meanwhile
            if not path.name.isdigit():
                found[path.name] = path.stat().st_ino
    return found


def steps_of(folder: Path) -> int:
    """How many steps were told in the metrics."""
    path = folder / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def kill_once(folder: Path, points: int, rng: random.Random, saving: bool) -> dict[str, Any]:
    """Start the run and kill it after its next save: within the one after that where wanted, else on the way there."""
    before, old = max(saved(folder), default=0), torn(folder)
    further, pause = rng.randrange(EVERY), 0.05 * rng.random()
    with started(8, "--worker", str(folder), "--points", str(points)) as process:
        while process.poll() is None and max(saved(folder), default=0) <= before:
            time.sleep(0.01)
        target = max(saved(folder), default=0) + further
        while process.poll() is None and (
            steps_of(folder) < target if not saving else torn(folder).items() <= old.items()
        ):
            time.sleep(0.001)
        time.sleep(0.0 if saving else pause)
        process.kill()
        if process.wait() != -signal.SIGKILL:
            raise RuntimeError(f"the run ended with {process.returncode} before it could be killed")
    left = sorted(torn(folder).items() - old.items())
    return {
        "started_from": before,
        "killed_at": steps_of(folder),
        "saved": max(saved(folder)),
        "torn": [name for name, _ in left],
    }


def experiment(points: int, seed: int, folder: Path) -> dict[str, Any]:
    """All kills and what came of them."""
    rng, whole, hurt = random.Random(seed), folder / "whole", folder / "killed"
    finished(8, "--worker", str(whole), "--points", str(points), "--keep")
    rows, copies = [], []
    for number in range(points):
        rows.append(kill_once(hurt, points, rng, saving=number % 2 == 0))
        copies.append(shutil.copytree(hurt, folder / f"kill{number}"))
        print(json.dumps(rows[-1]), flush=True)
    finished(8, "--worker", str(hurt), "--points", str(points))
    finished(4, "--ends", str(whole), *map(str, copies), "--points", str(points))
    on_four = json.loads((whole / "ends.json").read_text())
    digests = [(path / "digest").read_text() for path in (whole, hurt)]
    files = [(path / "model.jc").read_bytes() for path in (whole, hurt)]
    rows = [
        row | {f"{name}_on_4_devices": x for name, x in more.items()} for row, more in zip(rows, on_four, strict=True)
    ]
    return {
        "points": points,
        "seed": seed,
        "steps": config(points).steps,
        "killed_within_a_save": sum(bool(row["torn"]) for row in rows),
        "same_end_on_8_devices": digests[0] == digests[1],
        "same_file_on_8_devices": files[0] == files[1],
        "same_on_4_devices": all(x["restored_equal"] and x["end_equal"] for x in on_four),
        "digest": digests[0],
        "rows": rows,
        "environment": environment(),
    }


def main(argv: Sequence[str] | None = None) -> int:
    parser = flags.Parser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--points", type=flags.positive, default=20, help="how often it is killed")
    parser.add_argument("--seed", type=int, default=0, help="of the points")
    parser.add_argument("--out", default="runs/kill.json", help="the JSON file to write")
    parser.add_argument("--worker", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--ends", type=Path, nargs="+", help=argparse.SUPPRESS)
    parser.add_argument("--keep", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        worker(args.worker, args.points, args.keep)
    elif args.ends:
        ends(args.ends[0], args.points, args.ends[1:])
    else:
        with tempfile.TemporaryDirectory() as folder:
            found = experiment(args.points, args.seed, Path(folder))
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        write(Path(args.out), json.dumps(found, indent=1) + "\n")
        print(f"{found['points']} kills, {found['killed_within_a_save']} of them within a save; written to {args.out}")
        return 0 if found["same_end_on_8_devices"] and found["same_on_4_devices"] else 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
