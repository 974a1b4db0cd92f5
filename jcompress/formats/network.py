"""Contractions of a few factors: low rank, CP, Tucker, tensor trains and rings, block terms, Kronecker, Monarch."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar

import jax
import jax.numpy as jnp

from jcompress import core
from jcompress.core import Compressed
from jcompress.numeric import meshes, scaling

_LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ"
_MOST, _STEPS = 512, 16
"""The largest system of normal equations that is solved at once, and the steps towards the solution of a larger one."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class TensorNetwork(Compressed):
    """One contraction of a few factors, and then a merging of modes.

    The equation is that of ``jnp.einsum``, without axes of stacked layers, which all factors may have in front. Of the
    output, neighbouring modes are merged into the axes of the array: ``"ir,rj->ij"`` is a matrix of low rank,
    ``"ir,jr,kr->ijk"`` CP, ``"ab,cd->acbd"`` merged by (2, 2) a Kronecker product. It is contracted along the cheapest
    path.

    ``project`` refits one factor after the other to the array, in least squares with the others as they are: one sweep
    of alternating least squares, which never takes the array farther away, and does not find the best factors at once.

    On explicit mesh axes factors are sharded along the modes of the axes that the array is sharded along: of an axis of
    several modes, along the first that the devices divide. If they divide none, factors and array stay whole.

    Attributes:
      factors: float arrays, or nodes that stand for them; trainable.
      equation: which modes factors share, and the modes of the output in their order.
      merged: how many modes of the output make each axis of the array.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> factors = jnp.array([[1.0, 2.0]]), jnp.array([[1.0], [10.0]])
      >>> node = jc.formats.TensorNetwork(factors, "ab,cd->acbd", (2, 2))
      >>> node.materialize().tolist(), node.nbits()
      ([[1.0, 2.0], [10.0, 20.0]], 128)
    """

    factors: tuple[Any, ...]
    equation: str = dataclasses.field(metadata={"static": True})
    merged: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    linear: ClassVar[bool] = False

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        factors = [core.dense(x, key=key) for x in self.factors]
        whole = contract(self.equation, *factors)
        lead = whole.ndim - sum(self.merged)
        ends = [lead, *(lead + n for n in itertools.accumulate(self.merged))]
        sizes = (math.prod(whole.shape[a:b]) for a, b in itertools.pairwise(ends))
        return whole.reshape(*whole.shape[:lead], *sizes)

    def project(self, w: jax.Array, where: jax.Array | None = None) -> TensorNetwork:
        """One sweep of alternating least squares from the factors as they are; ``where`` is not used."""
        factors = [core.dense(x) for x in self.factors]
        fitted = refitted(self.equation, factors, self._modes(w, factors))
        return dataclasses.replace(
            self,
            factors=tuple(
                core.refitted(old, new.astype(w.dtype)) for old, new in zip(self.factors, fitted, strict=True)
            ),
        )

    def made_of(self) -> list[Any]:
        known = super().made_of()
        mesh = next((meshes.mesh_of(x) for x in known if meshes.is_explicit(x)), None)
        if mesh is None:
            return known
        names: dict[str, Any] = {}
        for modes, x in zip(self._terms(), known, strict=True):
            own = meshes.spec_of(x)
            lead = own[: len(own) - len(modes)]
            names |= {mode: name for mode, name in zip(modes, own[len(lead) :], strict=True) if name is not None}
        groups, sizes = self._groups(), mode_sizes(self.equation, known)
        spec = [next((names[mode] for mode in group if mode in names), None) for group in groups]
        shape = [*known[0].shape[: len(lead)], *(math.prod(sizes[mode] for mode in group) for group in groups)]
        return [meshes.spread(shape, known[0].dtype, [*lead, *spec], mesh)]

    def placed(self, known: Sequence[Any], place: Callable[[Any, Any], Any]) -> TensorNetwork:
        """The node whose factors are sharded along the modes of the axes that the array is sharded along."""
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), self)  # the same in and out of the mesh
        w = next((x for x in known if tuple(x.shape) == shapes.shape), None)
        if w is None:
            return dataclasses.replace(self, factors=tuple(place(x, known) for x in self.factors))
        mesh, spec, groups = meshes.mesh_of(w), meshes.spec_of(w), self._groups()
        sizes, lead = mode_sizes(self.equation, shapes.factors), spec[: len(spec) - len(groups)]
        # An axis that is a product of modes is in parts along the first of them; another one serves where it must.
        names = {
            next((mode for mode in group if meshes.divides(own, sizes[mode], mesh)), ""): own
            for own, group in zip(spec[len(lead) :], groups, strict=True)
            if own is not None
        }
        likes = [
            meshes.spread(x.shape, x.dtype, [*lead, *map(names.get, modes)], mesh)
            for modes, x in zip(self._terms(), shapes.factors, strict=True)
        ]
        return dataclasses.replace(self, factors=tuple(map(place, self.factors, likes)))

    def _terms(self) -> list[str]:
        """The modes of each factor."""
        return self.equation.split("->")[0].split(",")

    def _groups(self) -> list[str]:
        """The modes of each axis of the array."""
        ends = [0, *itertools.accumulate(self.merged)]
        return [self.equation.split("->")[1][a:b] for a, b in itertools.pairwise(ends)]

    def _modes(self, w: jax.Array, factors: Sequence[jax.Array]) -> jax.Array:
        """An array of the dense shape with an axis for each mode."""
        sizes = mode_sizes(self.equation, factors)
        output = self.equation.split("->")[1]
        return w.reshape(*w.shape[: w.ndim - len(self.merged)], *(sizes[mode] for mode in output))


def contract(equation: str, *factors: jax.Array) -> jax.Array:
    """The contraction along the cheapest path; axes before those that the equation names are stacked layers."""
    inputs, output = equation.split("->")
    named = ",".join(f"...{modes}" for modes in inputs.split(","))
    return jnp.einsum(f"{named}->...{output}", *factors, precision=jax.lax.Precision.HIGHEST)


def mode_sizes(equation: str, factors: Sequence[Any]) -> dict[str, int]:
    """How long each mode is."""
    inputs = equation.split("->")[0].split(",")
    return {
        mode: n
        for modes, x in zip(inputs, factors, strict=True)
        for mode, n in zip(modes, x.shape[x.ndim - len(modes) :], strict=True)
    }


def refitted(
    equation: str, factors: Sequence[jax.Array], w: jax.Array, sweeps: int = 1, *, held: int = 0
) -> list[jax.Array]:
    """Factors after sweeps of alternating least squares, float32.

    Each factor in turn is the solution of its normal equations; where those are many, some steps of conjugate gradients
    from the factor as it was, which no more than lessen its error.

    Args:
      equation: of the network.
      factors: to start from.
      w: what to approximate, an axis for each mode of the output.
      sweeps: how often each factor is refitted.
      held: how many factors at the end stay as they are.
    """
    unit = scaling.unit([w])
    inputs, output = equation.split("->")
    # The unit stays with the first factor; the others keep their size.
    w, found = unit.divide(w), [x.astype(jnp.float32) for x in factors]
    found[0] = unit.divide(found[0])

    def sweep(_: Any, found: list[jax.Array]) -> list[jax.Array]:
        for place in range(len(found) - held):
            new = _least_squares(inputs.split(","), output, found, place, w)
            found = [*found[:place], new, *found[place + 1 :]]
        return found

    found = sweep(0, found) if sweeps == 1 else jax.lax.fori_loop(0, sweeps, sweep, found)
    return [unit.multiply(found[0]), *found[1:]]


def _least_squares(terms: list[str], output: str, factors: list[jax.Array], place: int, w: jax.Array) -> jax.Array:
    """The factor at ``place`` that fits the array best, with all others as they are."""
    own, others = terms[place], [t for i, t in enumerate(terms) if i != place]
    rest = [x for i, x in enumerate(factors) if i != place]
    elsewhere = set("".join(others))
    bond = "".join(m for m in own if m not in output)
    free = "".join(m for m in own if m in output and m not in elsewhere)
    batch = "".join(m for m in own if m in output and m in elsewhere)
    # A second copy of the others, whose inner modes have names of their own.
    right = contract(f"{','.join([output, *others])}->{batch}{bond}{free}", w, *rest)
    lead = right.shape[: right.ndim - len(bond) - len(free)]
    k, n = (math.prod(right.shape[len(lead) : len(lead) + len(bond)]), -1)
    if k > _MOST:
        return _descended(terms, output, factors, place, w)
    inner = [m for m in sorted(elsewhere) if m not in output]
    names = dict(zip(inner, (m for m in _LETTERS if m not in "".join(terms)), strict=False))
    copies = ["".join(names.get(m, m) for m in t) for t in others]
    twin = "".join(names[m] for m in bond)
    gram = contract(f"{','.join([*others, *copies])}->{batch}{bond}{twin}", *rest, *rest)
    solved = solve(gram.reshape(*lead, k, k), right.reshape(*lead, k, n if right.size else 0)).reshape(right.shape)
    front = right.ndim - len(batch + bond + free)
    places = [front + (batch + bond + free).index(m) for m in own]
    return solved.transpose(*range(front), *places)


def _descended(terms: list[str], output: str, factors: list[jax.Array], place: int, w: jax.Array) -> jax.Array:
    """The factor at ``place`` after steps of conjugate gradients on its normal equations."""
    rest = [x for i, x in enumerate(factors) if i != place]
    others = [t for i, t in enumerate(terms) if i != place]

    def onto(x: jax.Array) -> jax.Array:
        return contract(f"{','.join([terms[place], *others])}->{output}", x, *rest)

    def back(y: jax.Array) -> jax.Array:
        return contract(f"{','.join([output, *others])}->{terms[place]}", y, *rest)

    old = factors[place]
    return old + jax.scipy.sparse.linalg.cg(lambda x: back(onto(x)), back(w - onto(old)), maxiter=_STEPS)[0]


def solve(gram: jax.Array, right: jax.Array) -> jax.Array:
    """``gram^+ right`` for a Gram matrix (..., k, k), directions below its rounding left out."""
    values, vectors = jnp.linalg.eigh(gram)
    most = jnp.max(values, axis=-1, keepdims=True, initial=0)
    kept = values > most * gram.shape[-1] * jnp.finfo(gram.dtype).eps
    inverse = jnp.where(kept, 1 / jnp.where(kept, values, 1), 0)
    high = jax.lax.Precision.HIGHEST
    turned = jnp.matmul(jnp.swapaxes(vectors, -1, -2), right, precision=high)
    return jnp.matmul(vectors, inverse[..., None] * turned, precision=high)
