"""The products of each parameter in the order in which they are met, and an array for each."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from jcompress.trace.core.flow import Step
from jcompress.trace.recording.meetings import Meeting, UnreadError


@dataclasses.dataclass
class Sites:
    """An array for each product of a parameter: of the product's axes, those of outputs of size 1, behind loops' turns.

    Attributes:
      arrays: ``{path: [of its first product, of its second, ...]}``; None while their shapes are asked for.
      mark: puts an array on a product, ``mark(axes of outputs, y, array)``; None where arrays weigh positions.
      shapes: what shape each has, as far as products have been met.
      loops: how many of its first axes are turns of loops.
      lengths: the number of turns of each loop around; None where that is not known.
    """

    arrays: Mapping[str, Any] | None = None
    mark: Callable[[tuple[int, ...], Any, Any], Any] | None = None
    shapes: dict[str, list[tuple[int, ...]]] = dataclasses.field(default_factory=dict)
    loops: dict[str, list[int]] = dataclasses.field(default_factory=dict)
    lengths: dict[int, int | None] = dataclasses.field(default_factory=dict)
    _keys: dict[str, list[tuple[int, int]]] = dataclasses.field(default_factory=dict)

    def at(self, met: Meeting, step: Step, side: int, y: Any, turns: Mapping[int, Any]) -> Any:
        """The array of a product, for this turn of the loops around; None where there is none for the parameter."""
        path, lengths = met.view.path, [self.lengths[loop] for loop in turns]
        if None in lengths:
            raise UnreadError("it is in a loop whose turns are not known")
        keys, key = self._keys.setdefault(path, []), (id(step), side)
        shape = (*lengths, *(1 if d in outputs(met) else n for d, n in enumerate(y.shape)))
        if key not in keys:
            keys.append(key)
            self.shapes.setdefault(path, []).append(shape)  # type: ignore[arg-type]
            self.loops.setdefault(path, []).append(len(lengths))
        if self.arrays is None or path not in self.arrays:
            return None
        index, found = keys.index(key), self.arrays[path]
        if index >= len(found):
            raise UnreadError(f"where has weights of {len(found)} of its products, and it is in more")
        if found[index].shape != shape:
            raise ValueError(
                f"{path}: found weights of shape {found[index].shape} in where, expected {shape}: turns of loops, then "
                "the axes of the product with those of outputs of size 1; jc.trace.position_weights makes them"
            )
        return found[index][tuple(turns.values())]

    def marked(self, met: Meeting, step: Step, side: int, y: Any, turns: Mapping[int, Any]) -> Any:
        """The product, with its array on it if arrays are marks."""
        if self.mark is None:
            return y
        mark = self.at(met, step, side, y, turns)
        return y if mark is None else self.mark(outputs(met), y, mark)


def outputs(met: Meeting) -> tuple[int, ...]:
    """The axes of a product that are no positions: outputs, those of groups among them."""
    return tuple(d for d, atoms in enumerate(met.y) if atoms and not all(a in met.lead for a in atoms))
