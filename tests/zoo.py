"""The models on which readings of functions are tested: each family in Flax and in plain jax, all tiny.

Widths that are independent differ in size, so that a mistaken coupling shows.
"""

import functools

import zoo_linen
import zoo_nnx
import zoo_plain
import zoo_plain_dense
import zoo_plain_sequence
from zoo_entry import Built, Entry, randomize

__all__ = ["ZOO", "Built", "Entry", "built", "randomize"]

ZOO: list[Entry] = [
    *zoo_plain_dense.ENTRIES,
    *zoo_plain.ENTRIES,
    *zoo_plain_sequence.ENTRIES,
    *zoo_linen.ENTRIES,
    *zoo_nnx.ENTRIES,
]


@functools.cache
def built(name: str) -> Built:
    """The model of that name, built once."""
    return {entry.name: entry for entry in ZOO}[name].build()
