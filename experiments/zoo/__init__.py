"""Models of other people's, from packages of the index, through every reading: ``python -m experiments.zoo``."""

from experiments.zoo import (
    from_equinox,
    from_equinox_packages,
    from_flax_packages,
    from_graphs,
    from_haiku,
    from_keras,
    from_transformers,
)
from experiments.zoo.model import Entry

ENTRIES: list[Entry] = [
    *from_transformers.ENTRIES,
    *from_equinox.ENTRIES,
    *from_equinox_packages.ENTRIES,
    *from_haiku.ENTRIES,
    *from_flax_packages.ENTRIES,
    *from_keras.ENTRIES,
    *from_graphs.ENTRIES,
]
