"""Similarity, fusion and removal of layers; the measures against scipy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.linalg

import jcompress as jc


def block(p, x):
    return x + jnp.tanh(x @ p["up"] + p["bias"]) @ p["down"]


def stack(rng, n, width=4):
    shapes = {"up": (n, width, 6), "bias": (n, 6), "down": (n, 6, width)}
    return {name: jnp.asarray(rng.normal(size=shape), jnp.float32) for name, shape in shapes.items()}


def run(layers, x):
    return jax.lax.scan(lambda x, p: (block(p, x), x), x, layers)


def as_list(layers):
    return [jax.tree.map(lambda v, i=i: v[i], layers) for i in range(len(layers["up"]))]


def test_cka_is_one_after_an_orthogonal_map_and_a_scale(rng):
    x = rng.normal(size=(30, 5))
    turned = x @ np.linalg.qr(rng.normal(size=(5, 5)))[0] * 7 + 3
    assert float(jc.measure.linear_cka(jnp.asarray(x), jnp.asarray(turned))) == pytest.approx(1, abs=1e-5)
    stretched = x @ np.diag([1, 1, 1, 1, 30])
    assert float(jc.measure.linear_cka(jnp.asarray(x), jnp.asarray(stretched))) < 0.9


@pytest.mark.parametrize("widths", [(5, 3), (40, 3), (40, 50)])
def test_cka_is_the_ratio_of_centered_kernels(rng, widths):
    x, y = (rng.normal(size=(20, n)) + rng.normal(size=n) for n in widths)
    center = np.eye(20) - 1 / 20
    k, m = (center @ v @ v.T @ center for v in (x, y))
    expected = np.trace(k @ m) / np.sqrt(np.trace(k @ k) * np.trace(m @ m))
    for scale in (1, 1e15):
        found = jc.measure.linear_cka(jnp.asarray(x * scale, jnp.float32), jnp.asarray(y, jnp.float32))
        assert float(found) == pytest.approx(expected, rel=1e-4)
    assert float(jc.measure.linear_cka(jnp.ones((20, 3)), jnp.asarray(y))) == 0


def test_wasserstein_is_the_closed_form_for_gaussians(rng):
    x, y = rng.normal(size=(50, 4)) @ rng.normal(size=(4, 4)), rng.normal(size=(30, 4)) + 1
    cx, cy = (np.cov(v.T, bias=True) for v in (x, y))
    root = scipy.linalg.sqrtm(cx)
    expected = np.square(x.mean(0) - y.mean(0)).sum() + np.trace(
        cx + cy - 2 * scipy.linalg.sqrtm(root @ cy @ root).real
    )
    found = jc.measure.gaussian_wasserstein(jnp.asarray(x, jnp.float32), jnp.asarray(y, jnp.float32))
    assert float(found) == pytest.approx(expected, rel=1e-3)
    few = jnp.asarray(rng.normal(size=(3, 8)), jnp.float32)
    assert float(jc.measure.gaussian_wasserstein(few, few)) == pytest.approx(0, abs=1e-5)


def test_measures_refuse_what_does_not_match():
    with pytest.raises(ValueError, match="3 and 4 examples"):
        jc.measure.linear_cka(jnp.ones((3, 2)), jnp.ones((4, 2)))
    with pytest.raises(ValueError, match=r"\(3, 2\) and \(3, 5\)"):
        jc.measure.gaussian_wasserstein(jnp.ones((3, 2)), jnp.ones((3, 5)))


def test_similarities_of_weights_are_cosines(rng):
    layers = stack(rng, 4)
    flat = np.concatenate([np.asarray(x).reshape(4, -1) for x in layers.values()], axis=1)
    flat /= np.linalg.norm(flat, axis=1, keepdims=True)
    np.testing.assert_allclose(jc.measure.layer_similarity(layers), flat @ flat.T, atol=1e-5)
    np.testing.assert_allclose(jc.measure.layer_similarity(as_list(layers)), flat @ flat.T, atol=1e-5)


@pytest.mark.parametrize("mode", ["average", "freeze", "mix"])
def test_equal_blocks_fuse_with_no_change_but_the_depth(rng, mode):
    one = jax.tree.map(lambda x: x[0], stack(rng, 1))
    layers = jax.tree.map(lambda x: jnp.stack([x] * 5), one)
    x = jnp.asarray(rng.normal(size=(3, 4)), jnp.float32)
    fused, sources = jc.rewrite.fuse_layers(layers, 2, mode, key=jax.random.key(0))
    assert sorted(i for s in sources for i in s) == list(range(5))
    expected = x
    for _ in range(3):
        expected = block(one, expected)
    np.testing.assert_allclose(run(fused, x)[0], expected, atol=1e-5)


def test_the_planted_pair_is_fused_and_lists_stay_lists(rng):
    layers = stack(rng, 6)
    layers = jax.tree.map(lambda x: x.at[3].set(x[2] + 0.01 * x[0]), layers)
    shorter, sources = jc.rewrite.fuse_layers(layers, 1)
    assert sources == [(0,), (1,), (2, 3), (4,), (5,)]
    expected = jax.tree.map(lambda x: (x[2] + x[3]) / 2, layers)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[2], b, atol=1e-6), shorter, expected)
    listed, again = jc.rewrite.fuse_layers(as_list(layers), 1)
    assert again == sources
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), listed[2], expected)
    assert isinstance(listed, list)
    frozen, _ = jc.rewrite.fuse_layers(layers, 1, "freeze")
    jax.tree.map(lambda a, b: np.testing.assert_array_equal(a[2], b[2]), frozen, layers)


def test_an_average_counts_each_of_its_layers_once():
    layers = [{"w": jnp.array([x, 1.0])} for x in (0.0, 3.0, 9.0)]
    fused, sources = jc.rewrite.fuse_layers(layers, 2)
    assert sources == [(0, 1, 2)]
    np.testing.assert_allclose(fused[0]["w"], [4.0, 1.0], rtol=1e-6)


def test_a_mix_takes_each_number_from_one_of_the_two():
    layers = {"w": jnp.stack([jnp.ones(1000), 2 * jnp.ones(1000)])}
    mixed = jc.rewrite.fuse_layers(layers, 1, "mix", key=jax.random.key(3))[0]["w"][0]
    assert set(mixed.tolist()) == {1.0, 2.0}
    assert 400 < int((mixed == 1).sum()) < 600


def test_a_matrix_of_similarities_decides_and_far_layers_may_fuse():
    layers = [{"w": jnp.array([float(i)])} for i in range(4)]
    alike = np.array([[1, 0.1, 0.9, 0.2], [0.1, 1, 0.3, 0.4], [0.9, 0.3, 1, 0.5], [0.2, 0.4, 0.5, 1]])
    assert jc.rewrite.fuse_layers(layers, 1, similarity=alike)[1] == [(0,), (1,), (2, 3)]
    assert jc.rewrite.fuse_layers(layers, 1, similarity=alike, adjacent=False)[1] == [(0, 2), (1,), (3,)]
    # Then 1 meets 3 at 0.4 and the pair (0, 2) at (0.1 + 0.3) / 2.
    assert jc.rewrite.fuse_layers(layers, 2, similarity=alike, adjacent=False)[1] == [(0, 2), (1, 3)]


def test_a_layer_that_does_nothing_has_no_influence_and_its_removal_is_exact(rng):
    layers = stack(rng, 5)
    layers["down"] = layers["down"].at[jnp.array([1, 3])].set(0)
    x = jnp.asarray(rng.normal(size=(7, 4)), jnp.float32)
    out, before = run(layers, x)
    influence = jax.jit(jc.measure.block_influence)(jnp.concatenate([before, out[None]]))
    np.testing.assert_allclose(influence[jnp.array([1, 3])], 0, atol=1e-6)
    shorter, kept = jc.rewrite.remove_layers(layers, influence, 2)
    assert kept == [0, 2, 4]
    np.testing.assert_allclose(run(shorter, x)[0], out, atol=1e-5)


def test_errors_name_what_is_wrong(rng):
    layers = stack(rng, 3)
    with pytest.raises(ValueError, match="count=3 of 3 layers"):
        jc.rewrite.fuse_layers(layers, 3)
    with pytest.raises(ValueError, match="count=-1 of 3 layers"):
        jc.rewrite.remove_layers(layers, [1, 2, 3], -1)
    with pytest.raises(ValueError, match="pass key"):
        jc.rewrite.fuse_layers(layers, 1, "mix")
    with pytest.raises(ValueError, match="'glue' is unknown"):
        jc.rewrite.fuse_layers(layers, 1, "glue")
    with pytest.raises(ValueError, match="layer 1 has the form"):
        jc.rewrite.fuse_layers([{"w": jnp.ones(2)}, {"w": jnp.ones(3)}], 1)
    with pytest.raises(ValueError, match=r"shape \(2, 2\), expected \(3, 3\)"):
        jc.rewrite.fuse_layers(layers, 1, similarity=np.eye(2))
    with pytest.raises(ValueError, match=r"shape \(2,\)"):
        jc.rewrite.remove_layers(layers, [1, 2], 1)
    with pytest.raises(ValueError, match="first axes"):
        jc.measure.layer_similarity({"a": jnp.ones((2, 3)), "b": jnp.ones((4, 3))})
