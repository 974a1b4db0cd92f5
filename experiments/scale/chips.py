"""What chips do at most, as their makers say, and the least time that a job takes by it."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Chip:
    """One accelerator.

    Attributes:
      name: as its maker calls it.
      flops: of dense bfloat16 products, a second.
      memory: bytes.
      bandwidth: bytes a second between the chip and its memory.
      links: bytes a second that a chip receives from others, all links together.
      source: where these numbers stand.
    """

    name: str
    flops: float
    memory: float
    bandwidth: float
    links: float
    source: str

    def seconds(self, flops: float, nbytes: float, received: float) -> dict[str, float]:
        """The least time of each kind; a job takes at least the greatest of them."""
        return {
            "compute": flops / self.flops,
            "memory": nbytes / self.bandwidth,
            "links": received / self.links,
        }


CHIPS = (
    Chip("TPU v5e", 197e12, 16e9, 819e9, 200e9, "https://cloud.google.com/tpu/docs/v5e"),
    Chip("TPU v5p", 459e12, 95e9, 2765e9, 600e9, "https://cloud.google.com/tpu/docs/v5p"),
    Chip("H100 SXM", 989e12, 80e9, 3350e9, 50e9, "NVIDIA's data sheets of H100 and DGX H100 (400 Gbit/s a GPU)"),
)
