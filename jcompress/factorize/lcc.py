"""Linear computation coding: a matrix as a network of shifts and additions."""

from __future__ import annotations

import dataclasses
import math
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import Context, Method
from jcompress.factorize.rank_choice import check_on_host
from jcompress.factorize.subspaces import check_filled
from jcompress.formats import ShiftAdd


@dataclasses.dataclass(frozen=True)
class LCC(Method):
    """Linear computation coding: factors whose entries are 0 or ``+-2**k``, a few in each row.

    The inputs are cut into blocks, about the logarithm of the outputs wide. In a block the first factor adds up a few
    inputs for each output; each later one adds up, for each output, the ``terms`` outputs of the stage before that come
    nearest to its weights, found greedily, one after the other. No stage makes the error larger, and each costs an
    addition an output for two terms (Mueller, Gaede & Bereyhi 2020, arXiv:2012.13323; Rosenberger et al. 2024). Of
    multiplications one an output is left; bytes are **not** won by it: :func:`additions` counts operations, ``nbits``
    codes and wiring. The wiring depends on the values, so it works outside ``jit`` only, on the host.

    Slices are coded one after the other, so a sharded array is gathered.

    Attributes:
      stages: factors after the first.
      terms: nonzeros in a row of a factor.
      block: inputs in a block; by default the logarithm to base two of the outputs.
      bits: of a code, its sign among them: powers from ``2`` down to ``2**(3 - 2**(bits - 1))``.

    Raises:
      ValueError: for numbers out of range, an array of fewer than two axes, or under ``jit``.

    Example:
      >>> import jax, jax.numpy as jnp, jcompress as jc
      >>> w = jax.random.normal(jax.random.key(0), (16, 64))
      >>> errors = [jnp.linalg.norm(jc.factorize.LCC(stages=n)(w).materialize() - w) for n in (0, 1, 3)]
      >>> bool(errors[0] > 1.5 * errors[1] > 4 * errors[2])
      True
    """

    stages: int = 2
    terms: int = 2
    block: int | None = None
    bits: int = 5

    def __post_init__(self) -> None:
        if self.stages < 0 or self.terms < 1 or not 2 <= self.bits <= 8 or (self.block is not None and self.block < 1):
            raise ValueError(f"{self!r}: stages must not be negative, terms and block at least 1, and bits from 2 to 8")

    def check(self, path: str, shape: tuple[int, ...], dtype: Any) -> None:
        """Raise if the array is no matrix."""
        if len(shape) < 2:
            raise ValueError(f"{path}: LCC needs a matrix, found shape {shape}; keep it dense")
        check_filled("LCC", path, shape)

    whole: ClassVar[bool] = True

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> ShiftAdd:
        """The node for one array; stacked layers have a wiring each."""
        layers, shape = w.shape[: context.batch], w.shape[context.batch :]
        self.check(context.path, shape, w.dtype)
        check_on_host("LCC", context.path, "wiring", w)
        nodes = [self._wired(x) for x in np.asarray(w).reshape(-1, *shape)]
        return jax.tree.map(lambda *parts: jnp.stack(parts).reshape(*layers, *parts[0].shape), *nodes)

    def _wired(self, w: jax.Array) -> ShiftAdd:
        matrix = np.asarray(w, np.float64).reshape(-1, w.shape[-1])
        size = np.abs(matrix).max(0)
        # Powers of two and 1 to 2 times them: all outputs use the same range of codes.
        scale = np.where(size > 0, 2.0 ** np.floor(np.log2(np.where(size > 0, size, 1))), 1.0)
        block = self.block or max(1, round(math.log2(max(w.shape[-1], 2))))
        block = min(block, len(matrix))
        count = -(-len(matrix) // block)
        padded = np.zeros((count * block, w.shape[-1]))
        padded[: len(matrix)] = matrix / scale
        targets = np.swapaxes(padded.reshape(count, block, -1), 1, 2)
        stages = list(zip(*(self._coded(t) for t in targets), strict=True))
        wires = [np.stack([x for x, _ in stage]) for stage in stages]
        codes = [np.stack([x for _, x in stage]) for stage in stages]
        empty = np.zeros((0, *codes[0].shape), np.int8)
        return ShiftAdd(
            jnp.asarray(wires[0], _index(block)), jnp.asarray(codes[0], jnp.int8),
            jnp.asarray(np.stack(wires[1:]) if self.stages else empty, _index(w.shape[-1])),
            jnp.asarray(np.stack(codes[1:]) if self.stages else empty, jnp.int8),
            jnp.asarray(scale[None], w.dtype), block=block, bits=self.bits, rows=tuple(w.shape[:-1]),
        )  # fmt: skip

    def _coded(self, targets: np.ndarray) -> list[tuple[np.ndarray, np.ndarray]]:
        """Wires and codes (outputs, terms) of all stages for one block (outputs, inputs)."""
        found, rows = [], np.eye(targets.shape[1])
        for _ in range(self.stages + 1):
            wires, codes, rows = _pursuit(targets, rows, self.terms, 2 ** (self.bits - 1) - 1)
            found.append((wires, codes))
        return found


def _pursuit(targets: np.ndarray, rows: np.ndarray, terms: int, most: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """For each target the rows, and their powers of two, that take off most, one after the other."""
    squares = (rows**2).sum(1)
    rest, wires, codes = targets, [], []
    for _ in range(terms):
        inner = rest @ rows.T
        code = _nearest(inner / np.where(squares > 0, squares, 1), most)
        level = _levels(code)
        gain = 2 * level * inner - level**2 * squares
        best = gain.argmax(1)
        taken = np.arange(len(targets)), best
        chosen = np.where(gain[taken] > 0, code[taken], 0)
        wires.append(best)
        codes.append(chosen)
        rest = rest - _levels(chosen)[:, None] * rows[best]
    return np.stack(wires, 1), np.stack(codes, 1), targets - rest


def _nearest(x: np.ndarray, most: int) -> np.ndarray:
    """The codes of the nearest powers of two; what is nearer to zero than to the least is 0."""
    with np.errstate(divide="ignore"):
        exponent = np.floor(np.log2(np.abs(x) * (4 / 3)))
    size = np.maximum(2 - exponent, 1)
    return np.where(size <= most, np.sign(x) * np.minimum(size, most), 0).astype(np.int64)


def _levels(codes: np.ndarray) -> np.ndarray:
    return np.where(codes == 0, 0.0, np.sign(codes) * 2.0 ** (2 - np.abs(codes)))


def _index(count: int) -> Any:
    return jnp.uint8 if count <= 256 else jnp.uint16 if count <= 65536 else jnp.uint32
