"""Notebooks show nodes and plans in a few lines."""

import jax
import jax.numpy as jnp
import pytest

import jcompress as jc

treescope = pytest.importorskip("treescope")

METHODS = {
    "masked": jc.prune.Magnitude(sparsity=0.5),
    "quantized": jc.quantize.Int(bits=4, group_size=4, symmetric=False),
    "low_rank": jc.factorize.SVD(rank=2),
    "codebook": jc.share.KMeans(clusters=4),
    "cast": jc.quantize.Float("bfloat16"),
    "nest": jc.chain(jc.prune.Magnitude(sparsity=0.5), jc.share.KMeans(clusters=4), jc.quantize.Int(bits=8)),
    "sum": jc.residual(jc.prune.Magnitude(sparsity=0.9), jc.quantize.Int(bits=2)),
    "stacked": jc.stacked(jc.quantize.Int(bits=4)),
    "spectral": jc.factorize.Spectrum(),
    "rescaled": jc.quantize.AWQ(jc.quantize.Int(bits=4)),
    "squeezed": jc.quantize.S2FP8(),
    "rotated": jc.quantize.Rotation(jc.quantize.Int(bits=4)),
    "binarized": jc.quantize.training.BinaryConnect(),
    "fake_quantized": jc.quantize.training.LSQ(bits=4),
    "ternarized": jc.quantize.training.TTQ(),
    "annealed": jc.prune.AnnealedChannels(0.5, 10, at_least=2),
    "bottleneck": jc.prune.InformationBottleneck(),
    "gaussian": jc.prune.VariationalDropout(),
    "gates": jc.prune.HardConcrete(),
    "horseshoe": jc.prune.BayesianCompression(),
    "jeffreys": jc.prune.NormalJeffreys(),
    "scored": jc.prune.dynamic.EdgePopup(sparsity=0.5),
    "soft": jc.prune.dynamic.STR(),
    "network": jc.factorize.Monarch(blocks=4),
    "hashed": jc.share.Hashed(ratio=0.5),
    "fast_product": jc.share.ACDC(),
    "shift_add": jc.factorize.LCC(),
    "coded": jc.quantize.E8P(),
    "dependent": jc.quantize.Dependent(),
    "soft_codebook": jc.share.SoftKMeans(clusters=4, iterations=2),
    "mixed": jc.share.Templates(count=1),
    "latent": jc.quantize.training.EntropyPenalized(),
    "arranged": jc.factorize.SVD(rank=2),
}


def _compressed():
    params = {name: jax.random.normal(jax.random.key(0), (3, 16, 8)) for name in METHODS}
    params |= {"dense": jnp.ones((2, 2)), "none": None, "complex": jnp.ones((4, 4), jnp.complex64)}
    plan = jc.plan(
        params,
        [*METHODS.items(), ("complex", jc.cartesian(jc.quantize.Int(bits=8)))],
        layout={"arranged": jc.Layout(inputs=-1, outputs=-2)},
    )
    stats = {"rescaled": jc.trace.Stats(gram=jnp.stack([jnp.diag(jnp.arange(1.0, 17.0))] * 3), axes=(-2,))}
    tree = jc.compress(params, plan, key=jax.random.key(1), stats=stats)
    return {**tree, "packed": jc.pack(tree["stacked"]), "tied": jc.formats.Reference("dense")}, plan


def test_a_tree_shows_its_nodes_and_their_static_fields():
    tree, _ = _compressed()
    shown = treescope.render_to_text(tree)
    for node in jax.tree.leaves(tree, is_leaf=jc.core.is_node):
        assert f"{type(node).__name__}(" in shown or not jc.core.is_node(node)
    assert "bits=4" in shown
    assert "group_size=4" in shown
    assert "clusters=4" in shown


def test_a_tree_shows_no_array_entry_by_entry():
    w = jax.random.normal(jax.random.key(0), (200, 100))
    node = jc.chain(jc.prune.Magnitude(sparsity=0.5), jc.quantize.Int(bits=4))(w)
    assert len(treescope.render_to_text(node)) < 1_500


def test_a_tree_has_html():
    tree, _ = _compressed()
    shown = treescope.render_to_html(tree)
    assert "treescope" in shown


def test_the_halves_of_a_split_can_be_shown():
    tree, _ = _compressed()
    train, held = jc.split(tree)
    assert "codes=None" in treescope.render_to_text(train)
    assert "scale=None" in treescope.render_to_text(held)


def test_a_plan_can_be_shown():
    _, plan = _compressed()
    assert "leaves compressed" in treescope.render_to_text(plan)
    assert "Magnitude" in treescope.render_to_text(dict(plan))


@pytest.mark.parametrize("name", METHODS)
def test_repr_of_a_node_is_short(name):
    tree, _ = _compressed()
    assert len(repr(tree[name])) < 240
    assert "\n" not in repr(tree[name])


def test_repr_of_a_plan_and_its_methods_is_short():
    _, plan = _compressed()
    assert len(repr(plan)) < 60
    assert all(len(repr(method)) < 120 and "\n" not in repr(method) for method in plan.values())
