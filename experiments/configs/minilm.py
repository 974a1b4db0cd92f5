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
from collections.abc import Iterator
from typing import Any

import jax

import jcompress as jc
from experiments.families.ways import Products, RandomFactors, Train
from experiments.quantization import selfdistill
from experiments.quantization.recipes import KERNELS, TABLES, Calibration, Config, recipe
from experiments.runner import Way

Int, F = jc.quantize.Int, jc.factorize
HALF = jc.quantize.Float("float16")


def way(name: str, family: str, kernels: Any, tables: Any, **options: Any) -> Way:
    """Kernels, tables, and all else in 16 bits; scales and codebooks too."""
    return recipe(name, family, rules(kernels, tables), **options)


def rules(kernels: Any, tables: Any) -> tuple[tuple[str, Any], ...]:
    """The methods of kernels and of tables, with all else in 16 bits."""
    return (KERNELS, jc.chain(kernels, HALF)), (TABLES, jc.chain(tables, HALF)), (".*", HALF)


def table(bits: int) -> Int:
    """The best simple grid for tables: affine, 128 words a group."""
    return Int(bits=bits, group_size=128, symmetric=False, clip="mse", pad=True)


def rounded(bits: int) -> Way:
    """Symmetric, over the full range."""
    return way(f"int{bits}", "rounding", Int(bits=bits, group_size=64), Int(bits=bits, group_size=128, pad=True))


def clipped(bits: int) -> Way:
    """Symmetric, over the range of least squared error."""
    kernels, tables = (Int(bits=bits, group_size=n, clip="mse", pad=True) for n in (64, 128))
    return way(f"clip{bits}", "clipping", kernels, tables)


def affine_grid(bits: int) -> Int:
    """For kernels: affine, over the range of least squared error."""
    return Int(bits=bits, group_size=64, symmetric=False, clip="mse")


def gptq(bits: int) -> Any:
    """The same grid, its codes chosen for the outputs."""
    return jc.quantize.GPTQ(bits=bits, group_size=64, symmetric=False, clip="mse", order=True)


def kmeans(bits: int) -> Any:
    """One codebook an array."""
    return jc.share.KMeans(clusters=2**bits, iterations=25)


def words(size: int, weigh: Any = None) -> Any:
    """256 words of some inputs of one output."""
    return jc.share.KMeans(clusters=256, iterations=25, block=(size, 1), weigh=weigh)


def table_words(size: int) -> Any:
    """256 words of some features of one row."""
    return jc.share.KMeans(clusters=256, iterations=25, block=(1, size))


def codebooks() -> Iterator[Way]:
    """Shared values and words, and codes that are computed, all about 2 bits a weight or 4, tables included."""
    yield way("values16", "k-means", kmeans(4), kmeans(4))
    yield way("values4", "k-means", kmeans(2), kmeans(2))
    yield way("words4", "words", words(4), table_words(4))
    yield way("words4_gram", "words", words(4, "gram"), table_words(4))
    yield way("words4_rotated", "words", jc.quantize.Rotation(words(4, "gram")), table_words(4))
    yield way("words8_twice", "words", *(jc.residual(x, x) for x in (words(8), table_words(8))))
    yield way("e8p", "lattice", jc.quantize.Rotation(jc.quantize.E8P(weigh="gram")), table_words(4))
    walks = jc.quantize.Trellis(block=(2, 128), weigh="gram"), jc.quantize.Trellis(block=(1, 128))
    yield way("trellis", "trellis", jc.quantize.Rotation(walks[0]), walks[1])


SHARES = (0.5, 0.35, 0.25)


def factors() -> Iterator[Way]:
    """Kernels as products of two, at equal shares of their numbers and multiply-adds, and by other families."""
    for share in SHARES:
        for name, method in (("svd", F.SVD(rank=share)), ("whitened", F.WhitenedSVD(rank=share))):
            yield way(f"{name}_{share:g}", "factors", method, table(4))
        yield way(f"whitened_{share:g}_int8", "factors", jc.chain(F.WhitenedSVD(rank=share), Int(bits=8)), table(4))
        yield recipe(f"ranks_{share:g}_int8", "chosen ranks", Ranks(share))
        yield way(f"random_{share:g}", "random factors", RandomFactors(share), table(4))
    yield way("train_0.35", "factors", Train(0.35), table(4))
    yield way("kronecker_0.35", "factors", Products(0.35), table(4))


@dataclasses.dataclass(frozen=True)
class Ranks:
    """A rank for each kernel, for the least sum of errors at a share of all their numbers; factors in 8 bits.

    The error of a rank is how far it alone changes which unlabelled sentences are alike.

    Attributes:
      share: of the numbers of all kernels.
      ladder: of the options, besides a dense kernel.
      batches: of 64 sentences, by which errors are measured.
    """

    share: float
    ladder: tuple[float, ...] = (0.1, 0.15, 0.2, 0.28, 0.38, 0.5, 0.7)
    batches: int = 2

    def __call__(self, calibration: Calibration) -> jc.Plan:
        plans, found = calibration.once(f"ranks {self.ladder}", lambda: self._options(calibration))
        whole = sum(costs["dense"] for costs in found.costs.values())
        return jc.budget.allocate(plans, found.errors, found.costs, int(self.share * whole))

    def _options(self, calibration: Calibration) -> tuple[dict[str, jc.Plan], jc.budget.Options]:
        params, stats = calibration.params, calibration.stats(["stats.gram"])
        kinds = {f"rank {x:g}": jc.chain(F.WhitenedSVD(rank=x), Int(bits=8)) for x in self.ladder}
        plans = {name: jc.plan(params, rules(kind, table(4))) for name, kind in kinds.items()}
        plans["dense"] = jc.plan(params, rules(Int(bits=8), table(4)))
        strayed, kernels = calibration.strayed(self.batches), jc.plan(params, [(KERNELS, Int()), (".*", None)])

        def error(path: str, dense: Any, found: Any) -> float:
            return float(strayed(path, dense, found)) if kernels[path] is not None else 0.0

        def numbers(tree: Any) -> dict[str, int]:
            # Only kernels have a choice: the rest costs nothing here.
            sizes = {path: sum(x.size for x in jax.tree.leaves(node)) for path, node in jc.paths(tree)}
            return {path: n if kernels[path] is not None else 0 for path, n in sizes.items()}

        return plans, jc.budget.options(params, plans, measure=error, cost=numbers, stats=stats)


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
        options = {str(n): rules(gptq(n), table(n)) for n in self.widths}
        options |= {f"{n}, rotated": rules(jc.quantize.Rotation(gptq(n)), table(n)) for n in self.rotated}
        plans = {name: jc.plan(params, found) for name, found in options.items()}
        strayed = calibration.strayed(self.batches)

        def error(path: str, dense: Any, found: Any) -> float:
            # A small leaf, of one cost under all plans, need not be measured.
            return float(strayed(path, dense, found)) if dense.ndim > 1 else 0.0

        return plans, jc.budget.options(params, plans, measure=error, stats=stats)


def ways() -> Iterator[Way]:
    """The rows."""
    yield recipe("half", "half", ((".*", HALF),))
    yield way("int8", "rounding", Int(bits=8), Int(bits=8))
    yield from (way(f"gptq{bits}", "GPTQ", gptq(bits), table(bits)) for bits in (4, 3))
    yield way("gptq2", "GPTQ", gptq(2), table(4))
    yield from (way(f"affine{bits}", "affine", affine_grid(bits), table(bits)) for bits in (4, 3))
    yield way("affine2", "affine", affine_grid(2), table(4))
    yield from map(rounded, (4, 3, 2))
    yield from map(clipped, (4, 3, 2))
    for bits in (4, 3, 2):
        tables = table(bits if bits > 2 else 4)
        yield way(f"rotation{bits}", "rotation", jc.quantize.Rotation(gptq(bits)), tables)
        yield way(f"hqq{bits}", "HQQ", jc.quantize.HQQ(bits=bits, group_size=64), tables)
        yield way(f"awq{bits}", "AWQ", jc.quantize.AWQ(affine_grid(bits)), tables)
        yield way(f"lqer{bits}", "low rank", jc.quantize.LQER(rank=8, grid=affine_grid(bits)), tables)
        yield way(f"kmeans{bits}", "k-means", kmeans(bits), tables)
    yield way("nf4", "levels", jc.quantize.NF4(group_size=64), jc.quantize.NF4(group_size=128, pad=True))
    yield way("mxfp4", "levels", jc.quantize.Microscaling(), jc.quantize.Microscaling(pad=True))
    yield from (recipe(f"mixed{bits}", "mixed", Mixed(bits, tables)) for bits, tables in ((2, 3), (3, 3), (4, 4)))
    yield way("gptq2_trained", "trained", gptq(2), table(4), training=selfdistill.Training(steps=60))
    yield way("gptq2_corrected", "GPTQ", gptq(2), table(4), corrected=True)
    yield way("gptq2_sequential", "GPTQ", gptq(2), table(4), sequential=True)
    yield from (way(f"gptq2_tables{bits}", "GPTQ", gptq(2), table(bits)) for bits in (3, 2))
    yield from codebooks()
    yield from factors()


def widths() -> dict[str, dict[str, Any]]:
    """Methods to compare by the error of each kernel's outputs, by width; both have the same grid."""
    return {f"{bits} bits": {"rounding": affine_grid(bits), "GPTQ": gptq(bits)} for bits in (8, 4, 3, 2)}


def get_config() -> Config:
    """Fork this, or change a value with ``--config.<name>=<value>``."""
    return Config(tuple(ways()), widths())
