"""New methods from old ones."""

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

M, Int, SVD, KMeans = jc.prune.Magnitude, jc.quantize.Int, jc.factorize.SVD, jc.share.KMeans


def matrix(shape=(32, 16), seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def test_chain_nests_in_order():
    node = jc.chain(M(sparsity=0.75), KMeans(4), jc.quantize.Float("float16"))(matrix())
    assert isinstance(node, jc.formats.Masked)
    assert isinstance(node.values, jc.formats.Codebook)
    assert isinstance(node.values.codebook, jc.formats.Cast)
    factors = jc.chain(SVD(rank=2), Int(bits=8))(matrix())
    assert isinstance(factors.u, jc.formats.Quantized) and isinstance(factors.v, jc.formats.Quantized)


def test_a_mask_around_codes_stores_kept_codes_only():
    w = matrix()
    node = jc.chain(M(sparsity=0.75), Int(bits=4))(w)
    kept, index = 128, node.nbits() - 4 * 128 - 32 * 16
    assert index <= w.size
    assert node.nbits() < Int(bits=4)(w).nbits()
    assert int(node.mask.sum()) == kept


def test_an_n_of_m_mask_stores_positions_in_the_group():
    node = M(pattern=jc.prune.NM(2, 4))(matrix())
    assert node.nbits() == 256 * 32 + 128 * 3  # 6 subsets of 4 in 3 bits


def test_a_row_mask_stores_a_bit_a_row():
    mask = jnp.arange(32)[:, None] % 2 == 0
    for shape in ((32, 1), (32, 16)):
        node = jc.formats.Masked(matrix(), jnp.broadcast_to(mask, shape))
        assert node.nbits() <= 16 * 16 * 32 + 32
    assert jc.formats.Masked(matrix(), jnp.ones((32, 16), bool)).nbits() <= 32 * 512 + 1


def test_sparse_masks_cost_less_than_a_bit_an_entry():
    node = M(sparsity=0.98)(matrix((200, 100)))
    assert node.nbits() - 400 * 32 < 20_000 / 4


def test_chain_of_one_is_the_method_and_none_is_refused():
    method = M(sparsity=0.5)
    assert jc.chain(method) is method
    with pytest.raises(ValueError, match="at least one method"):
        jc.chain()
    with pytest.raises(ValueError, match="at least two methods"):
        jc.residual(method)


def test_errors_inside_a_chain_name_the_field():
    params = {"kernel": matrix()}
    plan = jc.plan(params, [("kernel", jc.chain(SVD(rank=3), Int(bits=8, group_size=5)))])
    with pytest.raises(ValueError, match=r"kernel/u: group_size 5 does not divide axis -2 of length 32"):
        jc.compress(params, plan)


def test_residual_keeps_outliers_apart():
    w = matrix().at[3, 5].set(50.0)
    plain = Int(bits=3)(w)
    node = jc.residual(M(sparsity=1 - 1 / w.size), Int(bits=3))(w)
    error = lambda n, at: float(((n.materialize() - w)[:, at] ** 2).sum())  # noqa: E731
    columns = slice(5, 6)
    assert error(node, columns) < error(plain, columns) / 10
    assert node.nbits() - plain.nbits() <= 32 + 16


def test_residual_low_rank_correction_takes_the_leading_part_of_the_error():
    w = matrix()
    coarse = Int(bits=2)(w)
    node = jc.residual(Int(bits=2), SVD(rank=3))(w)
    tail = np.linalg.svd(np.asarray(w - coarse.materialize(), np.float64), compute_uv=False)[3:]
    np.testing.assert_allclose(float(((node.materialize() - w) ** 2).sum()), (tail**2).sum(), rtol=1e-4)


def test_planted_low_rank_plus_sparse():
    low = matrix((40, 2)) @ matrix((2, 30), 1)
    sparse = jnp.zeros((40, 30)).at[jnp.arange(10), jnp.arange(10)].set(100.0)
    node = jc.residual(M(sparsity=1 - 10 / 1200), SVD(rank=3))(low + sparse)
    assert bool((node.terms[0].mask == (sparse != 0)).all())


def test_a_sum_projects_exactly_around_a_mask():
    node = jc.residual(M(sparsity=0.9), Int(bits=3))(matrix())
    target = matrix(seed=2)
    projected = node.project(target)
    outside = ~node.terms[0].mask
    want = node.terms[1].project(target, outside)
    np.testing.assert_allclose(projected.terms[1].scale, want.scale, rtol=1e-6)
    np.testing.assert_allclose(projected.materialize()[node.terms[0].mask], target[node.terms[0].mask], rtol=1e-5)


def test_stacked_scales_and_codebooks_are_per_layer():
    w = jnp.stack([matrix(), 100 * matrix(seed=1)])
    for method in (Int(bits=4, axis=None), KMeans(4), jc.chain(M(sparsity=0.5), Int(bits=4))):
        node = jc.stacked(method)(w)
        for i in range(2):
            layer = jax.tree.map(lambda x: x[i], node)  # noqa: B023
            np.testing.assert_allclose(layer.materialize(), method(w[i]).materialize(), rtol=1e-4, atol=1e-5)


def test_stacked_methods_that_decide_together_do_so_layer_by_layer():
    params = {"a": jnp.stack([jnp.ones(10), jnp.full(10, 5.0)]), "b": jnp.stack([jnp.full(10, 2.0), jnp.full(10, 3.0)])}
    plan = jc.plan(params, [(".*", jc.stacked(M(sparsity=0.5, scope="global")))])
    small = jc.compress(params, plan)
    assert small["a"].mask.sum(1).tolist() == [0, 10]
    assert small["b"].mask.sum(1).tolist() == [10, 0]
    uneven = {"a": jnp.ones((2, 4)), "b": jnp.ones((3, 4))}
    with pytest.raises(ValueError, match=r"same number of layers, found \[2, 3\]"):
        jc.compress(uneven, jc.plan(uneven, [(".*", jc.stacked(M(sparsity=0.5, scope="global")))]))


def test_stacked_needs_layers():
    with pytest.raises(ValueError, match="scale: stacked needs a leading axis of layers"):
        jc.plan({"scale": jnp.ones(())}, [("scale", jc.stacked(M(sparsity=0.5)))])
    with pytest.raises(ValueError, match="w: rank 5 is above the limit 4"):
        jc.plan({"w": jnp.ones((3, 8, 4))}, [("w", jc.stacked(SVD(rank=5)))])


def test_methods_print_as_they_are_written():
    assert repr(jc.chain(M(sparsity=0.9), Int(bits=4))) == "chain(Magnitude(sparsity=0.9), Int(bits=4))"
    assert repr(jc.residual(SVD(rank=2), M(sparsity=0.5))) == "residual(SVD(rank=2), Magnitude(sparsity=0.5))"
    assert repr(jc.stacked(KMeans(8))) == "stacked(KMeans(clusters=8))"
    assert repr(M(sparsity=lambda step: 0.5, pattern=None)) == "Magnitude(sparsity=<schedule>)"


@dataclasses.dataclass(frozen=True)
class Remembering(jc.Method):
    """Rounds, and keeps what it was told of the last time."""

    bits: int
    seen: ClassVar[list] = []

    def __call__(self, w, context):
        self.seen.append(context.previous)
        return jc.quantize.Int(bits=self.bits)(w)


def test_each_term_of_a_residual_is_told_of_its_own_last_node(rng):
    params = {"w": jnp.asarray(rng.normal(size=(4, 4)), jnp.float32)}
    plan = jc.plan(params, [("w", jc.residual(Remembering(4), Remembering(8)))])
    first = jc.compress(params, plan)
    Remembering.seen.clear()
    jc.compress(params, plan, previous=first)
    assert [x.bits for x in Remembering.seen] == [4, 8]


def test_statistics_of_another_number_of_layers_are_refused_by_name(rng):
    params = {"w": jnp.asarray(rng.normal(size=(3, 3, 4, 8)), jnp.float32)}
    gram = {"w": jc.trace.Stats(gram=jnp.eye(36), axes=(-4, -3, -2))}
    plan = jc.plan(params, [("w", jc.stacked(jc.quantize.LQER(rank=2)))])
    with pytest.raises(ValueError, match=r"w: its leading axis is taken for 3 stacked layers, and stats .*\(36, 36\)"):
        jc.compress(params, plan, stats=gram)
    params, gram = {"w": jnp.ones(8)}, {"w": jc.trace.Stats(gram=jnp.ones((8, 1, 1)), axes=(-1,))}
    plan = jc.plan(params, [("w", jc.stacked(jc.quantize.WaterFilling()))])
    with pytest.raises(ValueError, match="w: found a single number, which meets no inputs"):
        jc.compress(params, plan, stats=gram)
