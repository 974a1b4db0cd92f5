"""Calibration: what meets each parameter, against the same statistics by hand."""

import dataclasses
import functools
import json
from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from zoo import ZOO, built

import jcompress as jc
from experiments.benchmarks import calibration
from jcompress.trace import Stats, observe

HIGH = functools.partial(jnp.einsum, precision="highest")


def normal(seed, *shape, dtype=jnp.float32):
    return jax.random.normal(jax.random.key(seed), shape, dtype)


def gram(x):
    """X^T X in float64, rows of the last axis."""
    x = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])
    return x.T @ x


def check(stats, x, rtol=1e-5):
    """All statistics of the activation ``x`` (..., k) by hand."""
    x = np.asarray(x, np.float64).reshape(-1, np.shape(x)[-1])
    scale = np.abs(gram(x)).max()
    np.testing.assert_allclose(stats.gram, gram(x), rtol=rtol, atol=rtol * scale)
    assert stats.gram.dtype == jnp.float32
    assert int(stats.count) == len(x)
    np.testing.assert_allclose(stats.sum, x.sum(0), rtol=rtol, atol=1e-4)
    np.testing.assert_allclose(stats.norm, np.linalg.norm(x, axis=0), rtol=rtol)
    np.testing.assert_allclose(stats.absmax, np.abs(x).max(0), rtol=rtol)
    np.testing.assert_array_equal(stats.zeros, (x == 0).sum(0))


def run(fn, params, *args, **options):
    """Statistics of one call; the outputs must be those of the function, but for how XLA fuses."""
    outs, stats = jax.jit(functools.partial(observe, fn, **options))(params, *args)
    for a, b in zip(jax.tree.leaves(outs), jax.tree.leaves(jax.jit(fn)(params, *args)), strict=True):
        np.testing.assert_allclose(*(np.asarray(x, np.float32) for x in (a, b)), rtol=2e-6, atol=2e-6)
    return stats


class TestProducts:
    def test_dense(self):
        def fn(params, x):
            return jax.nn.relu(x @ params["a"] + params["bias"]) @ params["b"]

        params = {"a": normal(0, 5, 6), "bias": normal(1, 6), "b": normal(2, 6, 3)}
        x = normal(3, 4, 7, 5)
        stats = run(fn, params, x)
        hidden = jax.nn.relu(x @ params["a"] + params["bias"])
        check(stats["a"], x)
        check(stats["b"], hidden)
        assert stats["a"].axes == (-2,)
        y = np.asarray(hidden @ params["b"], np.float64).reshape(-1, 3)
        np.testing.assert_allclose(stats["b"].outputs.sum, y.sum(0), rtol=1e-5, atol=1e-4)
        np.testing.assert_allclose(stats["b"].outputs.square, (y**2).sum(0), rtol=1e-5)
        np.testing.assert_allclose(stats["b"].outputs.absmax, np.abs(y).max(0), rtol=1e-6)
        assert stats.notes == {"bias": "in no product with an activation"} and not stats.unread
        with pytest.raises(KeyError, match="bias: no statistics: in no product"):
            stats["bias"]

    def test_a_change_of_the_kernel_moves_the_outputs_by_its_trace(self):
        params, x, change = {"w": normal(0, 5, 6)}, normal(1, 40, 5), normal(2, 5, 6)
        g = np.asarray(run(lambda p, x: x @ p["w"], params, x)["w"].gram, np.float64)
        d = np.asarray(change, np.float64)
        moved = ((np.asarray(x, np.float64) @ d) ** 2).sum()
        np.testing.assert_allclose(np.trace(d.T @ g @ d), moved, rtol=1e-6)

    @pytest.mark.parametrize("seed", range(3))
    def test_attention_with_heads(self, seed):
        def fn(params, x):
            q, k, v = (jnp.einsum("btd,dhk->bthk", x, params[n]) for n in ("query", "key", "value"))
            mixed = jnp.einsum("bhts,bshk->bthk", jax.nn.softmax(jnp.einsum("bthk,bshk->bhts", q, k)), v)
            return jnp.einsum("bthk,hkd->btd", mixed, params["out"]), mixed

        params = {n: normal(i + seed, 6, 2, 3) for i, n in enumerate(("query", "key", "value"))}
        params["out"] = normal(9, 2, 3, 6)
        x = normal(seed, 2, 5, 6)
        stats = run(fn, params, x)
        for name in ("query", "key", "value"):
            check(stats[name], x)
            assert stats[name].axes == (-3,)
        check(stats["out"], fn(params, x)[1].reshape(2, 5, 6))
        assert stats["out"].axes == (-3, -2)
        assert stats["query"].outputs.sum.shape == (6,)

    def test_the_order_of_features_is_the_parameters_own(self):
        # Contracted over (heads, width) as (width, heads): the statistic follows the kernel, not the product.
        w, x = normal(0, 2, 3, 4), normal(1, 5, 3, 2)
        stats = run(lambda p, x: jnp.tensordot(x, p["w"].transpose(1, 0, 2), 2), {"w": w}, x)
        check(stats["w"], x.transpose(0, 2, 1).reshape(5, 6))

    def test_the_parameter_may_stand_on_the_left_and_be_laid_out_anew(self):
        def fn(params, x):
            w = params["w"].reshape(2, 3, 4).transpose(2, 0, 1).reshape(4, 6).astype(jnp.bfloat16)
            return jax.lax.dot_general(w, x.astype(jnp.bfloat16), (((1,), (1,)), ((), ())))

        stats = run(fn, {"w": normal(0, 6, 4)}, x := normal(1, 7, 6).astype(jnp.bfloat16))
        check(stats["w"], x)

    def test_low_precision_models_are_counted_in_float32(self):
        params = {"w": normal(0, 8, 4, dtype=jnp.bfloat16)}
        x = normal(1, 3000, 8, dtype=jnp.bfloat16)
        stats = run(lambda p, x: x @ p["w"], params, x)
        check(stats["w"], x.astype(jnp.float32))

    def test_experts_have_statistics_of_their_own(self):
        w, x = normal(0, 3, 5, 4), normal(1, 3, 7, 5)
        stats = run(lambda p, x: jnp.einsum("ecd,edf->ecf", x, p["w"]), {"w": w}, x)["w"]
        assert stats.gram.shape == (3, 5, 5) and stats.count.tolist() == [7, 7, 7]
        for i in range(3):
            check(jax.tree.map(lambda s, i=i: s[i], stats), x[i])

    def test_a_kernel_that_vmap_copies_meets_more_positions(self):
        x = normal(1, 3, 7, 5)
        stats = run(lambda p, x: jax.vmap(lambda x: x @ p["w"])(x), {"w": normal(0, 5, 4)}, x)
        check(stats["w"], x)

    def test_histogram(self):
        x = jnp.array([[0.0, 1.0, 1.05, -1.1], [2.0, 2.0**-30, 2.0**20, 0.5]])
        stats = run(lambda p, x: x @ p["w"], {"w": normal(0, 4, 2)}, x, statistics=("histogram",))["w"]
        counts = {i: int(n) for i, n in enumerate(stats.histogram) if n}
        assert counts == {0: 1, 184: 1, 192: 2, 193: 1, 200: 1, 319: 1}
        assert stats.gram is None and stats.histogram.shape == (320,)


class TestConvolution:
    def explicit(self, x, kernel, y, **options):
        """The gradient of each output in the kernel is the patch that it sees, in the kernel's own layout."""
        kernel = kernel[..., :1]
        rows = jax.jacrev(lambda k: convolve(x, k, **options))(kernel)
        return rows.reshape(-1, kernel.size)

    @pytest.mark.parametrize(
        "options",
        [
            {},
            {"padding": "VALID"},
            {"strides": (2, 2)},
            {"strides": (2, 1), "padding": ((1, 2), (0, 3))},
            {"rhs_dilation": (2, 1)},
            {"lhs_dilation": (2, 2), "padding": ((1, 1), (2, 1))},
            {"padding": ((-1, 0), (0, -1))},
        ],
        ids=str,
    )
    def test_patches(self, options):
        x, kernel = normal(0, 2, 7, 6, 3), normal(1, 3, 2, 3, 4)
        y = convolve(x, kernel, **options)
        stats = run(lambda p, x: convolve(x, p["k"], **options), {"k": kernel}, x)["k"]
        check(stats, self.explicit(x, kernel, y, **options))
        assert stats.axes == (-4, -3, -2) and stats.outputs.sum.shape == (4,)

    def test_groups(self):
        x, kernel = normal(0, 2, 5, 5, 6), normal(1, 3, 3, 3, 8)
        stats = run(lambda p, x: convolve(x, p["k"], feature_group_count=2), {"k": kernel}, x)["k"]
        assert stats.gram.shape == (2, 27, 27) and stats.outputs.sum.shape == (2, 4)
        for g in range(2):
            part = x[..., 3 * g : 3 * g + 3]
            check(jax.tree.map(lambda s, g=g: s[g], stats), self.explicit(part, kernel, None))

    def test_depthwise(self):
        x, kernel = normal(0, 2, 5, 5, 4), normal(1, 3, 3, 1, 4)
        stats = run(lambda p, x: convolve(x, p["k"], feature_group_count=4), {"k": kernel}, x)["k"]
        assert stats.gram.shape == (4, 9, 9)
        check(jax.tree.map(lambda s: s[2], stats), self.explicit(x[..., 2:3], kernel, None))

    def test_windows_of_one_shape_that_see_different_patches(self):
        x, params = normal(0, 2, 9, 9, 3), {"a": normal(1, 3, 3, 3, 4), "b": normal(2, 3, 3, 3, 4)}

        def fn(params, x):
            return convolve(x, params["a"]), convolve(x, params["b"], rhs_dilation=(2, 2))

        stats = run(fn, params, x)
        check(stats["a"], self.explicit(x, params["a"], None))
        check(stats["b"], self.explicit(x, params["b"], None, rhs_dilation=(2, 2)))

    def test_other_layouts_and_one_axis(self):
        x, kernel = normal(0, 2, 3, 9), normal(1, 4, 3, 5)

        def fn(params, x):
            return jax.lax.conv_general_dilated(x, params["k"], (1,), "SAME", dimension_numbers=("NCH", "OIH", "NCH"))

        stats = run(fn, {"k": kernel}, x)["k"]
        rows = jax.jacrev(lambda k: fn({"k": k}, x))(kernel[:1]).reshape(-1, 15)
        check(stats, rows)
        assert stats.axes == (-2, -1)


def convolve(x, kernel, strides=(1, 1), padding="SAME", **options):
    return jax.lax.conv_general_dilated(
        x, kernel, strides, padding, dimension_numbers=("NHWC", "HWIO", "NHWC"), precision="highest", **options
    )


def cell(w, c, x):
    return jnp.tanh(x @ w) @ c


class TestControlFlow:
    params: ClassVar = {"w": normal(0, 3, 5, 5), "c": normal(1, 5, 5) / 3}
    x = normal(2, 4, 5)

    def unrolled(self, params, x):
        for i in range(3):
            x = cell(params["w"][i], params["c"], x)
        return x

    def by_hand(self):
        """Activations that meet each layer's ``w``, and those that meet ``c``."""
        ins, mids, x = [], [], self.x
        for i in range(3):
            ins.append(x)
            mids.append(jnp.tanh(x @ self.params["w"][i]))
            x = cell(self.params["w"][i], self.params["c"], x)
        return ins, mids

    def check(self, stats):
        ins, mids = self.by_hand()
        for i in range(3):
            check(jax.tree.map(lambda s, i=i: s[i], stats["w"]), ins[i], rtol=1e-4)
        check(stats["c"], jnp.concatenate(mids), rtol=1e-4)
        assert stats["w"].axes == (-2,)

    def test_layers_by_index(self):
        self.check(run(self.unrolled, self.params, self.x))

    def test_scan(self):
        def fn(params, x):
            return jax.lax.scan(lambda x, w: (cell(w, params["c"], x), x.sum()), x, params["w"])

        self.check(run(fn, self.params, self.x))

    def test_scan_in_reverse_with_remat(self):
        def fn(params, x):
            body = jax.checkpoint(lambda x, w: (cell(w, params["c"], x), None))
            return jax.lax.scan(body, x, params["w"][::-1], reverse=True)[0]

        self.check(run(fn, self.params, self.x))

        def fn(params, x):
            body = jax.checkpoint(lambda x, w: (cell(w, params["c"], x), None))
            return jax.lax.scan(body, x, params["w"], reverse=True)[0]

        backwards = {**self.params, "w": self.params["w"][::-1]}
        stats = run(fn, backwards, self.x)
        self.check({**stats, "w": jax.tree.map(lambda s: s[::-1], stats["w"])})

    def test_nested_scan(self):
        w = normal(3, 2, 3, 5, 5)

        def fn(params, x):
            def outer(x, ws):
                return jax.lax.scan(lambda x, w: (cell(w, params["c"], x), None), x, ws)[0], None

            return jax.lax.scan(outer, x, params["w"])[0]

        nested = run(fn, {"w": w, "c": self.params["c"]}, self.x)
        flat = {"w": w.reshape(6, 5, 5), "c": self.params["c"]}
        once = run(lambda p, x: jax.lax.scan(lambda x, w: (cell(w, p["c"], x), None), x, p["w"])[0], flat, self.x)
        assert nested["w"].gram.shape == (2, 3, 5, 5) and nested["w"].count.shape == (2, 3)
        np.testing.assert_allclose(nested["w"].gram.reshape(6, 5, 5), once["w"].gram, rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(nested["c"].gram, once["c"].gram, rtol=1e-5, atol=1e-5)

    def test_layers_that_are_not_the_first_axis(self):
        params = {**self.params, "w": jnp.moveaxis(self.params["w"], 0, 1)}

        def fn(params, x):
            w = jnp.moveaxis(params["w"], 1, 0)
            return jax.lax.scan(lambda x, w: (cell(w, params["c"], x), None), x, w)[0]

        self.check({**run(fn, params, self.x)} | {"w": dataclasses.replace(run(fn, params, self.x)["w"], axes=(-2,))})
        assert run(fn, params, self.x)["w"].axes == (-3,)

    @pytest.mark.parametrize("flag", [False, True])
    def test_cond_counts_the_branch_taken(self, flag):
        def fn(params, x, flag):
            return jax.lax.cond(flag, lambda: x @ params["a"], lambda: jnp.sin(x) @ params["b"])

        stats = run(fn, {"a": normal(0, 5, 2), "b": normal(1, 5, 2)}, self.x, jnp.array(flag))
        taken, other = ("a", "b") if flag else ("b", "a")
        check(stats[taken], self.x if flag else jnp.sin(self.x))
        assert int(stats[other].count) == 0 and not stats[other].gram.any()

    def test_while_and_fori(self):
        def fn(params, x, n):
            return jax.lax.fori_loop(0, n, lambda _, x: jnp.tanh(x @ params["c"]), x)

        stats = run(fn, {"c": self.params["c"]}, self.x, jnp.array(3))
        seen, x = [], self.x
        for _ in range(3):
            seen.append(x)
            x = jnp.tanh(x @ self.params["c"])
        check(stats["c"], jnp.concatenate(seen), rtol=1e-4)

    def test_a_parameter_in_an_unchanging_carry(self):
        def fn(params, x):
            (x, _), _ = jax.lax.scan(lambda s, _: ((jnp.tanh(s[0] @ s[1]), s[1]), None), (x, params["c"]), length=3)
            return x

        assert int(run(fn, self.params, self.x)["c"].count) == 12

    def test_custom_derivatives(self):
        @jax.custom_jvp
        def act(x):
            return jnp.sign(x)

        act.defjvp(lambda x, t: (act(x[0]), t[0]))

        @jax.custom_vjp
        def dense(x, w):
            return x @ w

        dense.defvjp(lambda x, w: (x @ w, (x, w)), lambda r, g: (g @ r[1].T, r[0].T @ g))
        params = {"a": normal(0, 5, 6), "b": normal(1, 6, 3)}
        stats = run(lambda p, x: dense(act(dense(x, p["a"])), p["b"]), params, self.x)
        check(stats["b"], jnp.sign(self.x @ params["a"]))

    def test_under_jit_of_the_whole(self):
        @jax.jit
        def half(params, x):
            _, stats = observe(self.unrolled, params, x)
            return jc.compress(params, plan, stats=stats), stats

        plan = jc.plan(self.params, [("c", Whitened())])
        small, stats = half(self.params, self.x)
        self.check(stats)
        np.testing.assert_array_equal(small["c"].values, stats["c"].gram)


@dataclasses.dataclass(frozen=True)
class Whitened:
    """Gives back the statistic, to see which one arrived."""

    needs = ("stats.gram", "stats.norm")

    def __call__(self, w, context=jc.Context(), /):
        return jc.formats.Masked(context.stats.gram, jnp.ones((), bool))


class TestUses:
    def test_tied_embedding(self):
        def fn(params, tokens):
            return jnp.tanh(params["e"][tokens]) @ params["e"].T

        e, tokens = normal(0, 7, 4), jnp.array([[1, 2, 2], [6, 1, 2]])
        stats = run(fn, {"e": e}, tokens)
        check(stats["e"], jnp.tanh(e[tokens]))
        assert stats["e"].counts.tolist() == [0, 2, 3, 0, 0, 0, 1]
        assert stats["e"].axes == (-1,) and not stats["e"].others

    @pytest.mark.parametrize("axis", [0, 1])
    def test_rows_indexed_one_by_one(self, axis):
        """Indexing by a scalar is a slice from a place, and vmap makes it a lookup along all axes."""
        params = {"e": normal(0, 7, 3) if axis == 0 else normal(0, 3, 7)}

        def fn(p, x):
            each = jax.vmap(lambda i: jax.lax.dynamic_index_in_dim(p["e"], i, axis, keepdims=False))
            return jax.vmap(each)(x)

        words = jnp.array([[1, 1, 3], [3, 3, 9]])  # behind the last row is the last
        stats = jc.calibrate(fn, params, [words])
        assert stats["e"].counts.tolist() == [0, 2, 0, 3, 0, 0, 1]
        assert jc.trace.layout(fn, params, words)["e"].inputs == (axis - 2,)

    def test_an_embedding_alone_has_counts(self):
        stats = run(lambda p, t: jnp.take(p["e"], t, axis=0), {"e": normal(0, 7, 4)}, jnp.array([1, 1, 3]))
        assert stats["e"].counts.tolist() == [0, 2, 0, 1, 0, 0, 0] and stats["e"].gram is None

    def test_shared_layers_are_summed(self):
        w, x = normal(0, 5, 5) / 3, normal(1, 4, 5)
        stats = run(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"], {"w": w}, x)
        check(stats["w"], jnp.concatenate([x, jnp.tanh(x @ w)]))

    def test_other_axes_are_kept_apart(self):
        w, x = normal(0, 5, 3), normal(1, 4, 5)
        stats = run(lambda p, x: jnp.tanh(x @ p["w"]) @ p["w"].T, {"w": w}, x)["w"]
        check(stats, x)
        (other,) = stats.others
        check(other, jnp.tanh(x @ w))
        assert stats.axes == (-2,) and other.axes == (-1,)

    def test_parts_that_meet_one_activation_count_once(self):
        def fn(params, x):
            a, b = jnp.split(params["w"], 2, axis=-1)
            return (x @ a) * (x @ b) + x @ params["w"][:, 1:4]

        x = normal(1, 4, 5)
        check(run(fn, {"w": normal(0, 5, 6)}, x)["w"], x)

    def test_parts_that_meet_different_activations_are_unread(self):
        def fn(params, x):
            return (x @ params["w"][:, :3]) + jnp.sin(x) @ params["w"][:, 3:]

        stats = run(fn, {"w": normal(0, 5, 6)}, normal(1, 4, 5))
        assert stats.unread == {"w": "parts of its outputs meet different activations"} and not stats

    def test_joined_kernels(self):
        def fn(params, x):
            return x @ jnp.concatenate([params["a"], params["b"]], axis=1)

        params, x = {"a": normal(0, 5, 3), "b": normal(1, 5, 4)}, normal(2, 6, 5)
        stats = run(fn, params, x)
        for name in params:
            check(stats[name], x)
            np.testing.assert_allclose(stats[name].outputs.sum, (x @ params[name]).sum(0), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize(
        ("change", "reason"),
        [
            (lambda w: w / jnp.linalg.norm(w), "'div'|'mul'"),
            (lambda w: jnp.where(w > 0, w, 0), "'select_n'|'gt'"),
            (lambda w: w.astype(jnp.int8).astype(jnp.float32), "'convert_element_type'"),
            (lambda w: jax.lax.stop_gradient(jnp.round(w)), "'round'"),
            (lambda w: jnp.concatenate([w[:3], w[3:] * 2]), "joined with others"),
            (lambda w: (w - w.mean(0)) / w.std(0), "fold that into the weight first"),
            (lambda w: w * w, "'mul'"),
            (lambda w: w[jnp.array([1, 0, 2, 3, 4])], "'gather'"),
        ],
    )
    def test_a_kernel_that_is_changed_first_is_unread(self, change, reason):
        stats = run(
            lambda p, x: x @ change(p["w"]) @ p["b"], {"w": normal(0, 5, 6), "b": normal(1, 6, 2)}, normal(2, 4, 5)
        )
        assert list(stats.unread) == ["w"] and list(stats) == ["b"]
        assert stats.get("w") is None
        with pytest.raises(KeyError, match=reason):
            stats["w"]

    def test_simulated_quantization_is_unread(self):
        plan = jc.plan({"w": normal(0, 5, 6)}, [("w", jc.quantize.Int(bits=4))])
        stats = run(lambda p, x: x @ jc.simulate(p, plan)["w"], {"w": normal(0, 5, 6)}, normal(1, 4, 5))
        assert list(stats.unread) == ["w"]

    @pytest.mark.parametrize(
        "fn",
        [
            lambda p, x: x @ p["w"][0] + x[:, :2] @ p["w"][1, :2],  # a part is contracted
            lambda p, x: x[:, :2] @ p["w"][0, :2] + x[:, 2:] @ p["w"][0, 2:],
            lambda p, x: x @ p["w"][x[0, 0].astype(int)],  # chosen by an activation
            lambda p, x: jax.lax.fori_loop(0, 2, lambda i, x: x @ p["w"][i], x),
            lambda p, x: x @ jax.lax.cond(x.sum() > 0, lambda: p["w"][0], lambda: p["w"][1]),
            lambda p, x: jax.scipy.linalg.solve_triangular(p["w"][0], x.T),
            lambda p, x: x @ (p["w"][0] @ p["w"][1]),
        ],
    )
    def test_never_silent(self, fn):
        stats = run(fn, {"w": normal(0, 2, 5, 5)}, normal(1, 4, 5))
        assert list(stats.unread) == ["w"]

    def test_what_only_penalises_a_kernel_does_not_hide_it(self):
        x = normal(1, 4, 5)
        stats = run(lambda p, x: (x @ p["w"]).sum() + (p["w"].T @ p["w"]).sum(), {"w": normal(0, 5, 6)}, x)
        check(stats["w"], x)

    def test_learned_queries(self):
        params = {"q": normal(0, 3, 5), "w": normal(1, 5, 4), "k": normal(2, 6, 4)}

        def fn(params, x):
            return jax.nn.softmax((2 * params["q"] @ params["w"]) @ (x @ params["k"]).T) @ x

        stats = run(fn, params, normal(3, 7, 6))
        check(stats["w"], 2 * params["q"])
        assert list(stats.unread) == ["q"]


@pytest.mark.parametrize("name", [entry.name for entry in ZOO])
def test_zoo(name):
    """The same outputs; every kernel is read, and reproduces the outputs' second moments."""
    model = built(name)
    args = model.args(3, jax.random.key(1))
    stats = run(model.fn, model.params, *args, statistics=("gram", "outputs"))
    assert set(stats.unread) <= {"mix"}
    params = dict(jc.paths(model.params))
    kernels = [path for path, x in params.items() if path.endswith("kernel")]
    assert all(path in stats for path in kernels)
    for path in kernels:
        s, w = stats[path], np.asarray(params[path], np.float64)
        lead = np.asarray(s.count).ndim
        if s.outputs is None or s.others or lead:
            continue
        contracted = [a % w.ndim for a in s.axes]
        w = np.moveaxis(w, contracted, range(len(contracted))).reshape(s.gram.shape[-1], -1)
        square = np.einsum("ko,kl,lo->o", w, np.asarray(s.gram, np.float64), w)
        np.testing.assert_allclose(s.outputs.square, square, rtol=2e-4, atol=1e-4 * square.max())


class Net(nn.Module):
    @nn.compact
    def __call__(self, x):
        x = nn.relu(nn.Conv(4, (3, 3), name="conv")(x))
        return nn.Dense(3, name="head")(x.reshape(x.shape[0], -1))


class TestCalibrate:
    def make(self):
        net = Net()
        variables = net.init(jax.random.key(0), jnp.zeros((1, 6, 6, 2)))
        return net.apply, variables

    def test_two_half_batches_are_one(self):
        fn, params = self.make()
        x = normal(1, 8, 6, 6, 2)
        whole, halves = jc.calibrate(fn, params, [x]), jc.calibrate(fn, params, (x[i : i + 4] for i in (0, 4)))
        assert list(whole) == ["params/conv/kernel", "params/head/kernel"]
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), whole, halves)
        assert int(whole["params/conv/kernel"].count) == 8 * 36

    def test_batches_of_other_shapes_and_of_more_arguments(self):
        def fn(params, x, y):
            return (x @ params["w"]) * y

        batches = [(np.ones((n, 3), np.float32), 2.0) for n in (2, 5, 2)]
        stats = jc.calibrate(fn, {"w": jnp.ones((3, 2))}, batches)
        assert int(stats["w"].count) == 9 and stats["w"].gram[0, 0] == 9

    def test_nnx(self):
        model = nnx.Linear(5, 3, rngs=nnx.Rngs(0))
        graph, state = nnx.split(model)
        x = normal(1, 4, 5)
        stats = jc.calibrate(lambda state, x: nnx.merge(graph, state)(x), state, [x, x])
        check(stats["kernel"], jnp.concatenate([x, x]))

    def test_it_gathers_what_the_plan_needs(self):
        fn, params = self.make()
        plan = jc.plan(params, [(".*head/kernel", Whitened())])
        stats = jc.calibrate(fn, params, [normal(1, 8, 6, 6, 2)], plan)
        (only,) = stats.values()
        assert {f.name for f in dataclasses.fields(Stats) if getattr(only, f.name) is not None} == {
            "gram", "square", "count", "others", "axes", "layout",
        }  # fmt: skip
        assert jc.compress(params, plan, stats=stats)["params"]["head"]["kernel"].values.shape == (144, 144)
        assert not jc.calibrate(fn, params, [normal(1, 8, 6, 6, 2)], jc.plan(params, [(".*", None)]))

    def test_a_leaf_in_no_product_has_gradients_all_the_same(self):
        params = {"w": normal(0, 3, 4), "gain": jnp.ones(4)}

        def fn(params, x):
            return (x @ params["w"]) * params["gain"]

        plan = jc.plan(params, [(".*", jc.prune.Fisher(sparsity=0.5))])
        loss = lambda params, x: jnp.square(fn(params, x)).mean()  # noqa: E731
        stats = jc.calibrate(fn, params, [normal(1, 5, 3)], plan, loss=loss)
        assert stats["w"].count == 5 and stats["gain"].count is None
        assert int(jc.compress(params, plan, stats=stats)["gain"].mask.sum()) == 2

    def test_the_state_is_the_statistics(self):
        """Memory does not grow: the compiled update holds one batch's temporaries and the sum of the statistics."""
        fn, params = self.make()
        x = normal(1, 8, 6, 6, 2)
        stats = jc.calibrate(fn, params, [x])
        more = jc.calibrate(fn, params, (x for _ in range(5)))
        size = lambda s: sum(a.nbytes for a in jax.tree.leaves(s))  # noqa: E731
        assert size(stats) == size(more)
        k = 18, 144
        assert size({p: s.gram for p, s in stats.items()}) == 4 * sum(n * n for n in k)

    def test_stacked_methods_get_the_statistics_of_their_layer(self):
        def fn(params, x):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

        params: ClassVar = {"w": normal(0, 3, 5, 5)}
        stats = jc.calibrate(fn, params, [normal(1, 4, 5)])
        plan = jc.plan(params, [("w", jc.stacked(Whitened()))])
        small = jc.compress(params, plan, stats=stats)
        np.testing.assert_array_equal(small["w"].values, stats["w"].gram)

    @pytest.mark.parametrize("axis_type", [AxisType.Auto, AxisType.Explicit], ids=["auto", "explicit"])
    def test_sharded_equals_unsharded(self, axis_type):
        if axis_type == AxisType.Explicit and not hasattr(jax.sharding, "use_abstract_mesh"):
            pytest.skip("explicit axes are no default in this jax")
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(axis_type,) * 2)
        params = {"a": normal(0, 8, 16), "b": normal(1, 16, 4)}
        x = normal(2, 16, 8)

        out = NamedSharding(mesh, P("data")) if axis_type == AxisType.Explicit else None

        def fn(params, x, out=None):
            return jnp.einsum("bi,io->bo", jax.nn.relu(x @ params["a"]), params["b"], out_sharding=out)

        def put(x, *spec):
            return jax.device_put(x, NamedSharding(mesh, P(*spec)))

        placed = {"a": put(params["a"], None, "model"), "b": put(params["b"], "model", None)}
        alone = jc.calibrate(fn, params, [x] * 3)
        spread = jc.calibrate(functools.partial(fn, out=out), placed, [put(x, "data")] * 3)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-4), alone, spread)
        assert len(spread["b"].gram.sharding.device_set) == 8

    def test_in_shard_map(self):
        """Data-parallel: the sum over devices. Split outputs meet the same data; split inputs cannot be read."""
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Auto,) * 2)
        params, x = {"a": normal(0, 4, 6), "s": normal(1, 3, 6, 6), "b": normal(2, 6, 5)}, normal(3, 8, 4)

        def body(params, x):
            y = jax.lax.scan(lambda y, w: (jnp.tanh(y @ w), None), jax.nn.relu(x @ params["a"]), params["s"])[0]
            return y @ params["b"]

        def mapped(params, x):
            return jax.shard_map(body, mesh=mesh, in_specs=(P(), P("data")), out_specs=P("data"))(params, x)

        alone, spread = run(body, params, x), run(mapped, params, x)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), alone, spread)

        def recurrent(params, x, h):
            return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w + x), None), h, params["s"])[0]

        def from_one_state(params, x, h):
            """The state is the same on all devices until it has met their data."""
            varied = functools.partial(jax.lax.pcast, axis_name="data", to="varying")
            inner = lambda params, x, h: recurrent(params, x, varied(h))  # noqa: E731
            return jax.shard_map(inner, mesh=mesh, in_specs=(P(), P("data"), P()), out_specs=P("data"))(params, x, h)

        if hasattr(jax.lax, "pcast"):
            x6, h = normal(4, 8, 6), normal(5, 2, 6)
            stats = run(from_one_state, params, x6, h)
            want = run(recurrent, params, x6, jnp.tile(h, (4, 1)))
            np.testing.assert_allclose(stats["s"].gram, want["s"].gram, rtol=1e-5, atol=1e-5)
            assert stats["s"].count.tolist() == [8, 8, 8]

        def columns(params, x):
            return jax.lax.psum(jax.nn.relu(x @ params["a"]) @ params["b"], "model")

        def parallel(params, x):
            specs = {"a": P(None, "model"), "b": P("model")}
            return jax.shard_map(columns, mesh=mesh, in_specs=(specs, P("data")), out_specs=P("data"))(params, x)

        del params["s"]
        stats = run(parallel, params, x)
        check(stats["a"], x)
        assert stats.unread == {"b": "a part of its axis -2 is contracted"}

        def experts(w, x):
            return jnp.einsum("ecd,edf->ecf", x, w)

        def spread_experts(params, x):
            return jax.shard_map(experts, mesh=mesh, in_specs=P("model"), out_specs=P("model"))(params["w"], x)

        stats = run(spread_experts, {"w": normal(0, 4, 3, 2)}, normal(1, 4, 5, 3))
        assert stats.unread == {"w": "its layers or experts are spread over devices"}

    def test_progress(self, capsys):
        jc.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, [jnp.ones((1, 2))] * 3, progress=True)
        assert "calibrate" in capsys.readouterr().err

    def test_progress_without_tqdm(self, monkeypatch):
        monkeypatch.setitem(__import__("sys").modules, "tqdm", None)
        with pytest.raises(ImportError, match=r"pip install \"jcompress\[experiments\]\""):
            jc.calibrate(lambda p, x: x @ p["w"], {"w": jnp.ones((2, 2))}, [], progress=True)


class TestLoss:
    params: ClassVar = {"w": normal(0, 3, 2), "b": normal(1, 2)}
    batches: ClassVar = [(normal(i, 4, 3), normal(9 + i, 4, 2)) for i in range(2)]

    def fn(self, params, x, y):
        return x @ params["w"] + params["b"]

    def loss(self, params, x, y):
        return jnp.mean(jnp.sum(jnp.square(self.fn(params, x, y) - y), -1))

    def test_gradients(self):
        grads = [jax.grad(self.loss)(self.params, *batch) for batch in self.batches]
        stats = jc.calibrate(
            self.fn, self.params, self.batches, loss=self.loss, statistics=("gram", "grad", "grad_square")
        )
        for name in ("w", "b"):
            a, b = (g[name] for g in grads)
            np.testing.assert_allclose(stats[name].grad, (a + b) / 2, rtol=1e-5)
            np.testing.assert_allclose(stats[name].grad_square, (a**2 + b**2) / 2, rtol=1e-5)
        assert stats["b"].gram is None

    def test_gradients_of_examples(self):
        stats = jc.calibrate(
            self.fn, self.params, self.batches, loss=self.loss, statistics=("grad_square",), per_example=True
        )
        x, y = (jnp.concatenate(part) for part in zip(*self.batches, strict=True))
        each = jax.vmap(lambda x, y: jax.grad(self.loss)(self.params, x[None], y[None]))(x, y)
        for name in ("w", "b"):
            np.testing.assert_allclose(stats[name].grad_square, (each[name] ** 2).mean(0), rtol=1e-5)

    def test_the_diagonal_of_the_hessian(self):
        """Exact by one probe where the Hessian is diagonal; its mean over many probes else."""
        scale = jnp.arange(1.0, 7.0).reshape(3, 2)

        def diagonal(params, x):
            return 0.5 * jnp.sum(scale * params["w"] ** 2)

        def fn(params, x):
            return x @ params["w"]

        options = {"statistics": ("hessian_diagonal",), "key": jax.random.key(0)}
        found = jc.calibrate(fn, {"w": self.params["w"]}, [jnp.ones((1, 3))], loss=diagonal, **options)
        np.testing.assert_allclose(found["w"].hessian_diagonal, scale, rtol=1e-6)

        hessian = jax.hessian(lambda w: self.loss({**self.params, "w": w}, *self.batches[0]))(self.params["w"])
        want = jnp.einsum("ijij->ij", hessian)
        found = jc.calibrate(self.fn, self.params, self.batches[:1], loss=self.loss, probes=3000, **options)
        np.testing.assert_allclose(found["w"].hessian_diagonal, want, atol=0.2)

    def test_what_is_missing(self):
        for names, options, message in [
            (("grad",), {}, "w: 'grad' needs a loss|b: 'grad' needs a loss"),
            (("hessian_diagonal",), {"loss": self.loss}, "'hessian_diagonal' draws random numbers; pass key="),
        ]:
            with pytest.raises(ValueError, match=message):
                jc.calibrate(self.fn, self.params, self.batches, statistics=names, **options)


class TestSequential:
    shapes: ClassVar = {"a": (5, 6), "b": (6, 4), "c": (6, 4), "d": (4, 2), "bias": (2,)}
    params: ClassVar = {name: normal(i, *shape) for i, (name, shape) in enumerate(shapes.items())}

    def fn(self, params, x):
        h = jnp.tanh(x @ params["a"])
        return ((h @ params["b"]) * (h @ params["c"])) @ params["d"] + params["bias"]

    def test_each_layer_meets_the_compressed_ones_before_it(self):
        x, seen, passes = normal(5, 7, 5), {}, []

        class Batches(list):
            def __iter__(self):
                passes.append(1)
                return super().__iter__()

        @dataclasses.dataclass(frozen=True)
        class Halve:
            needs = ("stats.gram",)

            def __call__(self, w, context=jc.Context(), /):
                seen[context.path] = context.stats.gram
                return jc.formats.Masked(w / 2, jnp.ones(w.shape, bool))

        plan = jc.plan(self.params, [("[a-d]", Halve())])
        tree = jc.compress_sequentially(self.fn, self.params, Batches([x]), plan)
        halved = {n: w / 2 if n != "bias" else w for n, w in self.params.items()}
        h = jnp.tanh(x @ halved["a"])
        for name, want in {"a": x, "b": h, "c": h, "d": (h @ halved["b"]) * (h @ halved["c"])}.items():
            np.testing.assert_allclose(seen[name], gram(want), rtol=1e-4, atol=1e-4)
            np.testing.assert_array_equal(tree[name].values, halved[name])
        np.testing.assert_array_equal(tree["bias"], self.params["bias"])
        assert "".join(seen) in ("abcd", "acbd")
        assert len(passes) <= 3 + 2  # three levels; the two others only look at the first batch

    def test_without_statistics_it_is_compress(self):
        plan = jc.plan(
            self.params, [("[ab]", jc.prune.Magnitude(0.5, scope="global")), (".*", jc.quantize.Int(bits=8))]
        )
        both = [
            jc.compress_sequentially(self.fn, self.params, [normal(5, 7, 5)], plan, key=jax.random.key(0)),
            jc.compress(self.params, plan, key=jax.random.key(0)),
        ]
        jax.tree.map(np.testing.assert_array_equal, *both)

    def test_a_generator_is_refused(self):
        with pytest.raises(ValueError, match="found a generator, expected a list"):
            plan = jc.plan(self.params, [("a", jc.quantize.Int(bits=8))])
            jc.compress_sequentially(self.fn, self.params, iter([]), plan)


class TestErrors:
    params: ClassVar = {"w": jnp.ones((3, 2)), "unused": jnp.ones((4, 4))}
    x = jnp.ones((2, 3))

    def fn(self, params, x):
        return x @ params["w"]

    def test_no_batches(self):
        with pytest.raises(ValueError, match="found no batch"):
            jc.calibrate(self.fn, self.params, [])

    def test_nodes(self):
        tree = jc.compress(self.params, jc.plan(self.params, [("w", jc.quantize.Int(bits=8))]))
        with pytest.raises(ValueError, match="w: found a Quantized node"):
            jc.calibrate(self.fn, tree, [self.x])

    def test_a_plan_for_others(self):
        plan = jc.plan({"v": jnp.ones((3, 2))}, [("v", jc.quantize.Int(bits=8))])
        with pytest.raises(ValueError, match="the plan was made for other parameters: not in the plan"):
            jc.calibrate(self.fn, self.params, [self.x], plan)

    @pytest.mark.parametrize("bad", [np.nan, np.inf])
    def test_nan(self, bad):
        with pytest.raises(ValueError, match="w: found NaN or infinite values in what it meets"):
            jc.calibrate(self.fn, self.params, [self.x, self.x.at[0, 0].set(bad)])
        stats = jax.jit(lambda p, x: observe(self.fn, p, x)[1])(self.params, self.x.at[0, 0].set(bad))
        assert not np.isfinite(stats["w"].gram[0, 0])

    def test_unused(self):
        stats = jc.calibrate(self.fn, self.params, [self.x])
        assert stats.notes == {"unused": "not used"}
        with pytest.raises(ValueError, match=r"unused: Whitened\(\) needs 'gram', which cannot be gathered: not used"):
            jc.calibrate(self.fn, self.params, [self.x], jc.plan(self.params, [(".*", Whitened())]))
        with pytest.raises(ValueError, match="no parameter gives statistics; w: not used"):
            jc.calibrate(lambda p, x: x, {"w": jnp.ones(3)}, [self.x])

    def test_unknown_statistic(self):
        with pytest.raises(ValueError, match="unused: unknown statistic 'grams'; there are gram"):
            jc.calibrate(self.fn, self.params, [self.x], statistics=("grams",))

    def test_a_large_gram_is_left_out_unless_named(self):
        params, x = {"w": jnp.ones((20_000, 1))}, jnp.ones((1, 20_000))
        stats = jc.calibrate(self.fn, params, [x])
        assert stats["w"].gram is None and stats["w"].norm.shape == (20_000,)
        assert stats.notes["w"].startswith("no gram: 20000 features")

    def test_closed_over_data_is_data(self):
        _, stats = observe(lambda p: self.x @ p["w"], self.params)
        check(stats["w"], self.x)


def test_the_benchmark_writes_its_rows(tmp_path):
    small = ["--width", "12", "--depth", "2", "--heads", "3", "--length", "8", "--texts", "2", "--batches", "1"]
    calibration.main([*small, "--pairs", "2", "--out", str(tmp_path / "c.json")])
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    grams, defaults, _ = rows
    assert grams["extra"]["left_after_4"] == grams["extra"]["left_after_16"] == grams["extra"]["state"]
    kernels = 2 * (12 * 12 + 12 * 12 + 12 * 12 + 48 * 48)
    assert grams["extra"]["state"] == 4 * (kernels + 12 * 12 + 2 * 4 + 1)
    assert defaults["extra"]["state"] > grams["extra"]["state"]


def test_one_calibration_serves_methods_that_need_less():
    """The norm of an input is the root of the diagonal of the Gram matrix."""
    params, x = {"w": normal(0, 8, 6), "stack": normal(1, 3, 6, 6)}, normal(2, 9, 8)

    def fn(p, x):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x @ p["w"], p["stack"])[0]

    plan = jc.plan(params, [(".*", jc.quantize.GPTQ(bits=4))])
    stats = jc.calibrate(fn, params, [x], plan)
    assert stats["w"].square is None
    wanda = jc.plan(params, [(".*", jc.prune.Wanda(sparsity=0.5))])
    own = jc.compress(params, wanda, stats=jc.calibrate(fn, params, [x], wanda))
    jax.tree.map(np.testing.assert_array_equal, jc.compress(params, wanda, stats=stats), own)


LINEAR = {
    "scaled": lambda p: p["w"] * 0.5,
    "negative": lambda p: -p["w"] / 3,
    "masked by a choice": lambda p: jnp.where(jnp.eye(8, 6) > 0, 0, p["w"]),
    "masked by a product": lambda p: p["w"] * (jnp.eye(8, 6) == 0),
    "masked by a parameter": lambda p: jnp.where(p["mask"], p["w"], 0),
    "masked and cast": lambda p: (p["w"] * p["mask"]).astype(jnp.bfloat16).astype(jnp.float32),
    "scaled by a parameter for each output": lambda p: p["w"] * p["gain"],
    "scaled by a norm of another": lambda p: p["w"] * (p["gain"] / jnp.linalg.norm(p["gain"])),
    "with a low-rank term": lambda p: p["w"] + p["a"] @ p["b"],
    "transposed, then less a constant": lambda p: (1 - p["w"].T).T,
}


@pytest.mark.parametrize("name", LINEAR)
def test_a_product_that_is_linear_in_a_parameter_is_one_of_it(name):
    change, x = LINEAR[name], normal(9, 5, 8)
    params = {"w": normal(0, 8, 6), "gain": normal(1, 6), "a": normal(2, 8, 2), "b": normal(3, 2, 6)}
    params["mask"] = jnp.arange(48).reshape(8, 6) % 3 > 0
    stats = run(lambda p, x: x @ change(p), params, x)
    check(stats["w"], x)
    assert stats["w"].layout == jc.Layout() and list(stats) == ["w"]
    for path in ("gain", "a", "b"):
        assert path in stats.notes or "fold that into the weight first" in stats.unread[path]
    tree = jc.compress(params, jc.plan(params, [("w", jc.quantize.Int(bits=8)), (".*", None)]))
    want = x @ change(jc.materialize(tree))
    np.testing.assert_allclose(jc.accelerate(lambda p, x: x @ change(p))(tree, x), want, rtol=1e-5, atol=1e-5)


def test_weight_norm_is_told_to_be_folded():
    from flax import nnx

    if not hasattr(nnx, "WeightNorm"):
        pytest.skip("no weight normalization in this flax")
    layer = nnx.WeightNorm(nnx.Linear(8, 6, rngs=nnx.Rngs(0)), rngs=nnx.Rngs(0))
    graph, params, rest = nnx.split(layer, nnx.Param, ...)
    plan = jc.plan(params, [(".*kernel", jc.quantize.GPTQ(bits=4)), (".*", None)])
    with pytest.raises(ValueError, match=r"kernel: .* fold that into the weight first"):
        jc.calibrate(lambda p, x: nnx.merge(graph, p, rest)(x), params, [normal(0, 4, 8)], plan)
