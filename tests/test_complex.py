"""Complex parameters: what has a meaning for them, through all verbs; the rest is refused by path."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jcompress as jc
from jcompress import core

KEY = jax.random.key(3)
M, Int, SVD = jc.prune.Magnitude, jc.quantize.Int, jc.factorize.SVD

METHODS = {
    "magnitude": M(sparsity=0.7),
    "magnitude-global": M(sparsity=0.7, scope="global"),
    "magnitude-output": M(sparsity=0.75, scope="output"),
    "magnitude-2:4": M(pattern=jc.prune.NM(2, 4)),
    "magnitude-blocks": M(sparsity=0.5, pattern=jc.prune.Block((4, 2))),
    "nonzero": jc.prune.Nonzero(),
    "random": jc.prune.Random(sparsity=0.7),
    "svd": SVD(rank=3),
    "svd-randomized": SVD(rank=3, randomized=True),
    "low-rank-sparse": jc.residual(SVD(rank=2), M(sparsity=0.8), sweeps=2),
    "stacked-magnitude": jc.stacked(M(sparsity=0.5)),
    "int8": jc.cartesian(Int(bits=8)),
    "int12-block": jc.cartesian(Int(bits=12, block=(5, 3))),
    "bfloat16": jc.cartesian(jc.quantize.Float("bfloat16")),
    "kmeans-global": jc.cartesian(jc.share.KMeans(clusters=4, scope="global")),
    "gptq": jc.cartesian(jc.quantize.GPTQ(bits=4)),
    "sparse-int8": jc.chain(M(sparsity=0.7), jc.cartesian(Int(bits=8))),
    "svd-int8": jc.chain(SVD(rank=3), jc.cartesian(Int(bits=8))),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)


def array(shape, seed=0):
    rng = np.random.default_rng(seed)
    return jnp.asarray(rng.normal(size=shape) + 1j * rng.normal(size=shape), jnp.complex64)


PARAMS, X = {"layer": {"kernel": array((16, 8))}, "bias": jnp.ones(8)}, array((32, 16), seed=1)


def apply(params, x):
    return x @ params["layer"]["kernel"] + params["bias"]


def known(method):
    gram = {"layer/kernel": jc.trace.Stats(gram=X.conj().T @ X, axes=(-2,))}
    return {"key": KEY, "stats": gram if "stats.gram" in core.needs(method) else None}


def plan_of(method):
    return jc.plan(PARAMS, [(".*/kernel", method)])


def error_of(report):
    return next(row.relative_error for row in report.rows if row.path == "layer/kernel")


@every_method
def test_all_verbs(method, tmp_path):
    w, plan = PARAMS["layer"]["kernel"], plan_of(method)
    tree = jc.compress(PARAMS, plan, **known(method))
    dense = jc.materialize(tree)["layer"]["kernel"]
    assert (dense.shape, dense.dtype) == (w.shape, w.dtype)
    jitted = jax.jit(lambda p: jc.compress(p, plan, **known(method)))(PARAMS)
    np.testing.assert_allclose(jc.materialize(jitted)["layer"]["kernel"], dense, atol=1e-5)
    jc.save(tmp_path / "x", tree)
    assert jc.io.inspect(tmp_path / "x")["payload_bytes"] == -(-jc.nbits(tree) // 8)
    for again in (jc.load(tmp_path / "x"), jc.load(tmp_path / "x", like=PARAMS)):
        np.testing.assert_array_equal(jc.materialize(again)["layer"]["kernel"], dense)
    error = np.linalg.norm(dense - w) / np.linalg.norm(w)
    assert abs(error_of(jc.report(PARAMS, tree)) - error) < 1e-5
    fast = jc.accelerate(apply)
    np.testing.assert_allclose(fast(tree, X), apply(jc.materialize(tree), X), atol=1e-4)
    simulated = jax.grad(lambda p: jnp.abs(apply(jc.simulate(p, plan, **known(method)), X)).sum())(PARAMS)
    assert float(jnp.abs(simulated["layer"]["kernel"]).min()) > 0  # straight through what is compressed


@pytest.mark.parametrize("method", [METHODS[name] for name in ("magnitude-blocks", "svd", "sparse-int8")], ids=repr)
def test_training_stays_on_the_set(method):
    tx = optax.chain(optax.sgd(0.01), jc.project(plan_of(method), **known(method)))
    params, state = PARAMS, tx.init(PARAMS)
    for _ in range(3):
        grads = jax.tree.map(jnp.conj, jax.grad(lambda p: jnp.abs(apply(p, X) - 1).sum())(params))
        updates, state = tx.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    node = jc.nodes(params, state)["layer"]["kernel"]
    np.testing.assert_allclose(node.materialize(), params["layer"]["kernel"], atol=1e-4)


def test_against_formulas():
    w = PARAMS["layer"]["kernel"]
    size = np.abs(w)
    np.testing.assert_array_equal(M(sparsity=0.75)(w).mask, size >= np.sort(size.ravel())[-32])
    groups = np.sort(size.reshape(4, 4, 8), axis=1)
    np.testing.assert_array_equal(M(pattern=jc.prune.NM(2, 4))(w).mask, size >= groups[:, 2].repeat(4, 0))
    u, s, v = np.linalg.svd(np.asarray(w), full_matrices=False)
    for method in (SVD(rank=3), SVD(rank=3, randomized=True), SVD(energy=float((s[:3] ** 2).sum() / (s**2).sum()))):
        found = method(w, jc.Context(key=KEY))
        np.testing.assert_allclose(found.materialize(), (u[:, :3] * s[:3]) @ v[:3], atol=1e-4)
    node = jc.cartesian(Int(bits=4))(w)
    np.testing.assert_array_equal(node.materialize().real, Int(bits=4)(w.real).materialize())
    np.testing.assert_array_equal(node.materialize().imag, Int(bits=4)(w.imag).materialize())
    assert node.nbits() == 2 * Int(bits=4)(w.real).nbits()


def test_the_inputs_of_complex_layers_decide_the_rounding():
    params = {"layer": {"kernel": array((24, 6))}, "bias": jnp.ones(6)}
    x = array((40, 24), seed=2) @ array((24, 24), seed=3).real  # inputs that go together have one phase
    gram = x.conj().T @ x

    def error(method):
        plan = jc.plan(params, [(".*/kernel", method)])
        stats = {"layer/kernel": jc.trace.Stats(gram=gram, axes=(-2,))}
        tree = jc.materialize(jc.compress(params, plan, stats=stats))
        return np.linalg.norm(apply(tree, x) - apply(params, x))

    assert error(jc.cartesian(jc.quantize.GPTQ(bits=3))) < 0.7 * error(jc.cartesian(Int(bits=3)))


@pytest.mark.parametrize(
    "method",
    [
        Int(bits=8), jc.quantize.Float8(), jc.prune.Wanda(0.5), jc.prune.Taylor(0.5), jc.share.KMeans(4),
        jc.quantize.Float("bfloat16"), jc.residual(M(sparsity=0.9), Int(bits=4)), jc.stacked(Int(bits=8)),
        jc.quantize.training.LSQ(), jc.prune.HardConcrete(), jc.prune.ByScore(0.5, score=jc.prune.scores.squared),
    ],
    ids=repr,
)  # fmt: skip
def test_what_knows_real_arrays_only_is_refused_by_path(method):
    with pytest.raises(ValueError, match=r"layer/kernel: found dtype complex64, and .* use jc.cartesian\("):
        plan_of(method)


def test_refusals_that_are_seen_later():
    with pytest.raises(ValueError, match=r"layer/kernel/u: found dtype complex64, and Int\(bits=8\)"):
        jc.compress(PARAMS, plan_of(jc.chain(SVD(rank=3), Int(bits=8))))
    with pytest.raises(ValueError, match=r"layer/kernel: found dtype complex64, and Int\(bits=8\)"):
        jc.compress(PARAMS, plan_of(M(sparsity=0.5)).replace({"layer/kernel": Int(bits=8)}))
    with pytest.raises(ValueError, match=r"w: found dtype float32, and cartesian.* is for complex arrays"):
        jc.compress({"w": jnp.ones((4, 4))}, jc.plan({"w": jnp.ones((4, 4))}, [("w", jc.cartesian(Int()))]))


def test_layouts_of_complex_kernels():
    w = array((5, 6, 7))
    layout = {"w": jc.Layout(batch=0, inputs=2, outputs=1)}
    for method in (jc.cartesian(Int(bits=4)), SVD(rank=2), M(pattern=jc.prune.NM(2, 3)), M(0.5, scope="output")):
        turned = w.swapaxes(1, 2)[:, :6] if isinstance(method, M) else w.swapaxes(1, 2)
        leaf = turned.swapaxes(1, 2)
        found = jc.compress({"w": leaf}, jc.plan({"w": leaf}, [("w", method)], layout=layout))
        plain = {"w": jc.Layout(batch=0, inputs=1, outputs=2)}
        wanted = jc.compress({"w": turned}, jc.plan({"w": turned}, [("w", method)], layout=plain))
        np.testing.assert_allclose(jc.materialize(found)["w"].swapaxes(1, 2), jc.materialize(wanted)["w"], atol=1e-5)


NAMES = ("gram", "count", "sum", "absmax", "norm", "zeros", "histogram", "outputs")


def real(shape, seed=0):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@pytest.mark.parametrize("cast", [False, True])
@pytest.mark.parametrize(
    ("w", "x"),
    [(array((6, 4)), array((20, 6), 1)), (array((6, 4)), real((20, 6), 1)), (real((6, 4)), array((20, 6), 1))],
)
def test_statistics_of_complex_layers(w, x, cast):
    """``|x dw|**2`` is ``tr(dw^H gram dw)`` for all changes of the parameter's own kind."""

    def fn(p, x):
        return x @ p["w"].astype(x.dtype) if cast and jnp.iscomplexobj(x) else x @ p["w"]

    found = jc.calibrate(fn, {"w": w}, [x[:7], x[7:]], statistics=NAMES)["w"]
    gram = np.asarray(x).conj().T @ np.asarray(x)
    np.testing.assert_allclose(found.gram, gram if jnp.iscomplexobj(w) else gram.real, atol=1e-4)
    assert jnp.iscomplexobj(found.gram) <= jnp.iscomplexobj(w)
    dw = (array if jnp.iscomplexobj(w) else real)((6, 4), 2)
    moved = np.linalg.norm(np.asarray(x) @ np.asarray(dw)) ** 2
    np.testing.assert_allclose(jnp.einsum("io,ij,jo->", dw.conj(), found.gram, dw).real, moved, rtol=1e-4)
    np.testing.assert_allclose(found.norm, np.linalg.norm(x, axis=0), rtol=1e-5)
    np.testing.assert_allclose(found.absmax, np.abs(x).max(0), rtol=1e-5)
    np.testing.assert_allclose(found.sum, np.asarray(x).sum(0), atol=1e-5)
    np.testing.assert_allclose(found.outputs.square, (np.abs(x @ w) ** 2).sum(0), rtol=1e-4)
    np.testing.assert_allclose(found.outputs.sum, np.asarray(x @ w).sum(0), atol=1e-4)
    assert int(found.count) == 20 and int(found.histogram.sum()) == 120
    weighed = jc.calibrate(fn, {"w": w}, [x], statistics=NAMES, where=jnp.arange(20) < 7)["w"]
    np.testing.assert_allclose(weighed.gram, jc.calibrate(fn, {"w": w}, [x[:7]])["w"].gram, atol=1e-4)


def operator(p, x):
    h = jnp.fft.fft(x @ p["lift"], axis=1)
    return jnp.fft.ifft(jnp.einsum("bmi,mio->bmo", h, p["w"]), axis=1).real @ p["out"]


def test_a_fourier_operator_is_calibrated_and_rounded_by_what_it_meets():
    p, x = {"lift": real((2, 6)), "w": array((8, 6, 7)), "out": real((7, 1), 1)}, real((3, 8, 2), 2)

    def error(method, known=True):
        plan = jc.plan(p, [("w", method)], layout=jc.trace.layout(operator, p, x))
        stats = jc.calibrate(operator, p, [x], plan=plan) if known else None
        return jnp.linalg.norm(operator(jc.materialize(jc.compress(p, plan, stats=stats)), x) - operator(p, x))

    assert jc.calibrate(operator, p, [x])["w"].gram.shape == (8, 6, 6)
    assert error(jc.cartesian(jc.quantize.GPTQ(3))) < 0.8 * error(jc.cartesian(Int(3)), known=False)
    assert error(jc.cartesian(jc.prune.SparseGPT(0.5))) < 0.8 * error(jc.cartesian(M(0.5)), known=False)


def test_what_is_not_linear_in_a_complex_parameter_is_named():
    for changed, name in ((jnp.conj, "conj"), (jnp.real, "real")):
        plan = jc.plan({"w": array((3, 2))}, [("w", jc.cartesian(jc.quantize.GPTQ()))])
        with pytest.raises(ValueError, match=rf"^w: .*needs 'gram'.*passes through '{name}'"):
            jc.calibrate(lambda p, x, f=changed: x @ f(p["w"]), {"w": array((3, 2))}, [real((4, 3))], plan)


def test_gradients_of_complex_parameters_have_squared_magnitudes():
    p, x = {"w": array((3, 2))}, array((5, 3), 1)

    def loss(p, x):
        return jnp.square(jnp.abs(x @ p["w"])).sum()

    found = jc.calibrate(lambda p, x: x @ p["w"], p, [x], loss=loss, statistics=("grad", "grad_square"))["w"]
    grad = jax.grad(loss)(p, x)["w"]
    np.testing.assert_allclose(found.grad, grad, rtol=1e-5)
    np.testing.assert_allclose(found.grad_square, np.abs(grad) ** 2, rtol=1e-5)
    with pytest.raises(ValueError, match=r"^w: 'hessian_diagonal' is that of real parameters, found complex64"):
        jc.calibrate(lambda p, x: x @ p["w"], p, [x], loss=loss, statistics=("hessian_diagonal",), key=KEY)
