"""Storage in narrower floats."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jcompress.core import Context, Method
from jcompress.formats import Cast


@dataclasses.dataclass(frozen=True)
class Float(Method):
    """Keep an array in another float dtype, rounded to nearest.

    Attributes:
      dtype: the stored dtype, ``"bfloat16"`` by default; ``"float16"`` has more precision and less range.

    Raises:
      ValueError: if it is no float dtype.

    Values beyond the range of the stored dtype become its largest finite value.

    Example:
      >>> import jax.numpy as jnp, jcompress as jc
      >>> float(jc.quantize.Float("float16")(jnp.array([1e6])).materialize()[0])
      65504.0
    """

    dtype: Any = "bfloat16"

    def __post_init__(self) -> None:
        if not jnp.issubdtype(jnp.dtype(self.dtype), jnp.floating):
            raise ValueError(f"Float: dtype={self.dtype!r} is not a float dtype; use 'bfloat16' or 'float16'")

    def __call__(self, w: jax.Array, context: Context = Context(), /) -> Cast:
        """The node for one array."""
        most = float(jnp.finfo(self.dtype).max)
        inside = jnp.clip(w, -most, most) if most < float(jnp.finfo(w.dtype).max) else w
        return Cast(inside.astype(self.dtype), stored=np.dtype(jnp.dtype(self.dtype)), dtype=np.dtype(w.dtype))
