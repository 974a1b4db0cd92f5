"""The conformance list: every method and, through what they give, every format. A new method adds its row here."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import jax.numpy as jnp
import numpy as np

import jcompress as jc


@dataclasses.dataclass(frozen=True)
class Row:
    """A method and what the common properties must know about it.

    Attributes:
      name: the row's name.
      method: what is tested.
      shape: the array it is fitted to.
      jit: whether it works under jit.
      exact: whether jit, vmap and eager agree to the last bit, or to float tolerance.
      stationary: whether ``project`` solves the least squares problem of the whole nest.
      gathers: whether the mathematics moves parameters between devices; "inputs" if only where inputs are sharded.
      sums: whether a mean over entries decides a number, which devices add up in another order.
      adjusts: whether a constant array gets another value: kept entries make up for the others, or the grid lacks it.
      empty: whether an array without entries has a node; else it is refused by name.
    """

    name: str
    method: Any
    shape: tuple[int, ...] = (16, 8)
    jit: bool = True
    exact: bool = True
    stationary: bool = True
    gathers: bool | str = False
    sums: bool = False
    adjusts: bool = False
    empty: bool = True


def statistics(shape: tuple[int, ...]) -> jc.trace.Stats:
    """Statistics as calibration gives them for a kernel, a convolution, or either stacked on an axis in front."""
    rng, ndim = np.random.default_rng(5), len(shape)
    axes = (-4, -3, -2) if ndim > 3 else (max(-2, -ndim),)
    lead = shape[: ndim - 1 - len(axes)] if ndim > 1 else ()
    x = rng.normal(size=(*lead, 64, math.prod(shape[i] for i in axes)))
    known = {"gram": np.swapaxes(x, -1, -2) @ x, "square": (x**2).sum(-2)}
    known |= {name: rng.uniform(0.5, 2, size=shape) for name in ("grad_square", "hessian_diagonal")}
    known["counts"] = rng.integers(1, 9, size=known["square"].shape)
    return jc.trace.Stats(**{name: jnp.asarray(value, jnp.float32) for name, value in known.items()}, axes=axes)


FACTORS: dict[str, Any] = {"exact": False, "stationary": False, "gathers": True, "empty": False}
M, Int, SVD, KMeans, Float = jc.prune.Magnitude, jc.quantize.Int, jc.factorize.SVD, jc.share.KMeans, jc.quantize.Float
T, F = jc.quantize.training, jc.factorize
MIXTURE = jc.share.Mixture(
    np.array([0.0, -1.0, 0.5, 1.5], np.float32), np.full(4, -1.0, np.float32), np.zeros(4, np.float32), zero=0.5
)

METHODS = [
    Row("magnitude", M(sparsity=0.7)),
    Row("magnitude-vector", M(sparsity=0.7), shape=(40,)),
    Row("magnitude-global", M(sparsity=0.7, scope="global")),
    Row("magnitude-none", M(sparsity=0.0)),
    Row("magnitude-all", M(sparsity=1.0)),
    Row("magnitude-2:4", M(pattern=jc.prune.NM(2, 4))),
    Row("magnitude-1:8", M(pattern=jc.prune.NM(1, 8), sparsity=0.875), shape=(2, 16, 3)),
    Row("magnitude-output", M(sparsity=0.7, scope="output")),
    Row("magnitude-columns", M(sparsity=0.5, pattern=jc.prune.Block((None, 1)))),
    Row("magnitude-blocks", M(sparsity=0.7, pattern=jc.prune.Block((4, 2))), shape=(3, 16, 8)),
    Row("magnitude-shared", M(pattern=jc.prune.Shared(jc.prune.NM(2, 4)))),
    Row("nonzero", jc.prune.Nonzero()),
    Row("nonzero-int8", jc.chain(jc.prune.Nonzero(), Int(bits=8))),
    Row("score", jc.prune.ByScore(sparsity=0.7, score=jc.prune.scores.squared)),
    Row("sampled", jc.prune.Sampled(sparsity=0.7)),
    Row("sampled-reweighted", jc.prune.Sampled(sparsity=0.7, reweight=True), adjusts=True),
    Row("wanda", jc.prune.Wanda(sparsity=0.7)),
    Row("wanda-2:4-convolution", jc.prune.Wanda(pattern=jc.prune.NM(2, 4)), shape=(3, 3, 4, 8)),
    Row("snip", jc.prune.SNIP(sparsity=0.7)),
    Row("taylor", jc.prune.Taylor(sparsity=0.7)),
    Row("fisher", jc.prune.Fisher(sparsity=0.7)),
    Row("obd", jc.prune.OBD(sparsity=0.7)),
    Row("obs", jc.prune.OBS(sparsity=0.7), exact=False, gathers=True, adjusts=True),
    Row("sparsegpt", jc.prune.SparseGPT(sparsity=0.7), exact=False, adjusts=True, gathers="inputs"),
    Row(
        "sparsegpt-2:4", jc.prune.SparseGPT(pattern=jc.prune.NM(2, 4), block_size=8), exact=False, adjusts=True,
        gathers="inputs",
    ),
    Row("random", jc.prune.Random(sparsity=0.7)),
    Row("random-2:4", jc.prune.Random(pattern=jc.prune.NM(2, 4))),
    Row("hard-concrete", jc.prune.HardConcrete(), exact=False),
    Row("hard-concrete-columns", jc.prune.HardConcrete(axes=(-2,), keep=0.5), exact=False),
    Row("variational-dropout", jc.prune.VariationalDropout()),
    Row("bayesian-compression", jc.prune.BayesianCompression(), exact=False),
    Row("bayesian-compression-filters", jc.prune.BayesianCompression(axes=(-4, -3, -2)), (3, 3, 4, 8), exact=False),
    Row("normal-jeffreys", jc.prune.NormalJeffreys()),
    Row("normal-jeffreys-filters", jc.prune.NormalJeffreys(axes=(-4, -3, -2)), (3, 3, 4, 8)),
    Row("information-bottleneck", jc.prune.InformationBottleneck()),
    Row("annealed-channels", jc.prune.AnnealedChannels(0.5, steps=10, at_least=2), exact=False),
    Row("stacked-hard-concrete", jc.stacked(jc.prune.HardConcrete(axes=(-2,))), shape=(3, 8, 4), exact=False),
    Row("stacked-bayesian", jc.stacked(jc.prune.BayesianCompression()), shape=(3, 8, 4), exact=False),
    Row("stacked-jeffreys", jc.stacked(jc.prune.NormalJeffreys()), shape=(3, 8, 4)),
    Row("stacked-annealed", jc.stacked(jc.prune.AnnealedChannels(0.5, 10, at_least=2)), (3, 8, 4), exact=False),
    Row("edge-popup", jc.prune.dynamic.EdgePopup(sparsity=0.7), stationary=False),
    Row("multi-prize", jc.prune.dynamic.EdgePopup(0.7, signs=True), exact=False, stationary=False),
    Row("edge-popup-global", jc.prune.dynamic.EdgePopup(0.7, scope="global"), stationary=False),
    Row("movement", jc.prune.dynamic.Movement(sparsity=0.7), stationary=False),
    Row("movement-soft", jc.prune.dynamic.Movement(threshold=-2.0), stationary=False),
    Row("piggyback", jc.prune.dynamic.Piggyback(), stationary=False),
    Row("soft-threshold", jc.prune.dynamic.STR(), exact=False),
    Row("stacked-popup", jc.stacked(jc.prune.dynamic.EdgePopup(0.5)), shape=(3, 8, 4), stationary=False),
    Row("int8", Int(bits=8)),
    Row("int8-tensor", Int(bits=8, axis=None)),
    Row("int5-vector", Int(bits=5), shape=(40,)),
    Row("int4-group", Int(bits=4, group_size=4)),
    Row("int4-group-padded", Int(bits=4, group_size=5, pad=True), gathers="inputs"),
    Row("int4-affine", Int(bits=4, symmetric=False)),
    Row("int3-group-affine", Int(bits=3, symmetric=False, group_size=8)),
    Row("int2-mse", Int(bits=2, clip="mse"), exact=False),
    Row("int3-affine-mse", Int(bits=3, clip="mse", symmetric=False), exact=False),
    Row("int1", Int(bits=1), sums=True),
    Row("int1-affine", Int(bits=1, symmetric=False)),
    Row("int8-convolution", Int(bits=8), shape=(3, 3, 4, 8)),
    Row("int4-power-of-two", Int(bits=4, power_of_two=True), stationary=False),
    Row("int4-percentile", Int(bits=4, clip=jc.quantize.ranges.Percentile(90.0))),
    Row("int4-kl", Int(bits=4, axis=None, clip=jc.quantize.ranges.KL(bins=128)), exact=False),
    Row("int4-aciq", Int(bits=4, symmetric=False, clip=jc.quantize.ranges.ACIQ())),
    Row("rate-distortion", jc.quantize.RateDistortion(0.1), exact=False, gathers=True),
    Row(
        "rate-distortion-columns", jc.quantize.RateDistortion(0.1, Int(bits=3), "grad_square"), exact=False,
        gathers=True,
    ),
    Row("dependent", jc.quantize.Dependent(0.1), exact=False, gathers=True, adjusts=True),
    Row("dependent-weighed", jc.quantize.Dependent(0.1, Int(bits=4), 4, "grad_square"), exact=False, gathers=True),
    Row("water-filling", jc.quantize.WaterFilling(0.3), exact=False, stationary=False, gathers="inputs", adjusts=True),
    Row(
        "water-filling-counts", jc.quantize.WaterFilling(0.3, weigh="counts"), exact=False, stationary=False,
        adjusts=True,
    ),
    Row(
        "water-filling-dependent", jc.quantize.WaterFilling(0.3, states=4), (3, 3, 4, 8), exact=False, stationary=False,
        gathers=True, adjusts=True,
    ),
    Row("magnitude-dependent", jc.chain(M(0.7), jc.quantize.Dependent(0.1)), exact=False, gathers=True, adjusts=True),
    Row("fixed-point", jc.quantize.FixedPoint(bits=6, fraction=3), stationary=False),
    Row("int12", Int(bits=12)),
    Row("int9-affine-group", Int(bits=9, symmetric=False, group_size=4)),
    Row("int8-block", Int(bits=8, block=(5, 3)), gathers="inputs"),
    Row("float8", jc.quantize.Float8("e4m3")),
    Row("float8-block", jc.quantize.Float8("e4m3", block=(4, 4)), shape=(3, 16, 8)),
    Row("float4", jc.quantize.Float4(group_size=8)),
    Row("mxfp8", jc.quantize.Microscaling("e4m3", group_size=8), stationary=False),
    Row("mxfp6", jc.quantize.Microscaling("e3m2", group_size=8), stationary=False),
    Row("nvfp4", jc.quantize.NVFP4(group_size=8), stationary=False),
    Row("s2fp8", jc.quantize.S2FP8(), exact=False),
    Row("nf4", jc.quantize.NF4(group_size=8)),
    Row("table", jc.quantize.Table((-1.0, 0.0, 0.5))),
    Row("powers-of-two", jc.quantize.PowersOfTwo(bits=3), stationary=False, adjusts=True),
    Row("powers-of-two-inq", jc.quantize.PowersOfTwo(bits=5, magnitudes=8), stationary=False, adjusts=True),
    Row("additive-powers-of-two", jc.quantize.AdditivePowersOfTwo(bits=4)),
    Row("stochastic-int4", jc.quantize.Stochastic(Int(bits=4))),
    Row("ternary", jc.quantize.Ternary(), sums=True),
    Row("abc-net", jc.quantize.ABCNet(bases=2), exact=False),
    Row("hqq", jc.quantize.HQQ(bits=3, group_size=8), exact=False),
    Row("gptq", jc.quantize.GPTQ(bits=4, group_size=4), exact=False, gathers="inputs"),
    Row("awq", jc.quantize.AWQ(Int(bits=4), points=3), exact=False, stationary=False, adjusts=True, gathers="inputs"),
    Row(
        "awq-clipped", jc.quantize.AWQ(Int(bits=3, group_size=4), points=2, clips=3), exact=False, stationary=False,
        adjusts=True, gathers="inputs",
    ),
    Row("rotation", jc.quantize.Rotation(Int(bits=2)), exact=False, adjusts=True, gathers="inputs"),
    Row("e8p", jc.quantize.E8P(), exact=False, sums=True, adjusts=True),
    Row("e8p-gram", jc.quantize.E8P(weigh="gram"), exact=False, adjusts=True, gathers=True),
    Row("trellis", jc.quantize.Trellis(memory=6, block=(16, 8)), exact=False, adjusts=True, gathers=True),
    Row(
        "trellis-gram", jc.quantize.Trellis(memory=6, block=(2, 8), weigh="gram"), (3, 3, 4, 8), exact=False,
        adjusts=True, gathers=True,
    ),
    Row("adaround", jc.quantize.AdaRound(bits=4, steps=5), exact=False, gathers="inputs"),
    Row("gpfq", jc.quantize.GPFQ(bits=4, stochastic=True), exact=False, adjusts=True, gathers="inputs"),
    Row("lqer", jc.quantize.LQER(rank=2, grid=Int(bits=2)), exact=False, stationary=False, gathers=True),
    Row("inq", jc.quantize.INQ(free=M(sparsity=0.5)), adjusts=True),
    Row("lab", jc.quantize.LAB(), exact=False),
    Row("bfloat16", Float("bfloat16")),
    Row("float16", Float("float16")),
    Row("lsq", T.LSQ(bits=4, start="deviation"), exact=False, stationary=False),
    Row("lsq-group", T.LSQ(bits=3, group_size=4, start="range"), stationary=False),
    Row("entropy-penalized", T.EntropyPenalized(), exact=False, stationary=False),
    Row("dsq", T.DSQ(bits=3), stationary=False),
    Row("dorefa", T.DoReFa(bits=3), exact=False, stationary=False),
    Row("binary-connect", T.BinaryConnect(), stationary=False, sums=True),
    Row("binary-connect-drawn", T.BinaryConnect(axis=None, learned=True, stochastic=True), stationary=False, sums=True),
    Row("ttq", T.TTQ(), exact=False, stationary=False),
    Row("stacked-ttq", jc.stacked(T.TTQ()), shape=(3, 8, 4), exact=False, stationary=False),
    Row("quant-noise", T.QuantNoise(Int(bits=4), rate=0.5), exact=False),
    Row("relaxed", T.Relaxed(bits=3, slack=0.5), exact=False),
    Row("svd", SVD(rank=3), exact=False, gathers=True, empty=False),
    Row("svd-convolution", SVD(rank=3), shape=(3, 3, 2, 8), exact=False, gathers=True, empty=False),
    Row("svd-energy", SVD(energy=0.9), jit=False, exact=False, gathers=True, empty=False),
    Row("svd-randomized", SVD(rank=3, randomized=True), exact=False, gathers=True, empty=False),
    Row("svd-share", SVD(rank=0.5), exact=False, gathers=True, empty=False),
    Row("whitened-svd", F.WhitenedSVD(rank=3), **FACTORS),
    Row("whitened-cp", F.Whitened(F.CP(rank=3, sweeps=5)), **FACTORS),
    Row("principal-components", F.PrincipalComponents(rank=3), **FACTORS, adjusts=True),
    Row("fisher-svd", F.FisherSVD(rank=3), **FACTORS),
    Row("nmf", F.NMF(rank=3, sweeps=5), exact=False, stationary=False, empty=False, adjusts=True),
    Row("tucker", F.Tucker(ranks=(4, 3)), **FACTORS),
    Row("tucker-energy", F.Tucker(energy=0.8), jit=False, **FACTORS),
    Row("svd-evbmf", SVD(rank="evbmf"), jit=False, **FACTORS),
    Row("tucker-convolution", F.Tucker(ranks=(2, 2, 3, 5), axes=None, sweeps=1), (3, 3, 4, 8), **FACTORS),
    Row("block-term", F.BlockTerm(terms=2, ranks=(2, 3)), (3, 3, 4, 8), **FACTORS),
    Row("cp", F.CP(rank=3, sweeps=5), **FACTORS),
    Row("cp-convolution", F.CP(rank=4, window="apart", sweeps=5), (3, 3, 4, 8), **FACTORS),
    Row("tensor-train", F.TensorTrain(rank=4), (3, 3, 4, 8), **FACTORS),
    Row("tensor-train-matrix", F.TensorTrain(rank=4, shape=((2, 8), (8, 1))), **FACTORS),
    Row("tensor-train-tolerance", F.TensorTrain(tolerance=0.3), jit=False, **FACTORS),
    Row("tensor-train-best-order", F.TensorTrain(rank=0.5, order="best"), (3, 3, 4, 8), jit=False, **FACTORS),
    Row("tensor-ring", F.TensorRing(rank=2, sweeps=3), (3, 3, 4, 8), **FACTORS),
    Row("kronecker", F.Kronecker(shape=(4, 2), terms=2), **FACTORS),
    Row("monarch", F.Monarch(blocks=4), **FACTORS),
    Row("separable", F.Separable(rank=5), (3, 3, 4, 8), **FACTORS),
    Row("ternary-svd", F.TernarySVD(tolerance=0.2), jit=False, **FACTORS, adjusts=True),
    Row("lcc", F.LCC(stages=1, block=1), jit=False, **FACTORS, adjusts=True),
    Row("tucker-int8", jc.chain(F.Tucker(ranks=(4, 3)), Int(bits=8)), **FACTORS),
    Row("residual-swept", jc.residual(SVD(rank=2), M(sparsity=0.9), sweeps=3), **FACTORS),
    Row("spectrum", jc.factorize.Spectrum(), exact=False),
    Row("spectrum-convolution", jc.factorize.Spectrum(), shape=(3, 3, 2, 8), exact=False),
    Row("kmeans", KMeans(clusters=4), exact=False),
    Row("kmeans-256", KMeans(clusters=256), exact=False),
    Row("kmeans-global", KMeans(clusters=5, scope="global"), exact=False),
    Row("kmeans-exact", KMeans(clusters=4, exact=True), jit=False, gathers=True),
    Row("kmeans-blocks", KMeans(clusters=4, block=(2, 2)), exact=False, sums=True),
    Row("kmeans-filters", KMeans(clusters=4, block=(4, 4, 1, 1)), (4, 4, 4, 8), exact=False, sums=True),
    Row("magnitude-kmeans-blocks", jc.chain(M(sparsity=0.5), KMeans(clusters=4, block=(1, 4))), exact=False, sums=True),
    Row("kmeans-blocks-int8", jc.chain(KMeans(4, block=(4, 1)), Int(bits=8)), exact=False, sums=True, stationary=False),
    Row("stacked-kmeans-blocks", jc.stacked(KMeans(4, block=(2, 2))), (3, 8, 4), exact=False, sums=True),
    Row("residual-kmeans", jc.residual(KMeans(4), KMeans(3)), exact=False, sums=True),
    Row("residual-blocks", jc.residual(KMeans(4, block=(2, 2)), KMeans(3, block=(4, 1))), exact=False, sums=True),
    Row(
        "residual-global", jc.residual(KMeans(4, "global", block=(2, 2)), KMeans(3, "global")), exact=False, sums=True,
    ),
    Row("stacked-residual-kmeans", jc.stacked(jc.residual(KMeans(3), KMeans(2))), (3, 8, 4), exact=False, sums=True),
    Row("outliers-blocks", jc.residual(M(0.9), KMeans(4), KMeans(3, block=(2, 2))), exact=False, sums=True),
    Row("kmeans-hessian", KMeans(clusters=4, weigh="hessian_diagonal"), exact=False, sums=True),
    Row(
        "kmeans-fisher-blocks", KMeans(clusters=4, block=(2, 2), weigh="grad_square", price=0.05), exact=False,
        sums=True,
    ),
    Row("kmeans-gram", KMeans(clusters=4, weigh="gram"), exact=False, sums=True, gathers=True, adjusts=True),
    Row(
        "kmeans-gram-filters", KMeans(clusters=4, block=(1, 1, 2, 2), weigh="gram", price=0.05), (3, 3, 4, 8),
        exact=False, sums=True, gathers=True, adjusts=True,
    ),
    Row(
        "soft-kmeans", jc.share.SoftKMeans(clusters=4, iterations=5), exact=False, stationary=False, gathers=True,
        adjusts=True,
    ),
    Row(
        "soft-kmeans-blocks", jc.share.SoftKMeans(4, (2, 2), "trained", iterations=5, steps=10), exact=False,
        stationary=False, gathers=True, adjusts=True,
    ),
    Row("by-mixture", jc.share.ByMixture(MIXTURE), exact=False, sums=True, adjusts=True),
    Row("predicted", F.Predicted(anchors=0.5, grid=(4, 4)), exact=False, gathers="inputs", adjusts=True, empty=False),
    Row("predicted-window", F.Predicted(4), (3, 3, 4, 8), exact=False, gathers="inputs", adjusts=True, empty=False),
    Row("templates", jc.share.Templates(count=1), exact=False),
    Row("tied-rows", jc.share.TiedRows(similarity=0.3), jit=False, exact=False, gathers=True),
    Row("hashed", jc.share.Hashed(ratio=0.3), exact=False, adjusts=True),
    Row("hashed-global", jc.share.Hashed(ratio=0.3, scope="global"), exact=False, adjusts=True),
    Row("hashed-vector", jc.share.Hashed(ratio=0.5, seed=7), shape=(40,), exact=False, adjusts=True),
    Row("hashed-int8", jc.chain(jc.share.Hashed(ratio=0.3), Int(bits=8)), exact=False, adjusts=True, stationary=False),
    Row("magnitude-hashed", jc.chain(M(sparsity=0.7), jc.share.Hashed(ratio=0.3)), exact=False, adjusts=True),
    Row(
        "hashed-frequencies", jc.share.HashedFrequencies(ratio=0.3), (3, 3, 4, 8), exact=False, adjusts=True,
        gathers="inputs",
    ),
    Row("stacked-hashed", jc.stacked(jc.share.Hashed(ratio=0.3)), shape=(3, 8, 4), exact=False, adjusts=True),
    Row("circulant", jc.share.Circulant(), exact=False),
    Row("circulant-blocks", jc.share.Circulant(block=4, seed=1), (3, 3, 4, 8), exact=False, adjusts=True),
    Row("toeplitz", jc.share.Toeplitz(rank=2, sweeps=0), **FACTORS),
    Row("fastfood", jc.share.Fastfood(sweeps=1), **FACTORS, adjusts=True),
    Row("acdc-convolution", jc.share.ACDC(sweeps=1), (3, 3, 4, 8), **FACTORS, adjusts=True),
    Row("magnitude-int4", jc.chain(M(sparsity=0.7), Int(bits=4))),
    Row("2:4-int4-group", jc.chain(M(pattern=jc.prune.NM(2, 4)), Int(bits=4, group_size=8))),
    Row(
        "magnitude-kmeans-bf16", jc.chain(M(sparsity=0.7), KMeans(clusters=4), Float()), exact=False, stationary=False
    ),
    Row("magnitude-bfloat16", jc.chain(M(sparsity=0.7), Float())),
    Row("global-kmeans", jc.chain(M(sparsity=0.7, scope="global"), KMeans(clusters=4, scope="global")), exact=False),
    Row("svd-int8", jc.chain(SVD(rank=3), Int(bits=8)), exact=False, stationary=False, gathers=True, empty=False),
    Row("int4-scales-bf16", jc.chain(Int(bits=4, group_size=4), Float()), stationary=False),
    Row("outliers-int4", jc.residual(M(sparsity=0.95), Int(bits=4)), exact=False),
    Row("int2-svd", jc.residual(Int(bits=2), SVD(rank=2)), **FACTORS),
    Row("svd-sparse", jc.residual(SVD(rank=2), M(sparsity=0.9)), **FACTORS),
    Row("stacked-magnitude", jc.stacked(M(sparsity=0.7)), shape=(3, 8, 4)),
    Row("stacked-global", jc.stacked(M(sparsity=0.7, scope="global")), shape=(3, 8, 4)),
    Row("stacked-int4", jc.stacked(Int(bits=4, axis=None)), shape=(3, 8, 4)),
    Row("stacked-svd", jc.stacked(SVD(rank=2)), shape=(3, 8, 4), exact=False, gathers=True, empty=False),
    Row("stacked-spectrum", jc.stacked(jc.factorize.Spectrum()), shape=(3, 8, 4), exact=False),
    Row("stacked-kmeans", jc.stacked(KMeans(clusters=3)), shape=(3, 8, 4), exact=False),
    Row("stacked-random", jc.stacked(jc.prune.Random(sparsity=0.5)), shape=(3, 8, 4)),
    Row("stacked-chain", jc.stacked(jc.chain(M(sparsity=0.5), KMeans(clusters=3))), shape=(3, 8, 4), exact=False),
]  # fmt: skip
