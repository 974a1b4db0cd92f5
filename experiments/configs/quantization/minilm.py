"""A pretrained sentence encoder of 22.6M parameters, quantized in many ways.

Command: python -m experiments.minilm --model_dir=<folder> --data_dir=<folder>

Expect, mean Spearman of two sets of SemEval 2015 against size on disk: dense 0.8849; int8 0.8846 at 3.98x; rounding to
4 bits 0.8835 at 7.6x, with clipped ranges 0.886; to 3 bits 0.8745 at 10x, clipped and affine 0.881, by GPTQ 0.884 at
9.9x; kernels of 2 bits with tables of 4, affine 0.853, by GPTQ 0.873, rotated 0.876, trained for 60 steps 0.877,
at 9.7x.
``results/quantization/minilm.md`` has all rows, of one machine with two cores. Mixed widths and methods, against GPTQ
at the same bytes: 0.8853 to 0.8842 at 4 bits, level at 3 (0.8834 to 0.8839), 0.8835 to 0.8728 at kernels of 2 and
tables of 3. They lead in cosine at all three.

Tables have groups along the vocabulary (axis -2), so that the few features whose values are large have scales of their
own: at 3 bits with one scale a row instead, embeddings are three times as far from the dense ones. Biases and norms
take 16 bits, and so do scales.
"""

from __future__ import annotations

import dataclasses
import re
from typing import Any

from ml_collections import ConfigDict

import jcompress as jc
from experiments.quantization import selfdistill
from experiments.quantization.recipes import KERNELS, TABLES, Calibration, Recipe

Int = jc.quantize.Int
HALF = jc.quantize.Float("float16")


def recipe(group: str, kernels: Any, tables: Any, **options: Any) -> Recipe:
    """Kernels, tables, and all else in 16 bits; scales and codebooks too."""
    small = [None if m is None else jc.chain(m, HALF) for m in (kernels, tables)]
    return Recipe(group, ((KERNELS, small[0]), (TABLES, small[1]), (".*", HALF)), **options)


def table(bits: int) -> Int:
    """The best simple grid for tables: affine, 128 words a group."""
    return Int(bits=bits, group_size=128, symmetric=False, clip="mse", pad=True)


def rounded(bits: int) -> Recipe:
    """Symmetric, over the full range."""
    return recipe("rounding", Int(bits=bits, group_size=64), Int(bits=bits, group_size=128, pad=True))


def clipped(bits: int) -> Recipe:
    """Symmetric, over the range of least squared error."""
    options = {"clip": "mse", "pad": True}
    return recipe("clipping", Int(bits=bits, group_size=64, **options), Int(bits=bits, group_size=128, **options))


def affine_grid(bits: int) -> Int:
    """For kernels: affine, over the range of least squared error."""
    return Int(bits=bits, group_size=64, symmetric=False, clip="mse")


def gptq(bits: int) -> Any:
    """The same grid, its codes chosen for the outputs."""
    return jc.quantize.GPTQ(bits=bits, group_size=64, symmetric=False, clip="mse", order=True)


def kmeans(bits: int) -> Any:
    """One codebook an array."""
    return jc.share.KMeans(clusters=2**bits, iterations=25)


@dataclasses.dataclass(frozen=True)
class Mixed:
    """A width and a method for each kernel and table, for the least sum of errors at the bytes of one width for all.

    The options are 2, 3, 4 or 6 bits, kernels by GPTQ or, up to 4 bits, by GPTQ after a rotation. The error of one is
    how far it alone changes which unlabelled sentences are alike.

    Attributes:
      kernels: the bytes are those of kernels of this width by GPTQ,
      tables: and of tables of this one.
      widths: of the options.
      rotated: of the options with a rotation.
      batches: of 64 sentences, by which errors are measured.
    """

    kernels: int
    tables: int
    widths: tuple[int, ...] = (2, 3, 4, 6)
    rotated: tuple[int, ...] = (2, 3, 4)
    batches: int = 6

    def __call__(self, calibration: Calibration) -> jc.Plan:
        plans, found = calibration.once(f"options {self.widths} {self.rotated}", lambda: self._options(calibration))
        bits = ((path, self.tables if re.fullmatch(TABLES, path) else self.kernels) for path in found.costs)
        return jc.budget.allocate(plans, found.errors, found.costs, sum(found.costs[path][str(n)] for path, n in bits))

    def _options(self, calibration: Calibration) -> tuple[dict[str, jc.Plan], jc.budget.Options]:
        params, stats = calibration.params, calibration.stats(["stats.gram"])
        rules = {str(n): recipe("", gptq(n), table(n)).rules for n in self.widths}
        rules |= {f"{n}, rotated": recipe("", jc.quantize.Rotation(gptq(n)), table(n)).rules for n in self.rotated}
        plans = {name: jc.plan(params, found) for name, found in rules.items()}
        strayed = calibration.strayed(self.batches)

        def error(path: str, dense: Any, found: Any) -> float:
            # A small leaf, of one cost under all plans, need not be measured.
            return float(strayed(path, dense, found)) if dense.ndim > 1 else 0.0

        return plans, jc.budget.options(params, plans, measure=error, stats=stats)


def recipes(params: Any) -> dict[str, Recipe]:
    """The rows, by name."""
    found = {"half": Recipe("half", ((".*", HALF),)), "int8": recipe("rounding", Int(bits=8), Int(bits=8))}
    found |= {f"gptq{bits}": recipe("GPTQ", gptq(bits), table(bits)) for bits in (4, 3)}
    found["gptq2"] = recipe("GPTQ", gptq(2), table(4))
    found |= {f"affine{bits}": recipe("affine", affine_grid(bits), table(bits)) for bits in (4, 3)}
    found["affine2"] = recipe("affine", affine_grid(2), table(4))
    found |= {f"int{bits}": rounded(bits) for bits in (4, 3, 2)}
    found |= {f"clip{bits}": clipped(bits) for bits in (4, 3, 2)}
    for bits in (4, 3, 2):
        tables = table(bits if bits > 2 else 4)
        found[f"rotation{bits}"] = recipe("rotation", jc.quantize.Rotation(gptq(bits)), tables)
        found[f"hqq{bits}"] = recipe("HQQ", jc.quantize.HQQ(bits=bits, group_size=64), tables)
        found[f"awq{bits}"] = recipe("AWQ", jc.quantize.AWQ(affine_grid(bits)), tables)
        found[f"lqer{bits}"] = recipe("low rank", jc.quantize.LQER(rank=8, grid=affine_grid(bits)), tables)
        found[f"kmeans{bits}"] = recipe("k-means", kmeans(bits), tables)
    found["nf4"] = recipe("levels", jc.quantize.NF4(group_size=64), jc.quantize.NF4(group_size=128, pad=True))
    found["mxfp4"] = recipe("levels", jc.quantize.Microscaling(), jc.quantize.Microscaling(pad=True))
    found |= {
        f"mixed{kernels}": Recipe("mixed", Mixed(kernels, tables)) for kernels, tables in ((2, 3), (3, 3), (4, 4))
    }
    found["gptq2_trained"] = recipe("trained", gptq(2), table(4), training=selfdistill.Training(steps=60))
    found["gptq2_corrected"] = recipe("GPTQ", gptq(2), table(4), corrected=True)
    found["gptq2_sequential"] = recipe("GPTQ", gptq(2), table(4), sequential=True)
    found |= {f"gptq2_tables{bits}": recipe("GPTQ", gptq(2), table(bits)) for bits in (3, 2)}
    return found


def widths(params: Any) -> dict[str, dict[str, Any]]:
    """Methods to compare by the error of each kernel's outputs, by width; both have the same grid."""
    return {f"{bits} bits": {"rounding": affine_grid(bits), "GPTQ": gptq(bits)} for bits in (8, 4, 3, 2)}


def get_config() -> ConfigDict:
    """The sets, and how many sentences nobody judged are for what."""
    config = ConfigDict()
    config.name = "minilm"
    config.sets = ("images", "headlines")
    config.recipes = recipes
    config.widths = widths
    config.only = ""
    config.validation = 300
    config.calibration = 768
    config.calibration_length = 24
    return config
