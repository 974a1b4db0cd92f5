"""Contractions of factors: bounds, planted ranks, other libraries, gradients, and the errors."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jcompress as jc

F = jc.factorize
RNG = np.random.default_rng(1)


def array(*shape):
    return jnp.asarray(RNG.normal(size=shape), jnp.float32)


def error(node, w):
    return float(jnp.linalg.norm((node.materialize() - w).ravel()) / jnp.linalg.norm(w.ravel()))


def tails(w, axes, rank):
    """The squared norm that the best matrix of a rank leaves, of the unfolding over some axes."""
    w = np.asarray(w, np.float64)
    rest = [i for i in range(w.ndim) if i not in axes]
    matrix = w.transpose(*axes, *rest).reshape(int(np.prod([w.shape[i] for i in axes])), -1)
    return float((np.linalg.svd(matrix, compute_uv=False)[rank:] ** 2).sum())


def test_tucker_lies_between_its_bounds_and_is_as_near_as_tensorly():
    from tensorly.decomposition import partial_tucker
    from tensorly.tenalg import multi_mode_dot

    w = array(3, 3, 12, 10)
    node = F.Tucker(ranks=(5, 4))(w)
    squared = (error(node, w) * float(jnp.linalg.norm(w.ravel()))) ** 2
    modes = [tails(w, [2], 5), tails(w, [3], 4)]
    assert max(modes) * 0.999 <= squared <= sum(modes) * 1.001
    for u in node.factors[1:]:
        np.testing.assert_allclose(u.T @ u, np.eye(u.shape[1]), atol=1e-5)
    (core, factors), _ = partial_tucker(np.asarray(w), rank=[5, 4], modes=[2, 3], tol=1e-8)
    theirs = np.linalg.norm(multi_mode_dot(core, factors, modes=[2, 3]) - w) / np.linalg.norm(w)
    assert error(node, w) <= theirs * 1.002


def test_the_train_keeps_its_bound_and_is_as_near_as_tensorly():
    import tensorly
    from tensorly.decomposition import tensor_train

    w = array(4, 5, 6, 7)
    node = F.TensorTrain(rank=6)(w)
    squared = (error(node, w) * float(jnp.linalg.norm(w.ravel()))) ** 2
    modes = [tails(w, [0], 4), tails(w, [0, 1], 6), tails(w, [0, 1, 2], 6)]
    assert max(modes) * 0.999 <= squared <= sum(modes) * 1.001
    theirs = tensorly.tt_to_tensor(tensor_train(np.asarray(w), [1, 4, 6, 6, 1]))
    np.testing.assert_allclose(error(node, w), np.linalg.norm(theirs - w) / np.linalg.norm(w), rtol=1e-3)
    assert error(F.TensorTrain(rank=1000)(w), w) < 1e-5


@pytest.mark.parametrize("tolerance", [0.5, 0.2, 0.05])
def test_a_train_of_a_tolerance_keeps_it(tolerance):
    low = F.TensorTrain(rank=3)(array(6, 7, 8)).materialize()
    w = low + 0.05 * float(jnp.std(low)) * array(6, 7, 8)
    for order in ((1, 0, 2), None):
        node = F.TensorTrain(tolerance=tolerance, order=order)(w)
        assert error(node, w) <= tolerance * 1.0001
    assert node.factors[0].shape[-1] <= 3 or tolerance < 0.1


@pytest.mark.parametrize(
    ("method", "shapes", "equation"),
    [
        (F.CP(rank=3, sweeps=500, tolerance=0.0), [(5, 3), (6, 3), (7, 3)], "ar,br,cr->abc"),
        (F.Tucker(ranks=(2, 3, 2), axes=None), [(2, 3, 2), (5, 2), (6, 3), (7, 2)], "rst,ar,bs,ct->abc"),
        (F.TensorTrain(rank=3), [(5, 3), (3, 6, 3), (3, 7)], "ar,rbs,sc->abc"),
        (F.TensorRing(rank=2, sweeps=200), [(2, 5, 2), (2, 6, 2), (2, 7, 2)], "par,rbs,scp->abc"),
        (F.BlockTerm(terms=1, ranks=(2, 3)), [(5, 2, 3), (6, 2), (7, 3)], "ars,br,cs->abc"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, jc.Method) else "",
)
def test_planted_factors_are_found(method, shapes, equation):
    rng = np.random.default_rng(0)
    w = jnp.einsum(equation, *(jnp.asarray(rng.normal(size=shape), jnp.float32) for shape in shapes))
    assert error(method(w), w) < 1e-3


def test_kronecker_is_the_nearest_by_the_rearranged_matrix():
    a, b = array(3, 4), array(5, 2)
    assert error(F.Kronecker(shape=(3, 4))(jnp.kron(a, b)), jnp.kron(a, b)) < 1e-5
    w = array(15, 8)
    blocks = np.asarray(w, np.float64).reshape(3, 5, 4, 2).transpose(0, 2, 1, 3).reshape(12, 10)
    tail = np.linalg.svd(blocks, compute_uv=False)[2:]
    found = error(F.Kronecker(shape=(3, 4), terms=2)(w), w) * float(jnp.linalg.norm(w))
    np.testing.assert_allclose(found**2, (tail**2).sum(), rtol=1e-4)


def test_monarch_is_two_block_diagonal_matrices_with_a_permutation():
    w = array(12, 6)
    node = F.Monarch(blocks=3)(w)
    first, second = (np.asarray(x) for x in node.factors)
    left, right = np.zeros((12, 9)), np.zeros((9, 6))
    for k in range(3):
        for j in range(3):
            left[k * 4 : k * 4 + 4, j * 3 + k] = first[k, j]
            right[j * 3 + k, j::3] = second[k, j]
    np.testing.assert_allclose(node.materialize(), left @ right, atol=1e-5)
    assert error(F.Monarch(blocks=3)(node.materialize()), node.materialize()) < 1e-5
    parts = np.asarray(w, np.float64).reshape(3, 4, 2, 3).transpose(0, 3, 1, 2)
    tail = np.linalg.svd(parts, compute_uv=False)[..., 1:]
    np.testing.assert_allclose((error(node, w) * np.linalg.norm(w)) ** 2, (tail**2).sum(), rtol=1e-4)


def test_a_separable_kernel_is_a_tall_and_then_a_wide_convolution():
    w, x = array(3, 5, 4, 6), array(2, 9, 9, 4)
    node = F.Separable(rank=8)(w)
    matrix = np.asarray(w, np.float64).transpose(0, 2, 1, 3).reshape(12, 30)
    tail = np.linalg.svd(matrix, compute_uv=False)[8:]
    np.testing.assert_allclose((error(node, w) * np.linalg.norm(w)) ** 2, (tail**2).sum(), rtol=1e-4)

    def convolved(x, kernel):
        return jax.lax.conv_general_dilated(x, kernel, (1, 1), "VALID", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    tall, wide = node.factors
    in_turn = convolved(convolved(x, tall[:, None]), wide[None])
    np.testing.assert_allclose(in_turn, convolved(x, node.materialize()), atol=1e-4)


def test_whitening_moves_the_outputs_least():
    x = array(200, 12) @ jnp.diag(jnp.logspace(-2, 1, 12)) @ array(12, 12)
    w, params = array(12, 10), None
    params = {"w": w}
    plan = jc.plan(params, [("w", F.WhitenedSVD(rank=4, damping=1e-9))])
    stats = jc.calibrate(lambda p, x: x @ p["w"], params, [x], plan=plan)
    node = jc.compress(params, plan, stats=stats)["w"]
    found = float(jnp.linalg.norm(x @ (node.materialize() - w)) ** 2)
    # The best of all matrices of rank 4: the outputs' own low rank, as far as float32 reaches.
    tail = np.linalg.svd(np.asarray(x, np.float64) @ np.asarray(w, np.float64), compute_uv=False)[4:]
    np.testing.assert_allclose(found, (tail**2).sum(), rtol=0.02)
    assert found < float(jnp.linalg.norm(x @ (F.SVD(rank=4)(w).materialize() - w)) ** 2)


def test_fisher_weights_are_those_of_the_rows():
    w, square = array(8, 6), jnp.abs(array(8, 6))
    node = F.FisherSVD(rank=2)(w, jc.Context(stats=jc.trace.Stats(grad_square=square)))
    rows = np.sqrt(np.asarray(square, np.float64).sum(1))[:, None]
    left = rows * (np.asarray(node.materialize(), np.float64) - np.asarray(w, np.float64))
    tail = np.linalg.svd(rows * np.asarray(w, np.float64), compute_uv=False)[2:]
    np.testing.assert_allclose((left**2).sum(), (tail**2).sum(), rtol=1e-3)


def test_factors_without_negative_numbers():
    w = jnp.abs(array(10, 3)) @ jnp.abs(array(3, 8))
    node = F.NMF(rank=3, semi=False, sweeps=2000)(w)
    assert (np.asarray(node.u) >= 0).all() and (np.asarray(node.v) >= 0).all()
    assert error(node, w) < 0.02
    errors = [error(F.NMF(rank=3, sweeps=n)(w - 1), w - 1) for n in (1, 5, 25, 125)]
    assert errors == sorted(errors, reverse=True)
    assert (np.asarray(F.NMF(rank=3)(w - 1).v) >= 0).all()
    with pytest.raises(ValueError, match="found weights down to"):
        F.NMF(rank=3, semi=False)(w - 10)


def test_ternary_vectors_and_their_scales():
    w = array(12, 16)
    errors = []
    for tolerance in (0.5, 0.2, 0.05):
        node = F.TernarySVD(tolerance=tolerance, rank=200)(w)
        left, s, right = (np.asarray(jc.core.dense(x), np.float64) for x in node.factors)
        assert set(np.unique(left)) | set(np.unique(right)) <= {-1, 0, 1}
        basis = np.stack([np.outer(a, b).ravel() for a, b in zip(left.T, right, strict=True)], 1)
        best = basis @ np.linalg.lstsq(basis, np.asarray(w, np.float64).ravel(), rcond=None)[0]
        fitted = np.asarray(node.materialize(), np.float64)
        np.testing.assert_allclose(np.linalg.norm(fitted - w), np.linalg.norm(best.reshape(w.shape) - w), rtol=1e-3)
        errors.append(error(node, w))
        assert (
            np.linalg.svd(np.asarray(w) - fitted, compute_uv=False)[0]
            < tolerance * np.linalg.svd(w, compute_uv=False)[0]
        )
    assert errors == sorted(errors, reverse=True)
    additions, products = F.additions(node)
    assert (additions, products) == (np.count_nonzero(left) + np.count_nonzero(right), s.size)
    assert node.nbits() == 2 * (left.size + right.size) + 32 * s.size + 16


@pytest.mark.parametrize(
    "method",
    [
        F.SVD(rank=0.4), F.NMF(rank=0.4), F.Tucker(ranks=0.4), F.Tucker(ranks=0.4, axes=None),
        F.CP(rank=0.4, sweeps=1), F.BlockTerm(terms=2, ranks=0.4), F.TensorTrain(rank=0.4),
        F.TensorRing(rank=0.4, sweeps=1), F.Separable(rank=0.4),
        F.Kronecker(shape=(4, 4), terms=0.4), F.TensorTrain(rank=0.4, shape=((4, 8), (4, 8))),
    ],
    ids=repr,
)  # fmt: skip
def test_a_share_is_met_from_below(method):
    w = array(3, 3, 32, 32)
    kept = jax.eval_shape(method, w).nbits() / (32 * w.size)
    assert 0.3 < kept <= 0.4


def test_project_never_takes_the_array_farther_away():
    w = array(3, 3, 8, 6)
    for method in (F.CP(rank=4, sweeps=1), F.TensorRing(rank=2, sweeps=0), F.Tucker(ranks=(3, 2)), F.Monarch(blocks=2)):
        node = method(array(3, 3, 8, 6))
        errors = [error(node, w)]
        for _ in range(4):
            node = node.project(w)
            errors.append(error(node, w))
        assert all(b <= a * 1.0001 for a, b in itertools.pairwise(errors)), method
        assert errors[-1] < 0.99 * errors[0]


def test_gradients_of_factors_are_those_of_the_array_by_the_chain_rule():
    w, target = array(4, 6, 5), array(4, 6, 5)
    node = F.TensorTrain(rank=3)(w)
    of_factors = jax.grad(lambda n: jnp.square(n.materialize() - target).sum())(node)
    of_array = 2 * (node.materialize() - target)
    a, b, c = node.factors
    np.testing.assert_allclose(
        of_factors.factors[0], jnp.einsum("abc,rbs,sc->ar", of_array, b, c), rtol=1e-4, atol=1e-4
    )
    np.testing.assert_allclose(
        of_factors.factors[1], jnp.einsum("abc,ar,sc->rbs", of_array, a, c), rtol=1e-4, atol=1e-4
    )


def test_sweeps_of_a_residual_never_make_it_larger():
    w = array(24, 16)
    low, sparse = F.SVD(rank=3), jc.prune.Magnitude(sparsity=0.9)
    errors = [error(jc.residual(low, sparse, sweeps=n)(w), w) for n in (1, 2, 5, 20)]
    assert errors == sorted(errors, reverse=True) and errors[-1] < 0.98 * errors[0]
    one = jax.jit(jc.residual(low, sparse, sweeps=5))(w)
    np.testing.assert_allclose(error(one, w), errors[2], rtol=1e-3)
    with pytest.raises(ValueError, match="sweeps=0"):
        jc.residual(low, sparse, sweeps=0)


def test_an_adapter_alone_trains_beside_a_frozen_base():
    w = array(16, 8)
    node = jc.residual(jc.chain(jc.quantize.Int(bits=4, power_of_two=True)), F.SVD(rank=2))(w)
    train, held = jc.split({"w": node})
    assert [x.shape for x in jax.tree.leaves(train)] == [(16, 2), (2, 8)]
    grads = jax.grad(lambda t: jnp.square(jc.materialize(jc.merge(t, held))["w"]).sum())(train)
    moved = jc.merge(jax.tree.map(lambda x, g: x - 0.1 * g, train, grads), held)["w"]
    np.testing.assert_array_equal(moved.terms[0].materialize(), node.terms[0].materialize())
    assert not np.array_equal(moved.terms[1].materialize(), node.terms[1].materialize())


def test_factors_go_through_the_whole_loop(tmp_path):
    """A plan over stacked layers and other layouts, sliced by scan, saved, loaded, quantized."""
    params = {"stack": array(3, 8, 12), "conv": array(8, 4, 3, 3)}
    layout = {"stack": jc.Layout(batch=0, inputs=1, outputs=2), "conv": jc.Layout(outputs=0, inputs=1, window=(2, 3))}
    rules = [
        ("stack", F.TensorTrain(rank=4, shape=((2, 4), (3, 4)))),
        ("conv", jc.chain(F.CP(rank=6), jc.quantize.Int(8))),
    ]
    tree = jc.compress(params, jc.plan(params, rules, layout=layout))
    jc.save(tmp_path / "x.jc", tree)
    loaded = jc.load(tmp_path / "x.jc")
    assert repr(loaded) == repr(tree)
    _, sliced = jax.lax.scan(lambda carry, layer: (carry, layer.materialize()), 0, loaded["stack"])
    np.testing.assert_allclose(sliced, tree["stack"].materialize(), atol=1e-6)
    alone = F.TensorTrain(rank=4, shape=((2, 4), (3, 4)))(params["stack"][1])
    np.testing.assert_allclose(sliced[1], alone.materialize(), atol=1e-4)
    assert tree["conv"].shape == (8, 4, 3, 3)


@pytest.mark.parametrize(
    ("method", "shape", "message"),
    [
        (F.Tucker(ranks=(20, 3)), (8, 6), r"w: Tucker found ranks \(20, 3\) for modes of lengths \[8, 6\]"),
        (F.TensorTrain(rank=2, shape=((2, 3), (2, 3))), (8, 6), r"w: TensorTrain found modes \(2, 3\) and "),
        (F.TensorRing(rank=2, shape=((2, 4), (6,))), (8, 6), "w: TensorRing found modes"),
        (F.Kronecker(shape=(3, 2)), (8, 6), r"w: Kronecker found shape=\(3, 2\)"),
        (F.Kronecker(shape=(2, 2), terms=9), (8, 6), "w: Kronecker found terms=9, expected at most 4"),
        (F.Monarch(blocks=4), (8, 6), "w: Monarch found blocks=4"),
        (F.Separable(rank=2), (8, 6), "w: Separable needs the kernel of a two-dimensional convolution"),
        (F.WhitenedSVD(rank=9), (3, 8, 6), "w: rank 9 is above the limit 6"),
        (F.CP(rank=2), (8,), "w: CP needs two axes"),
        (F.TensorTrain(rank=2, order=(0, 0)), (8, 6), "w: TensorTrain found order"),
    ],
    ids=lambda x: type(x).__name__ if isinstance(x, jc.Method) else "",
)  # fmt: skip
def test_what_does_not_fit_is_told_when_the_plan_is_made(method, shape, message):
    with pytest.raises(ValueError, match=message):
        jc.plan(
            {"w": jnp.ones(shape)},
            [("w", method)],
            layout={"w": jc.Layout()}
            if len(shape) == 2
            else {"w": jc.Layout(window=0, inputs=1, outputs=2)}
            if len(shape) == 3
            else None,
        )


@pytest.mark.parametrize("rank", [0, 1.5, -1, 1.0, True])
def test_a_rank_is_a_whole_number_or_a_share(rank):
    for make in (F.SVD, F.CP, F.TensorRing, F.Monarch, lambda r: F.Tucker(ranks=r)):
        with pytest.raises(ValueError, match="neither a whole number from 1 nor a share"):
            make(rank)


def run_beside(fn, method, w, x, layout=None):
    """What ``accelerate`` gives beside the function on the dense arrays, and how it made the product."""
    plan = jc.plan({"w": w}, [("w", method)], layout=layout and {"w": layout})
    tree = jc.compress({"w": w}, plan)
    fast = jc.accelerate(fn)
    np.testing.assert_allclose(fast(tree, x), fn(jc.materialize(tree), x), rtol=2e-4, atol=2e-4)
    return [row.how for row in fast.report(tree, x).rows]


CHAINS = [
    (F.Tucker(ranks=0.2), 3), (F.CP(rank=0.2, sweeps=2), 3), (F.CP(rank=6, window="apart", sweeps=2), 4),
    (F.TensorTrain(rank=5, order=(-2, 0, 1, -1)), 4), (F.Separable(rank=8), 2),
]  # fmt: skip


@pytest.mark.parametrize(("method", "links"), CHAINS, ids=lambda x: repr(x) if isinstance(x, jc.Method) else "")
def test_convolutions_run_as_chains_of_smaller_ones(method, links):
    def same(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=numbers)

    def strided(params, x):
        return jax.lax.conv_general_dilated(x, params["w"], (2, 1), [(1, 1), (0, 2)], rhs_dilation=(1, 2))

    (how,) = run_beside(same, method, array(3, 3, 16, 24), array(2, 9, 8, 16))
    assert how.startswith(f"a chain of {links}, ")
    layout = jc.Layout(outputs=0, inputs=1, window=(2, 3))
    (how,) = run_beside(strided, method, array(24, 16, 3, 3), array(2, 16, 9, 8), layout)
    assert how.startswith(f"a chain of {links}, ")


@pytest.mark.parametrize(
    "method",
    [F.Tucker(ranks=0.2), F.CP(rank=0.2, sweeps=2), F.Kronecker(shape=(4, 6)), F.Monarch(blocks=2)],
    ids=repr,
)
def test_products_are_contracted_into_the_network(method):
    w = array(32, 48)
    out_in, heads = jc.Layout(inputs=1, outputs=0), jc.Layout(inputs=0, outputs=(1, 2))
    found = [
        *run_beside(lambda p, x: x @ p["w"], method, w, array(7, 32)),
        *run_beside(lambda p, x: x @ p["w"].T, method, w.T, array(2, 5, 32), out_in),
        *run_beside(
            lambda p, x: jnp.einsum("bi,iho->bho", x, p["w"]), method, w.reshape(32, 6, 8), array(7, 32), heads
        ),
        *run_beside(lambda p, x: p["w"].T @ x, method, w, array(32, 7)),
    ]
    assert all("of the dense products" in how for how in found), found


def test_what_takes_more_than_the_dense_product_is_made_dense():
    wide = F.TensorTrain(rank=100, shape=((4, 8), (6, 8)))
    assert run_beside(lambda p, x: x @ p["w"], wide, array(32, 48), array(7, 32)) == [
        "dense: TensorNetwork is made dense"
    ]
    with_blocks = F.BlockTerm(terms=2, ranks=0.2)

    def convolved(params, x):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(x, params["w"], (1, 1), "SAME", dimension_numbers=numbers)

    (how,) = run_beside(convolved, with_blocks, array(3, 3, 16, 24), array(2, 9, 8, 16))
    assert how == "dense: TensorNetwork is made dense"


def test_networks_of_stacked_layers_run_inside_scan():
    w, x = array(3, 16, 16), array(4, 16)

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    layout = jc.Layout(batch=0, inputs=1, outputs=2)
    (how,) = run_beside(fn, F.Monarch(blocks=4), w / 4, x, layout)
    assert "of the dense products" in how


@pytest.mark.parametrize("method", [F.CP(rank=4), F.Tucker(ranks=(3, 3)), F.TensorTrain(rank=4)], ids=repr)
def test_sweeps_over_all_that_a_window_sees_move_the_outputs_less(method):
    x = jnp.cumsum(jnp.cumsum(array(6, 12, 12, 5), 1), 2) @ array(5, 5)  # neighbours are alike
    params = {"w": array(3, 3, 5, 7)}

    def fn(p, x):
        return jax.lax.conv_general_dilated(x, p["w"], (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))

    plan = jc.plan(params, [("w", F.Whitened(method))])
    stats = jc.calibrate(fn, params, [x], plan=plan)
    errors = []
    for sweeps in (0, 1, 4):
        plan = jc.plan(params, [("w", F.Whitened(method, sweeps=sweeps))])
        tree = jc.compress(params, plan, stats=stats)
        moved = fn(jc.materialize(tree), x) - fn(params, x)
        errors.append(float(jnp.linalg.norm(moved) / jnp.linalg.norm(fn(params, x))))
        assert jc.nbits(tree) == jc.nbits(jc.compress(params, jc.plan(params, [("w", method)])))
    assert errors[1] < 0.9 * errors[0] and errors[2] <= 1.001 * errors[1]
