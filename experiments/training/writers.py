"""Where metrics go: JSON lines in the workdir, and TensorBoard where it is asked for."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path

import jax

from experiments.workdir import Rows, write


class Metrics:
    """Metrics of steps, written by the first process alone.

    Args:
      folder: of the run; the lines go to ``metrics.jsonl``.
      tensorboard: whether event files for TensorBoard go to the folder ``tensorboard`` too.
      step: the step that the run starts from. What a run that was killed wrote of later steps is dropped.

    Raises:
      ImportError: if TensorBoard is asked for and ``tensorboardX`` is not installed.
    """

    def __init__(self, folder: Path, tensorboard: bool = False, step: int = 0) -> None:
        self._rows, self._events = None, None
        if jax.process_index() != 0:
            return
        path, keys = folder / "metrics.jsonl", ("step", "of")
        known = [row for row in Rows(path, keys) if row["step"] <= step]
        write(path, "".join(json.dumps(row) + "\n" for row in known))
        self._rows = Rows(path, keys)
        if tensorboard:
            try:
                from tensorboardX import SummaryWriter
            except ImportError:
                raise ImportError(
                    "config.tensorboard needs tensorboardX, not installed; pip install 'jcompress[experiments]'"
                ) from None
            self._events = SummaryWriter(str(folder / "tensorboard"), purge_step=step or None)

    def write(self, step: int, of: str, values: Mapping[str, float]) -> None:
        """Numbers of one step, ``of`` training, or of a test."""
        if self._rows is None:
            return
        if self._rows.find(step=step, of=of) is None:
            self._rows.add({"step": step, "of": of, **values})
        if self._events is not None:
            for name, value in values.items():
                self._events.add_scalar(f"{of}/{name}", value, step)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()


class Clock:
    """Says how far a run is and how long it takes still, from the first process.

    Args:
      first: the step that it starts from.
      last: the step that it ends with.
      examples: of a step.
    """

    def __init__(self, first: int, last: int, examples: int) -> None:
        self._last, self._examples, self._seen = last, examples, (first, time.monotonic())

    def say(self, step: int, values: Mapping[str, float]) -> None:
        """Print one line; the pace is that since the line before."""
        (before, then), self._seen = self._seen, (step, time.monotonic())
        pace = (step - before) / max(self._seen[1] - then, 1e-9)
        if jax.process_index() == 0:
            shown = "  ".join(f"{name} {value:.4f}" for name, value in values.items())
            left = time.strftime("%H:%M:%S", time.gmtime((self._last - step) / pace))
            rate = f"{pace:.2f} steps/s  {pace * self._examples:.0f} examples/s"
            print(f"step {step}/{self._last}  {shown}  {rate}  {left} left", flush=True)
