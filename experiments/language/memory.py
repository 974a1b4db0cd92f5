"""The most memory that this process held since some moment, and what it held then."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import resource
from pathlib import Path

import jax


class Peak:
    """The resident size now, and the largest since, where the system can forget the one before (Linux).

    What earlier work left behind goes first: compiled programs, garbage, and what ``malloc`` keeps for itself.

    Args:
      compiled: whether compiled programs stay.

    Attributes:
      before: bytes that were resident when this was made.
    """

    def __init__(self, compiled: bool = False) -> None:
        if not compiled:
            jax.clear_caches()
        gc.collect()
        with contextlib.suppress(OSError, AttributeError):
            ctypes.CDLL(None).malloc_trim(0)
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")
        self.before = _resident("VmRSS")

    def bytes(self) -> int:
        """So far; of the whole process where the system says no more."""
        return _resident("VmHWM")


def _resident(field: str) -> int:
    status = Path("/proc/self/status")
    if status.exists():
        line = next(x for x in status.read_text().splitlines() if x.startswith(field))
        return 1024 * int(line.split()[1])
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
