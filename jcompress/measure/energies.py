"""An estimate of the energy of one call, from counts and stated assumptions."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class EnergyModel:
    """What operations and memory are taken to cost, in picojoules; the defaults are those of Horowitz (ISSCC 2014).

    45 nm, 0.9 V: a multiplication takes 3.1 pJ of 32-bit and 0.2 of 8-bit integers, 3.7 and 1.1 of floats of 32 and 16
    bits; an addition 0.1 and 0.03, 0.9 and 0.4; 32 bits from DRAM 640 pJ, from a small SRAM 5. Multiplications of
    other widths grow with the product of both, as ``0.2 * a * b / 64`` for integers. What is not counted: control,
    interconnect, idle units, and all but one read of each weight and each activation.

    Attributes:
      integer_multiply: of 8 by 8 bits.
      integer_add: of 32 bits, the accumulator.
      float_multiply: of 32 by 32 bits.
      float_add: of 32 bits.
      dram: a byte, for weights.
      sram: a byte, for activations.

    Example:
      >>> from jcompress import measure
      >>> measure.EnergyModel(dram=80.0).dram
      80.0
    """

    integer_multiply: float = 0.2
    integer_add: float = 0.1
    float_multiply: float = 3.7
    float_add: float = 0.9
    dram: float = 160.0
    sram: float = 1.25


def energy(
    multiply_adds: float,
    weight_bytes: float,
    activation_bytes: float,
    *,
    weight_bits: float = 32,
    activation_bits: float = 32,
    floats: bool = True,
    model: EnergyModel = EnergyModel(),
) -> float:
    """Joules of one call: ``multiply-adds x (multiply + add) + weight bytes x dram + activation bytes x sram``.

    An estimate that ranks plans on one machine, not a measurement: :class:`EnergyModel` says what it assumes. Of
    floats a multiplication is taken to cost in proportion to the product of the widths, so 16-bit ones a quarter
    (measured: 0.3).

    Args:
      multiply_adds: of one call, as :func:`jcompress.trace.cost` counts them.
      weight_bytes: read from DRAM: stored bytes, or coded ones where they are decoded on the way.
      activation_bytes: read and written.
      weight_bits: bits of a weight where it is multiplied.
      activation_bits: bits of an activation there.
      floats: whether products are of floats; else of integers.
      model: the assumptions.

    Returns:
      Joules.

    Raises:
      ValueError: for a negative count.

    Example:
      >>> from jcompress import measure
      >>> dense = measure.energy(1e6, 4e5, 1e4)
      >>> small = measure.energy(1e6, 1e5, 1e4, weight_bits=8, activation_bits=8, floats=False)
      >>> round(1e6 * dense, 1), round(1e6 * small, 1)  # microjoules
      (68.6, 16.3)
    """
    if min(multiply_adds, weight_bytes, activation_bytes, weight_bits, activation_bits) < 0:
        raise ValueError(
            f"energy: found {multiply_adds} multiply-adds, {weight_bytes} and {activation_bytes} bytes, {weight_bits} "
            f"and {activation_bits} bits; expected none to be negative"
        )
    product = weight_bits * activation_bits
    multiply = model.float_multiply * product / 1024 if floats else model.integer_multiply * product / 64
    add = model.float_add if floats else model.integer_add
    total = multiply_adds * (multiply + add) + weight_bytes * model.dram + activation_bytes * model.sram
    return 1e-12 * total
