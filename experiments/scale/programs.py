"""A compiled program as text: what its collectives move, loops included, and the memory that it takes."""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

import jax

_COMPUTATION = re.compile(r"^(?:ENTRY )?%?([\w.\-]+) (?:\([^\n]*\) -> [^\n]*)?\{$")
_COLLECTIVE = re.compile(
    r"= (\(?.*?) (all-gather|all-reduce|all-to-all|collective-permute|reduce-scatter|ragged-all-to-all)(?:-start)?\("
)
_SHAPE = re.compile(r"(\w+)\[([\d,]*)\]")
_WHILE = re.compile(r" while\(.*?body=%?([\w.\-]+)")
_TURNS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')
_CALLED = re.compile(r"(?:to_apply|calls|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"branch_computations=\{([^}]*)\}")
_GROUPS = re.compile(r"replica_groups=(?:\{\{([\d,]*)\}|\[(\d+),(\d+)\])")
_MESH = re.compile(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}")
_BITS = {"pred": 8, "bf16": 16, "f8e4m3fn": 8, "f8e5m2": 8}


@dataclasses.dataclass(frozen=True)
class Traffic:
    """What one device receives through collectives.

    Attributes:
      nbytes: in all, a loop as often as it is known to turn; one whose turns depend on data counts once.
      by_kind: the same for each kind of collective.
      largest: elements of the largest array that an ``all-gather`` or an ``all-to-all`` gives, on one device.
      loops: whether some of it lies in loops whose turns depend on data.
    """

    nbytes: float = 0.0
    by_kind: Mapping[str, float] = dataclasses.field(default_factory=dict)
    largest: int = 0
    loops: bool = False

    def __add__(self, other: Traffic) -> Traffic:
        kinds = {
            name: self.by_kind.get(name, 0) + other.by_kind.get(name, 0) for name in {**self.by_kind, **other.by_kind}
        }
        loops = self.loops or other.loops
        return Traffic(self.nbytes + other.nbytes, kinds, max(self.largest, other.largest), loops)

    def times(self, turns: int | None) -> Traffic:
        """The same in a loop; of unknown length for None."""
        if turns is None:
            return dataclasses.replace(self, loops=self.loops or self.nbytes > 0)
        kinds = {name: turns * x for name, x in self.by_kind.items()}
        return Traffic(turns * self.nbytes, kinds, self.largest if turns else 0, self.loops)


@dataclasses.dataclass(frozen=True)
class Program:
    """What was read of one program, for one device.

    Attributes:
      traffic: what its collectives move.
      temporary: bytes beside arguments and results.
      arguments: bytes of the arguments.
      results: bytes of the results that are no arguments, donated ones left out.
    """

    traffic: Traffic
    temporary: int
    arguments: int
    results: int


def compiled(call: Callable, *args: Any, donate: tuple[int, ...] = ()) -> tuple[Program, Any]:
    """The program of a function for arrays or shapes with shardings, and the shapes and shardings of its results."""
    program = jax.jit(call, donate_argnums=donate).lower(*args).compile()
    memory: Any = program.memory_analysis()
    found = Program(
        traffic=traffic(program.as_text()),
        temporary=memory.temp_size_in_bytes,
        arguments=memory.argument_size_in_bytes,
        results=memory.output_size_in_bytes - memory.alias_size_in_bytes,
    )
    return found, program.output_shardings


def traffic(hlo: str) -> Traffic:
    """What the collectives of a program in HLO move, by the usual costs of rings."""
    bodies, name, entry = {}, "", ""
    for line in hlo.splitlines():
        if match := _COMPUTATION.match(line.strip()):
            name = match[1]
            bodies[name] = []
            entry = name if line.lstrip().startswith("ENTRY") else entry
        elif name:
            bodies[name].append(line)

    @functools.cache
    def of(name: str) -> Traffic:
        return sum((_of_line(line, of) for line in bodies.get(name, ())), Traffic())

    return of(entry)


def _of_line(line: str, of: Callable[[str], Traffic]) -> Traffic:
    if match := _WHILE.search(line):
        turns = _TURNS.search(line)
        return of(match[1]).times(int(turns[1]) if turns else None)
    if match := _COLLECTIVE.search(line):
        return _of_collective(match[2], match[1], line)
    if match := _BRANCHES.search(line):
        return max((of(name.strip().lstrip("%")) for name in match[1].split(",")), key=lambda x: x.nbytes)
    called = _CALLED.findall(line)
    if " conditional(" in line:
        return max((of(name) for name in called), key=lambda x: x.nbytes)
    return sum((of(name) for name in called), Traffic())


def _of_collective(kind: str, shapes: str, line: str) -> Traffic:
    found = [
        (_bits(dtype) / 8, math.prod(int(n) for n in dims.split(",") if n)) for dtype, dims in _SHAPE.findall(shapes)
    ]
    if "-start(" in line and kind != "all-reduce" and len(found) > 1:
        found = found[len(found) // 2 :]  # operands stand before results
    nbytes, group = sum(width * count for width, count in found), _group(line)
    part = (group - 1) / group
    moved = {
        "all-gather": nbytes * part,
        "all-reduce": 2 * nbytes * part,
        "reduce-scatter": nbytes * (group - 1),
        "all-to-all": nbytes * part,
    }.get(kind, nbytes)
    spread = kind in ("all-gather", "all-to-all")
    return Traffic(moved, {kind: moved}, max((count for _, count in found), default=0) if spread else 0)


def _group(line: str) -> int:
    """How many devices exchange with one another."""
    if mesh := _MESH.search(line):
        sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", mesh[1])}
        parts = re.findall(r"'(\w+)'(?::\(\d+\)(\d+))?", mesh[2])
        return math.prod(int(part) if part else sizes[name] for name, part in parts)
    match = _GROUPS.search(line)
    if match is None:
        return jax.device_count()
    return int(match[3]) if match[3] else len(match[1].split(","))


def _bits(dtype: str) -> int:
    digits = re.search(r"\d+", dtype)
    return _BITS.get(dtype, int(digits[0]) if digits else 8)
