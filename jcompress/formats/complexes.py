"""Complex arrays by their real and imaginary parts."""

from __future__ import annotations

import dataclasses
from typing import Any, ClassVar

import jax

from jcompress import core
from jcompress.core import Compressed, Relaying


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, repr=False)
class Cartesian(Compressed):
    """A complex array ``real + i imag``, each part a node of its own.

    Attributes:
      real: a node that stands for the real parts.
      imag: a node that stands for the imaginary ones.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> w = jnp.array([[3 - 4j], [0.1 + 1j]])
      >>> node = jc.formats.Cartesian(*(jc.quantize.Float("bfloat16")(x) for x in (w.real, w.imag)))
      >>> node.dtype.name, node.nbits()
      ('complex64', 64)
    """

    real: Any
    imag: Any
    elementwise: ClassVar[tuple[str, ...]] = ("real", "imag")

    def materialize(self, *, key: jax.Array | None = None) -> jax.Array:
        first, second = (None, None) if key is None else jax.random.split(key)
        return jax.lax.complex(core.dense(self.real, key=first), core.dense(self.imag, key=second))

    def project(self, w: jax.Array, where: jax.Array | None = None) -> Cartesian:
        return Cartesian(self.real.project(w.real, where), self.imag.project(w.imag, where))

    def relaid(self, relaying: Relaying, /) -> Cartesian | None:
        real, imag = self.real.relaid(relaying), self.imag.relaid(relaying)
        return None if real is None or imag is None else Cartesian(real, imag)
