"""The families that are compared: each a ladder of methods, from large to small.

A way gives the network as it is after compression; what trains in it is then fine-tuned for as many steps as in any
other. ``random factors`` is the control of factors: one drawn, the other fitted to the network.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any, ClassVar, Literal

import jax
import jax.numpy as jnp

import jcompress as jc
from experiments.families.lab import Lab, Network, quietly

F, Q, P, S = jc.factorize, jc.quantize, jc.prune, jc.share
SHARES = (0.5, 0.3, 0.2, 0.12, 0.07)
LADDER = (0.04, 0.07, 0.1, 0.14, 0.2, 0.3, 0.42, 0.6, 0.8)


@dataclasses.dataclass(frozen=True)
class Family:
    """One way at several sizes.

    Attributes:
      name: in the rows, the table and the picture.
      group: of one colour.
      make: from a lab, a seed and a point to the compressed tree.
      points: what says how small, from large to small.
      told: what the points are.
    """

    name: str
    group: str
    make: Callable[[Lab, int, Any], Network]
    points: Sequence[Any]
    told: str


def of(method: Callable[[Any], Any]) -> Callable[[Lab, int, Any], Network]:
    """A family of one method for all kernels."""
    return lambda lab, seed, point: lab.compressed(method(point), seed)


def modes(n: int) -> tuple[int, ...]:
    """A size as a product of three that are as equal as its divisors allow."""
    first = min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - n ** (1 / 3)))
    rest = n // first
    second = min((d for d in range(1, rest + 1) if rest % d == 0), key=lambda d: abs(d - math.sqrt(rest)))
    return first, second, rest // second


@dataclasses.dataclass(frozen=True)
class Train(jc.Method):
    """A TT-matrix of a dense layer, in modes by its sizes; a train along the axes of a convolution."""

    rank: float

    def __call__(self, w: Any, context: Any) -> Any:
        if w.ndim > 2:
            return F.TensorTrain(rank=self.rank, order=(-2, 0, 1, -1))(w, context)
        return F.TensorTrain(rank=self.rank, shape=(modes(w.shape[0]), modes(w.shape[1])))(w, context)


@dataclasses.dataclass(frozen=True)
class Products(jc.Method):
    """A sum of Kronecker products of two factors of about equal size, in so many numbers."""

    share: float

    def __call__(self, w: Any, context: Any) -> Any:
        p, q = (
            min((d for d in range(1, n + 1) if n % d == 0), key=lambda d: abs(d - math.sqrt(n))) for n in w.shape[-2:]
        )
        numbers = p * q + w.size // (p * q)
        terms = max(1, min(int(self.share * w.size / numbers), p * q, w.size // (p * q)))
        return F.Kronecker(shape=(p, q), terms=terms)(w, context)


@dataclasses.dataclass(frozen=True)
class Walks(jc.Method):
    """A trellis code of rotated inputs, in blocks that tile the layer; GPTQ where no block does."""

    bits: int
    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)

    def __call__(self, w: Any, context: Any) -> Any:
        block = tuple(
            max(d for d in range(1, most + 1) if n % d == 0) for n, most in zip(w.shape[-2:], (4, 64), strict=True)
        )
        if block[0] < 2 or math.prod(block) * self.bits < 10:
            return Q.GPTQ(bits=max(self.bits, 2))(w, context)
        return Q.Rotation(Q.Trellis(bits=self.bits, memory=10, block=block, weigh="gram"))(w, context)


@dataclasses.dataclass(frozen=True)
class Sweep(jc.Method):
    """GPTQ in groups of a matrix' inputs; of a convolution, whose few inputs no group divides, a scale an output."""

    bits: int
    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)

    def __call__(self, w: Any, context: Any) -> Any:
        groups = {"group_size": GROUP, "pad": True} if w.ndim == 2 else {}
        return Q.GPTQ(bits=self.bits, **groups)(w, context)


@dataclasses.dataclass(frozen=True)
class RandomFactors(jc.Method):
    """A random subspace of inputs, and the array's projection onto it, by least squares: the control of factors."""

    share: float
    reads: ClassVar[tuple[str, ...]] = ("key",)

    def __call__(self, w: Any, context: Any) -> Any:
        rows, columns = w.shape[-2:]
        rank = max(1, int(self.share * rows * columns / (rows + columns)))
        u, _ = jnp.linalg.qr(jax.random.normal(context.key, (*w.shape[:-1], rank), w.dtype))
        return jc.formats.LowRank(u, jnp.swapaxes(u, -1, -2) @ w)


@dataclasses.dataclass(frozen=True)
class Rows(jc.Method):
    """Of a layer on images some rows, from which the others are predicted; a low rank of any other."""

    share: float
    reads: ClassVar[tuple[str, ...]] = ("stats.gram",)

    def __call__(self, w: Any, context: Any) -> Any:
        if w.shape[0] in IMAGES:
            return F.Predicted(anchors=self.share, grid=IMAGES[w.shape[0]])(w, context)
        return F.WhitenedSVD(rank=self.share)(w, context)


def stored(lab: Lab) -> Callable[[Any], Any]:
    """Bits of the leaves of a tree."""
    return jc.budget.bits


def multiplied(lab: Lab) -> Callable[[Any], Any]:
    """Multiply-adds of the leaves of a tree."""
    return lab.once("multiplied", lambda: jc.budget.multiply_adds(lab.apply, lab.shapes, lab.example))


def chosen(
    kinds: Callable[[], dict[str, Any]], costs: Callable[[Lab], Callable[[Any], Any]] = stored
) -> Callable[[Lab, int, Any], Network]:
    """For each kernel a method of its own: the least error in sum, as the lab measures it, at a share of the costs."""

    def make(lab: Lab, seed: int, share: float) -> Network:
        params, stats, cost = lab.dense(seed), lab.stats(seed), costs(lab)
        plans = {name: lab.plan(method) for name, method in kinds().items()}

        def options() -> Any:
            return quietly(jc.budget.options, params, plans, measure=lab.measure(seed), cost=cost, stats=stats)

        found = lab.once(("options", kinds, seed), options)
        whole = cost(params)
        kernels = sum(whole[path] for path, method in lab.plan(F.SVD(rank=1)).items() if method is not None)
        budget = math.floor(share * kernels) + sum(whole.values()) - kernels
        plan = jc.budget.allocate(plans, found.errors, found.costs, budget)
        return Network(quietly(jc.compress, params, plan, stats=stats))

    return make


def ranks() -> dict[str, Any]:
    """One family, many ranks."""
    return {f"rank {x:g}": F.WhitenedSVD(rank=x) for x in LADDER} | {"dense": None}


def chains() -> dict[str, Any]:
    """Chains of one family of convolutions, of many ranks, those of the equal shares among them."""
    return {f"rank {x:g}": F.Whitened(F.CP(rank=x)) for x in sorted({*LADDER, *SHARES})} | {"dense": None}


def mixture() -> dict[str, Any]:
    """Ranks, their factors in 8 bits, and bits, in one budget."""
    low = {f"rank {x:g}, 8 bits": jc.chain(F.WhitenedSVD(rank=x), Q.Int(bits=8)) for x in LADDER}
    return low | {f"{b} bits": Sweep(b) for b in (2, 3, 4, 8)}


def blocks(k: int, **options: Any) -> Any:
    """Two codebooks of words whose sum a block is; with sweeps both are fitted to what the other leaves."""
    return jc.residual(S.KMeans(clusters=k, block=BLOCK), S.KMeans(clusters=k, block=BLOCK), **options)


def units(lab: Lab, seed: int, share: float, scope: Literal["group", "global"] = "global") -> Network:
    """Whole units cut, by their norms over all groups or evenly from each, for a share of the multiply-adds."""
    params = lab.dense(seed)
    groups = lab.once("groups", lambda: jc.trace.coupling(lab.apply, lab.shapes, lab.example))
    scores = P.structured.l1(params, groups)
    keep = P.structured.keep(scores, groups, cost=share, scope=scope, normalize="mean", at_least=1)
    apply, small = jc.shrink(lab.apply, params, keep, lab.example)
    return Network(small, apply, lab.cut_training(params, keep))


def tied(lab: Lab, seed: int, point: int) -> Network:
    """Kernels of all blocks as one (1), the head as the table of bytes (2), or both (3): means of what was there."""
    blocks, head = {r"block_[1-9]\d*/(.*kernel)": r"block_0/\1"}, {"head/kernel": "embed/embedding"}
    shared = (blocks if point & 1 else {}) | (head if point & 2 else {})
    params = lab.dense(seed)
    tree = jc.tie(params, shared, transpose=[*head] if point & 2 else ())
    pull = jax.vjp(jc.materialize, tree)[1]  # gives an owner the sum of all that it stands for
    return Network(jax.tree.map(jnp.divide, pull(params)[0], pull(jax.tree.map(jnp.ones_like, params))[0]))


GROUP, BLOCK, WORDS = 32, (4, 1), (256, 128, 64, 32, 16)
LOW, SPARSE, BITS, UNITS, SHARED = "factors", "pruning", "quantization", "units", "sharing"
IMAGES = {64: (8, 8), 784: (28, 28)}
SPARSITIES = (0.5, 0.75, 0.88, 0.94, 0.97)

FAMILIES = [
    Family("dense", "dense", lambda lab, seed, point: Network(lab.dense(seed)), (0,), "as trained"),
    Family("SVD", LOW, of(lambda r: F.SVD(rank=r)), SHARES, "share of the numbers"),
    Family("whitened SVD", LOW, of(lambda r: F.WhitenedSVD(rank=r)), SHARES, "share of the numbers"),
    Family("principal components", LOW, of(lambda r: F.PrincipalComponents(rank=r)), SHARES, "share of the numbers"),
    Family("predicted rows", LOW, of(Rows), SHARES, "share of the numbers"),
    Family("tensor train", LOW, of(Train), SHARES, "share of the numbers"),
    Family("Tucker", LOW, of(lambda r: F.Tucker(ranks=r)), SHARES, "share of the numbers"),
    Family("CP", LOW, of(lambda r: F.CP(rank=r)), SHARES, "share of the numbers"),
    Family("whitened CP", LOW, of(lambda r: F.Whitened(F.CP(rank=r))), SHARES, "share of the numbers"),
    Family("Kronecker", LOW, of(Products), SHARES, "share of the numbers"),
    Family("chosen ranks", LOW, chosen(ranks), SHARES, "share of the bits"),
    Family("chosen CP", LOW, chosen(chains, multiplied), SHARES, "share of the multiply-adds"),
    Family("SVD, 8 bits", LOW, of(lambda r: jc.chain(F.SVD(rank=r), Q.Int(bits=8))), SHARES, "share of the numbers"),
    Family("random factors", LOW, of(RandomFactors), SHARES, "share of the numbers"),
    Family("ranks and bits chosen", "mixture", chosen(mixture), (0.2, 0.14, 0.1, 0.07, 0.05), "share of the bits"),
    Family("magnitude", SPARSE, of(lambda s: P.Magnitude(sparsity=s, scope="global")), SPARSITIES, "zeros"),
    Family(
        "magnitude, 8 bits", SPARSE,
        of(lambda s: jc.chain(P.Magnitude(sparsity=s, scope="global"), Q.Int(bits=8))), SPARSITIES, "zeros",
    ),
    Family("random zeros", SPARSE, of(lambda s: P.Random(sparsity=s)), SPARSITIES, "zeros"),
    Family("units", UNITS, units, (0.6, 0.4, 0.25, 0.15, 0.08), "share of the multiply-adds"),
    Family("shared values", SHARED, of(lambda k: S.KMeans(clusters=k)), (64, 16, 8, 4, 2), "clusters"),
    Family("shared blocks of 4", SHARED, of(lambda k: S.KMeans(clusters=k, block=BLOCK)), WORDS, "words"),
    Family("shared blocks, twice", SHARED, of(blocks), WORDS, "words"),
    Family("shared blocks, in sum", SHARED, of(lambda k: blocks(k, sweeps=3)), WORDS, "words"),
    Family(
        "shared values, by outputs", SHARED, of(lambda k: S.KMeans(clusters=k, weigh="gram")), (8, 4, 2), "clusters",
    ),
    Family(
        "shared blocks of 4, by outputs", SHARED, of(lambda k: S.KMeans(clusters=k, block=BLOCK, weigh="gram")),
        (256, 64, 16), "words",
    ),
    Family("hashed", SHARED, of(lambda r: S.Hashed(ratio=r)), (0.5, 0.25, 0.12, 0.06, 0.03), "share of the numbers"),
    Family(
        "hashed, one bank", SHARED, of(lambda r: S.Hashed(ratio=r, scope="global")), (0.5, 0.25, 0.12, 0.06, 0.03),
        "share of the numbers",
    ),
    Family("Toeplitz-like", SHARED, of(lambda r: S.Toeplitz(rank=r)), (8, 6, 4, 2, 1), "displacement rank"),
    Family("tied layers", SHARED, tied, (2, 1, 3), "of head, blocks, both"),
    Family("circulant", SHARED, of(lambda _: S.Circulant()), (1,), "matrix a layer"),
    Family("ACDC", SHARED, of(lambda n: S.ACDC(layers=n)), (4, 2, 1), "layers"),
    Family("rounding", BITS, of(lambda b: Q.Int(bits=b, group_size=GROUP, pad=True)), (8, 6, 4, 3, 2), "bits"),
    Family("trellis", BITS, of(Walks), (3, 2, 1), "bits"),
    Family("GPTQ", BITS, of(Sweep), (8, 6, 4, 3, 2), "bits"),
]  # fmt: skip
"""All of them; a config may name some."""

LAYERED = ("tied layers",)
"""Those of a network of equal layers."""

MATRICES = tuple(
    family.name for family in FAMILIES if family.name not in ("Tucker", "CP", "whitened CP", "chosen CP", *LAYERED)
)
"""Those of a network without convolutions, where the others are no families of their own."""
