"""A decoder of 135M parameters, SmolLM2-135M-Instruct, made smaller in many ways: stored megabytes against perplexity.

Command: python -m experiments.llm --model=<file.gguf or folder> --data_dir=<folder with wikitext2_valid.txt>

Calibrated on the first half of the validation text of WikiText-2, judged on the second. Kernels of the layers are
compressed; the table of embeddings, which is the last layer too, and the norms take 16 bits in every row.

What the literature leads one to expect: at half of the weights, SparseGPT below Wanda below magnitude, and all of them
worse with a pattern of 2 in 4 than of 4 in 8 than without (Frantar & Alistarh 2023, arXiv:2301.00774; Sun et al. 2023,
arXiv:2306.11695). Rounding loses little at 4 bits, much at 3 and everything at 2, where fitting to activations helps
most (Frantar et al. 2022, arXiv:2210.17323; Lin et al. 2023, arXiv:2306.00978). The GGUF that PyPI has is on
a 4-bit grid of groups of 32 already: rounding to that grid costs nothing there, so rows of 4 bits say little about that
file, those of 3 and 2 bits and of pruning much. GPTQ as published is *worse* than rounding on this network: its outputs
are nearer in sum and farther at the first token, which all others attend to. Positions that count by the attention paid
to their values ("attended") mend that at the price of the attention alone; those that count by the gradient of the loss
("guided") take three passes for one. Ranges of least error (clip="mse") and inputs of
most energy first (order=True) harm here; in a rotated basis of inputs ("turned") the first helps more than all else.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import jcompress as jc
from experiments.language.calibration import KERNEL, Calibration, Rules
from experiments.language.healing import Healing
from experiments.language.mixture import Mixture
from experiments.language.units import Cut

HALF = jc.quantize.Float("float16")
Int, NM = jc.quantize.Int, jc.prune.NM


@dataclasses.dataclass(frozen=True)
class Recipe:
    """A row of the table.

    Attributes:
      name: of the row.
      family: the method, which gives the colour in the picture.
      kernels: the method of all kernels, or None where they keep 16 bits.
      kind: how positions count in calibration, see :class:`experiments.language.calibration.Calibration`.
      sequential: whether each layer is fitted to what the compressed ones before it give.
      store: how keys and values are cached.
      cut: what is cut out whole, before.
      healing: how a low rank beside each kernel is trained, afterwards.
      mixture: which method each kernel gets, in place of ``kernels``.
      seed: of what is drawn at random.
    """

    name: str
    family: str
    kernels: Any = None
    kind: str = "plain"
    sequential: bool = False
    store: Callable[..., Any] | None = None
    cut: Cut | None = None
    healing: Healing | None = None
    mixture: Mixture | None = None
    seed: int = 0

    def rules(self, calibration: Calibration | None = None) -> tuple[tuple[str, Any], ...]:
        """For layers: kernels, and all else in 16 bits; a mixture is chosen by the calibration."""
        found: Rules = ((KERNEL, self.kernels),) if self.kernels else ()
        if self.mixture is not None and calibration is not None:
            found = self.mixture(calibration, self.kind)
        return (*((path, jc.chain(method, HALF)) for path, method in found), (".*", HALF))


@dataclasses.dataclass(frozen=True)
class Config:
    """What is compressed how, and by how much text."""

    recipes: tuple[Recipe, ...]
    name: str = "llm"
    data: str = "wikitext2"
    only: str = ""  # some of the rows, joined by commas; all of them by default
    calibration: int = 16  # windows
    calibration_length: int = 512
    evaluation: int = 12
    evaluation_length: int = 256
    healing: int = 100  # steps of rows that are healed


def grid(bits: int) -> Int:
    """Affine, groups of 64."""
    return Int(bits=bits, group_size=64, symmetric=False)


def rounded(bits: int) -> Recipe:
    """To the nearest."""
    return Recipe(f"round{bits}", "rounding", grid(bits))


def gptq(bits: int, kind: str = "plain", **options: Any) -> Recipe:
    """The same grid, codes for the outputs."""
    name = f"gptq{bits}" + ("" if kind == "plain" else f"-{kind}") + ("-seq" if options else "")
    method = jc.quantize.GPTQ(bits=bits, group_size=64, symmetric=False)
    return Recipe(name, "GPTQ" if kind == "plain" else f"GPTQ, {kind}", method, kind, **options)


def turned(bits: int) -> Recipe:
    """Ranges of least error in a rotated basis of inputs, values by attention: the best of ours."""
    method = jc.quantize.GPTQ(bits=bits, group_size=64, symmetric=False, clip="mse")
    return Recipe(f"turned{bits}-attended", "GPTQ, rotated", jc.quantize.Rotation(method), "attended")


def others(bits: int) -> Iterator[Recipe]:
    """Other ways to the same width."""
    yield Recipe(f"awq{bits}", "AWQ", jc.quantize.AWQ(grid=grid(bits)))
    yield Recipe(f"hqq{bits}", "HQQ", jc.quantize.HQQ(bits=bits, group_size=64))
    yield Recipe(f"rotation{bits}", "rotation", jc.quantize.Rotation(grid=grid(bits)))
    yield Recipe(f"lqer{bits}", "low-rank correction", jc.quantize.LQER(rank=16, grid=grid(bits)))


def vectors() -> Iterator[Recipe]:
    """Two bits without a codebook: a lattice, and walks on a trellis, of rotated kernels and for the outputs."""
    turn = jc.quantize.Rotation
    for kind in ("attended", "plain"):
        end = "" if kind == "plain" else f"-{kind}"
        yield Recipe(f"lattice2{end}", "lattice", turn(jc.quantize.E8P(weigh="gram")), kind)
        yield Recipe(f"trellis2{end}", "trellis", turn(jc.quantize.Trellis(memory=10, weigh="gram")), kind)


def pruned(name: str, method: Any, family: str, kind: str = "plain") -> Recipe:
    """Half of the weights, or a pattern."""
    return Recipe(name, family, method, kind)


def pruning() -> Iterator[Recipe]:
    """Half of the weights: anywhere, 2 of 4, 4 of 8."""
    prune = jc.prune
    for name, amount in (("50", {"sparsity": 0.5}), ("24", {"pattern": NM(2, 4)}), ("48", {"pattern": NM(4, 8)})):
        yield pruned(f"sparsegpt{name}", prune.SparseGPT(**amount), "SparseGPT")
        yield pruned(f"wanda{name}", prune.Wanda(**amount), "Wanda")
        yield pruned(f"magnitude{name}", prune.Magnitude(**amount), "magnitude")
        for kind in ("attended", "guided"):
            yield pruned(f"sparsegpt{name}-{kind}", prune.SparseGPT(**amount), f"SparseGPT, {kind}", kind)


def mixed(kind: str) -> Recipe:
    """2, 3 and 4 bits at the bytes of 3, in a rotated basis."""
    methods = tuple(turned(bits).kernels for bits in (2, 3, 4))
    return Recipe(
        "mixed3" + ("" if kind == "plain" else f"-{kind}"), "mixed bits", kind=kind, mixture=Mixture(methods, 1)
    )


def stored(bits: int) -> Recipe:
    """Keys and values in codes, a scale a token and head."""
    return Recipe(f"cache{bits}", "cache", store=Int(bits=bits, axis=(0, 1, 2), symmetric=False))


def cut() -> Iterator[Recipe]:
    """Half of the multiply-adds of the layers, by score and by chance."""
    for what in ("units", "layers"):
        yield Recipe(f"{what}50", what, cut=Cut(what))
        yield Recipe(f"{what}50-chance", "control", cut=Cut(what, by="chance"))


def healed(recipe: Recipe) -> Iterator[Recipe]:
    """A row with a low rank trained beside each kernel; three seeds."""
    for seed in range(3):
        name, family = f"{recipe.name}-healed-{seed}", f"{recipe.family}, healed"
        yield dataclasses.replace(recipe, name=name, family=family, healing=Healing(), seed=seed)


def healing(rows: dict[str, Recipe]) -> Iterator[Recipe]:
    """What is healed, those first that say most."""
    yield from healed(rows["sparsegpt50"])
    chance = Recipe("random50", "control", jc.prune.Random(sparsity=0.5))
    yield from (chance, *healed(chance))
    for name in HEALED:
        yield from healed(rows[name])


HEALED = (
    "gptq2", "turned2-attended", "lattice2-attended", "round3", "gptq3-attended", "turned3-attended", "wanda50",
    "magnitude50", "sparsegpt24", "svd20-attended", "layers50", "awq3", "hqq3", "lqer3", "round4", "gptq4-attended",
    "sparsegpt48", "units50", "round2", "gptq3", "layers50-chance",
)  # fmt: skip


def unhealed() -> Iterator[Recipe]:
    """Rows in which nothing trains, those first that say most."""
    yield Recipe("half", "16 bits")
    yield from (rounded(3), gptq(3), gptq(3, "attended"), turned(3))
    half, fours, eights = (list(pruning())[i : i + 5] for i in (0, 5, 10))
    yield from half[:4]
    yield from (rounded(2), gptq(2), gptq(2, "attended"), turned(2))
    yield from fours[:4]
    yield from (mixed("attended"), stored(8), stored(4))
    yield Recipe("svd20", "low rank", jc.factorize.WhitenedSVD(rank=0.8))
    yield Recipe("svd20-attended", "low rank, attended", jc.factorize.WhitenedSVD(rank=0.8), "attended")
    yield from vectors()
    yield gptq(3, "attended", sequential=True)
    yield from cut()
    yield from others(3)
    yield Recipe("awq3-attended", "AWQ, attended", jc.quantize.AWQ(grid=grid(3)), "attended")
    yield Recipe("wanda50-attended", "Wanda, attended", jc.prune.Wanda(sparsity=0.5), "attended")
    yield from eights[:4]
    yield from (rounded(4), gptq(4), gptq(4, "attended"), *others(4), *others(2))
    yield from (gptq(3, "guided"), gptq(2, "guided"), gptq(4, "guided"), half[4], fours[4], eights[4])
    yield Recipe("wanda50-guided", "Wanda, guided", jc.prune.Wanda(sparsity=0.5), "guided")
    yield Recipe("svd20-guided", "low rank, guided", jc.factorize.WhitenedSVD(rank=0.8), "guided")
    yield gptq(3, "guided", sequential=True)


def recipes() -> list[Recipe]:
    """All rows."""
    found = list(unhealed())
    return [*found, *healing({recipe.name: recipe for recipe in found})]


def get_config() -> Config:
    """All rows."""
    return Config(tuple(recipes()))
