"""Cost: against counts by hand and XLA's own analysis."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec
from zoo import ZOO, built

import jcompress as jc
from jcompress.formats import Codebook, LowRank, Masked, Quantized, Sum

LOOPS = ("scan", "lstm", "control")


def shape(*dims, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(dims, dtype)


def xla(fn, *args):
    return jax.jit(fn).lower(*args).compile().cost_analysis()


def norm(x):
    x = x - x.mean(-1, keepdims=True)
    return x * jax.lax.rsqrt(jnp.square(x).mean(-1, keepdims=True) + 1e-6)


def mlp():
    params = {f"w{i}": shape(m, n) for i, (m, n) in enumerate([(784, 300), (300, 100), (100, 10)])}

    def fn(params, x):
        x = jax.nn.relu(x @ params["w0"])
        return jax.nn.log_softmax(jax.nn.relu(x @ params["w1"]) @ params["w2"])

    return fn, params, shape(32, 784)


def cnn():
    params = {"a": shape(5, 5, 3, 16), "b": shape(3, 3, 16, 32), "depth": shape(3, 3, 1, 32), "head": shape(2048, 10)}

    def conv(x, w, stride=1, groups=1):
        numbers = ("NHWC", "HWIO", "NHWC")
        return jax.lax.conv_general_dilated(
            x, w, (stride,) * 2, "SAME", dimension_numbers=numbers, feature_group_count=groups
        )

    def fn(params, x):
        x = jax.nn.relu(conv(x, params["a"]))
        x = jax.lax.reduce_window(x, -jnp.inf, jax.lax.max, (1, 2, 2, 1), (1, 2, 2, 1), "VALID")
        x = jax.nn.relu(conv(x, params["b"], stride=2))
        x = jax.nn.relu(conv(x, params["depth"], groups=32))
        return x.reshape(x.shape[0], -1) @ params["head"]

    return fn, params, shape(8, 32, 32, 3)


def transformer(depth=2, width=64, heads=4):
    sizes = {"qkv": (width, 3 * width), "out": (width, width), "up": (width, 4 * width), "down": (4 * width, width)}
    params = {"embed": shape(100, width), "block": [{n: shape(*s) for n, s in sizes.items()} for _ in range(depth)]}

    def fn(params, tokens):
        x = params["embed"][tokens]
        for block in params["block"]:
            qkv = (norm(x) @ block["qkv"]).reshape(*x.shape[:2], 3, heads, -1)
            mixed = jax.nn.dot_product_attention(*(qkv[:, :, i] for i in range(3)), is_causal=True)
            x = x + mixed.reshape(x.shape) @ block["out"]
            x = x + jax.nn.gelu(norm(x) @ block["up"]) @ block["down"]
        return norm(x) @ params["embed"].T

    return fn, params, shape(4, 64, dtype=jnp.int32)


class TestAgainstXLA:
    @pytest.mark.parametrize("model", [mlp, cnn, transformer], ids=lambda m: m.__name__)
    def test_operations(self, model):
        fn, *args = model()
        assert jc.trace.cost(fn, *args).flops == pytest.approx(xla(fn, *args)["flops"], rel=0.02)

    @pytest.mark.parametrize("name", [e.name for e in ZOO if not e.name.startswith(LOOPS)])
    def test_zoo(self, name):
        """Before XLA fuses and repeats anything: at these sizes that moves more than the products."""
        model = built(name)
        args = model.args(8, jax.random.key(0))
        want = jax.jit(model.fn).lower(model.params, *args).cost_analysis()["flops"]
        assert jc.trace.cost(model.fn, model.params, *args).flops == pytest.approx(want, rel=0.02)

    @pytest.mark.parametrize(
        "options",
        [
            {"padding": "SAME"},
            {"padding": "SAME", "window_strides": (2, 3)},
            {"padding": ((3, 0), (1, 4)), "rhs_dilation": (2, 1)},
            {"padding": ((2, 2), (1, 1)), "lhs_dilation": (2, 3)},
            {"padding": "VALID", "feature_group_count": 2},
            {"padding": "SAME", "batch_group_count": 2},
        ],
        ids=str,
    )
    def test_convolutions(self, options):
        options = {"window_strides": (1, 1), "dimension_numbers": ("NHWC", "HWIO", "NHWC"), **options}
        groups = options.get("feature_group_count", 1)

        def fn(params, x):
            return jax.lax.conv_general_dilated(x, params["k"], **options)

        args = {"k": shape(3, 2, 4 // groups, 6)}, shape(2, 9, 8, 4)
        assert jc.trace.cost(fn, *args).flops == xla(fn, *args)["flops"]

    def test_loops_are_multiplied(self):
        """XLA counts the body once; unrolled, the two agree."""
        w = {"w": shape(7, 32, 32)}

        def scanned(params, x):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

        def unrolled(params, x):
            for i in range(7):
                x = jnp.tanh(x @ params["w"][i])
            return x

        found = jc.trace.cost(scanned, w, shape(8, 32))
        assert found.flops == xla(unrolled, w, shape(8, 32))["flops"] == 7 * 2 * 8 * 32 * 32
        assert found.rows[0].multiply_adds == 7 * 8 * 32 * 32
        assert found.transcendentals == 7 * 8 * 32

    def test_shard_map_counts_all_devices(self):
        mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(jax.sharding.AxisType.Auto,) * 2)

        def fn(params, x):
            specs = (PartitionSpec(None, "model"), PartitionSpec("data"))
            out = PartitionSpec("data", "model")
            return jax.shard_map(lambda w, x: x @ w, mesh=mesh, in_specs=specs, out_specs=out)(params["w"], x)

        (row,) = jc.trace.cost(fn, {"w": shape(6, 10)}, shape(8, 6)).rows
        assert row.multiply_adds == 8 * 6 * 10


class TestRows:
    def test_by_hand(self):
        fn, params, x = cnn()
        found = jc.trace.cost(fn, params, x)
        counts = {row.path: row.multiply_adds for row in found.rows}
        want = {"a": 8 * 32 * 32 * 75 * 16, "b": 8 * 64 * 144 * 32, "depth": 8 * 64 * 9 * 32, "head": 8 * 2048 * 10}
        assert counts == want
        head = found.rows[-1]
        assert head.parameter_bytes == head.stored_bytes == 4 * 20480
        assert head.activation_bytes == 4 * (8 * 2048 + 8 * 10)
        assert head.bit_operations == head.multiply_adds * 32 * 32
        assert found.total.multiply_adds == sum(want.values()) and found.product_multiply_adds == 0

    def test_attention_products_are_apart(self):
        found = jc.trace.cost(*transformer())
        assert found.product_multiply_adds == 2 * 2 * 4 * 64 * 64 * 64
        embed = next(row for row in found.rows if row.path == "embed")
        assert embed.multiply_adds == 4 * 64 * 64 * 100
        assert found.total.multiply_adds == found.product_multiply_adds + sum(r.multiply_adds for r in found.rows)

    def test_activation_width_counts(self):
        def fn(params, x):
            return x @ params["w"].astype(jnp.bfloat16)

        row = jc.trace.cost(fn, {"w": shape(8, 4)}, shape(3, 8, dtype=jnp.bfloat16)).rows[0]
        assert row.bit_operations == 3 * 8 * 4 * 32 * 16

    def test_a_kernel_changed_first_still_counts(self):
        def fn(params, x):
            w = params["w"] / jnp.linalg.norm(params["w"], axis=0) * params["scale"]
            return x @ w

        rows = jc.trace.cost(fn, {"w": shape(99, 100), "scale": shape(100)}, shape(3, 99)).rows
        assert [row.multiply_adds for row in sorted(rows, key=lambda r: r.path)] == [297, 29_403]

    def test_branches_and_while(self):
        def fn(params, x):
            x = jax.lax.cond(x.sum() > 0, lambda: x @ params["a"], lambda: x @ params["b"] @ params["c"])
            return jax.lax.while_loop(lambda x: x.sum() > 1, lambda x: x @ params["a"], x)

        params = {"a": shape(8, 8), "b": shape(8, 4), "c": shape(4, 8)}
        found = jc.trace.cost(fn, params, shape(5, 8))
        counts = {row.path: row.multiply_adds for row in found.rows}
        assert counts["a"] in (640, 320) and "while" in found.notes[0]
        params["c"] = params["b"] = shape(8, 8)
        found = jc.trace.cost(fn, params, shape(5, 8))
        assert {row.path: row.multiply_adds for row in found.rows} == {"a": 320, "b": 320, "c": 320}


class TestNodes:
    w = np.arange(200.0, dtype=np.float32).reshape(20, 10)

    def row(self, node, x=None):
        found = jc.trace.cost(lambda p, x: x @ p["w"], {"w": node}, shape(3, 20) if x is None else x)
        return found.rows[0]

    def test_what_each_format_multiplies(self):
        half, quarter = (np.arange(200).reshape(20, 10) % n == 0 for n in (2, 4))
        masked, factors = Masked(self.w, quarter), LowRank(self.w[:, :2], self.w[:2])
        codes = Quantized(self.w.astype(np.int8), self.w[:1], bits=4)
        book = Codebook((self.w % 3).astype(np.uint8), self.w[0, :5], clusters=5)
        for node, count, bits in [
            (self.w, 200, 32 * 200),
            (masked, 50, 32 * 50),
            (factors, 60, 32 * 60),
            (LowRank(Masked(self.w[:, :2], half[:, :2]), self.w[:2]), 40, 32 * 40),
            (codes, 200, 4 * 200),
            (book, 200, 3 * 200),
            (Masked(codes, half), 100, 4 * 100),
            (Sum((masked, factors, codes)), 310, 32 * 110 + 4 * 200),
        ]:
            row = self.row(node)
            assert row.compressed_multiply_adds == pytest.approx(3 * count)
            assert row.compressed_bit_operations == pytest.approx(3 * bits * 32)
            assert (row.multiply_adds, row.bit_operations) == (600, 600 * 32 * 32)
            assert row.stored_bytes == jc.nbits({"w": node}) / 8

    def test_the_dense_cost_serves_other_trees(self):
        fn, shapes, x = mlp()
        params = {name: jax.random.normal(jax.random.key(0), s.shape) for name, s in shapes.items()}
        dense = jc.trace.cost(fn, shapes, x)
        small = jc.compress(params, jc.plan(params, [("w[01]", jc.prune.Magnitude(0.75))]))
        assert dense.compressed(small) == jc.trace.cost(fn, small, x)
        assert dense.compressed(small).total.compressed_multiply_adds == 32 * ((784 * 300 + 300 * 100) // 4 + 1000)
        with pytest.raises(ValueError, match="other: not in both trees"):
            dense.compressed({**params, "other": params["w0"]})

    def test_stacked_layers(self):
        def fn(params, x):
            return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

        params = {"w": jax.random.normal(jax.random.key(0), (3, 16, 16))}
        small = jc.compress(params, jc.plan(params, [("w", jc.stacked(jc.factorize.SVD(rank=2)))]))
        row = jc.trace.cost(fn, small, shape(5, 16)).rows[0]
        assert row.multiply_adds == 3 * 5 * 256 and row.compressed_multiply_adds == pytest.approx(3 * 5 * 2 * 32)

    def test_an_abstract_mask_is_refused(self):
        def count(node):
            return self.row(node).stored_bytes

        with pytest.raises(ValueError, match="w: found an abstract Masked; cost reads its mask, call it outside jit"):
            jax.jit(count)(Masked(self.w, self.w > 3))

    def test_a_mask_of_shapes_counts_what_its_method_keeps(self):
        params = {"w": shape(16, 16)}
        plan = jc.plan(
            params, [("w", jc.chain(jc.prune.Magnitude(pattern=jc.prune.NM(2, 4)), jc.quantize.Int(bits=4)))]
        )
        small = jax.eval_shape(lambda p: jc.compress(p, plan), params)
        row = jc.trace.cost(lambda p, x: x @ p["w"], params, shape(5, 16)).compressed(small).rows[0]
        assert (row.multiply_adds, row.compressed_multiply_adds) == (5 * 256, 5 * 128)


class TestTable:
    def test_report_has_a_column(self):
        fn, shapes, x = mlp()
        params = {name: jax.random.normal(jax.random.key(0), s.shape) for name, s in shapes.items()}
        small = jc.compress(params, jc.plan(params, [("w[01]", jc.prune.Magnitude(0.75))]))
        cost = jc.trace.cost(fn, params, x)
        found = jc.report(params, small, cost=cost)
        assert found.rows[0].multiply_adds == 32 * 784 * 300 / 4
        assert found.total.multiply_adds == cost.compressed(small).total.compressed_multiply_adds
        head, first, *_, last = str(found).splitlines()
        assert "multiply-adds" in head and "1.88M" in first and "2.15M" in last
        assert "multiply-adds" not in str(jc.report(params, small))
        assert "<th>multiply-adds</th>" in found._repr_html_()

    def test_str(self):
        text = str(jc.trace.cost(*transformer()))
        assert text.splitlines()[0].split()[:3] == ["path", "shape", "multiply-adds"]
        assert "(between activations)" in text and text.splitlines()[-1].startswith("total")
        assert repr(jc.trace.cost(*mlp())) == "Cost(8.52M multiply-adds, 8.52M compressed)"


def test_depth_under_scan_costs_nothing():
    """The jaxpr of a scan does not grow with its length, and neither does what is walked."""

    def fn(params, x):
        return jax.lax.scan(lambda x, w: (jnp.tanh(x @ w), None), x, params["w"])[0]

    one, many = (jc.trace.cost(fn, {"w": shape(n, 8, 8)}, shape(2, 8)) for n in (1, 1000))
    assert many.flops == 1000 * one.flops


def gated(params, x):
    return x @ jax.lax.cond(x.sum() > 0, lambda: params["a"], lambda: params["b"])


def switched_by_a_parameter(params, x):
    return x @ jax.lax.cond(params["gate"].sum() > 0, lambda: params["a"], lambda: params["b"])


def adapted(params, x):
    return x @ (params["a"] + params["left"] @ params["right"]) @ params["b"]


def queried(params, x):
    queries = jnp.tanh(params["queries"]) @ params["a"]
    return jax.nn.softmax(queries @ (x @ params["b"]).T) @ x


def chosen(params, x):
    experts = jnp.stack([params["a"], params["b"]])
    return x @ experts[jnp.argmax(x.sum(0)) % 2]


def carried(params, x):
    def turn(state, _):
        w, x = state
        return (w, jnp.tanh(x @ w)), x @ params["b"]

    return jax.lax.scan(turn, (params["a"], x), None, length=3)


def outer(params, x):
    return jax.lax.dot_general(x, params["bias"], (((), ()), ((), ()))), x @ params["a"]


def counted(params, x):
    return (x > 0).astype(jnp.int32) @ params["codes"], x @ params["a"]


@pytest.mark.parametrize(
    ("fn", "weights"),
    [
        (gated, ()),
        (switched_by_a_parameter, ("a", "b")),
        (adapted, ("a", "b", "left", "right")),
        (queried, ("a", "b")),
        (chosen, ()),
        (carried, ("a", "b")),
        (outer, ("a", "bias")),
        (counted, ("a", "codes")),
    ],
    ids=lambda x: getattr(x, "__name__", None),
)
def test_cost_charges_what_accelerate_lists(fn, weights):
    params = {"a": shape(8, 8), "b": shape(8, 8)}
    params |= {"left": shape(8, 2), "right": shape(2, 8), "queries": shape(3, 8), "gate": shape(4)}
    params |= {"bias": shape(8), "codes": shape(8, 4, dtype=jnp.int32)}
    x = shape(5, 8)
    charged = {row.path for row in jc.trace.cost(fn, params, x).rows if row.multiply_adds}
    listed = {path for row in jc.accelerate(fn).report(params, x).rows for path in row.path.split(", ")}
    assert charged == listed == set(weights)


# Of branches the dearest is counted, and all are listed.
CHEAPER = {"control-plain": {"other/kernel"}}


@pytest.mark.parametrize("name", ["control-plain", "scan-linen", "lstm-linen", "encoder-nnx", "lenet-linen"])
def test_cost_charges_what_accelerate_lists_in_the_zoo(name):
    model = built(name)
    args = model.args(2, jax.random.key(1))
    charged = {row.path for row in jc.trace.cost(model.fn, model.params, *args).rows if row.multiply_adds}
    rows = jc.accelerate(model.fn).report(model.params, *args).rows
    assert charged | CHEAPER.get(name, set()) == {path for row in rows for path in row.path.split(", ")}


@pytest.mark.parametrize("n", [12, 16])
def test_fourier_transforms_are_counted_as_xla_counts_them(n):
    def fn(p, x):
        h = jnp.tanh(x @ p["up"])
        y = jnp.fft.irfft(jnp.fft.rfft(h, n=n, axis=1) * jnp.fft.rfft(p["filter"], n=n, axis=0), n=n, axis=1)
        return jnp.fft.fft2(y[:, : h.shape[1]]).real @ p["down"]

    p = {"up": jnp.ones((5, 8)), "filter": jnp.ones((6, 8)), "down": jnp.ones((8, 2))}
    x = jnp.ones((3, 6, 5))
    found = jc.trace.cost(fn, p, x)
    assert found.flops == jax.jit(fn).lower(p, x).cost_analysis()["flops"]
    log, half = n.bit_length() - 1, n // 2 + 1
    entries = 3 * n * 8 + n * 8 + 3 * half * 8  # two transforms of real numbers, and one back
    assert found.product_multiply_adds == 4 * log * entries + 4 * (2 * 3) * 3 * 6 * 8
    assert found.notes == ()


def test_what_is_not_counted_is_named():
    def fn(p, x):
        return jnp.linalg.solve(p["a"] @ p["a"].T + jnp.eye(4), x)

    notes = jc.trace.cost(fn, {"a": jnp.ones((4, 4))}, jnp.ones((4, 2))).notes
    assert any("'lu': its products are not counted" in note for note in notes)


def test_what_nothing_needs_costs_nothing_and_ties_nothing():
    """As a compiler drops it: a value that is made and left, at the top, in a call and in a loop."""

    def fn(params, x):
        def turn(h, _):
            _left = h @ params["b"] @ params["b"]
            return jnp.tanh(h @ params["b"]), None

        _left = jax.random.normal(jax.random.key(0), (64, 64)) @ params["e"]
        h, _ = jax.lax.scan(turn, jax.jit(lambda x: (x @ params["c"], x @ params["a"])[0])(x), None, length=1)
        return h @ params["d"]

    params = {name: jnp.ones((64, 64)) for name in "abce"} | {"d": jnp.ones((64, 3))}
    x = jnp.ones((8, 64))
    found = jc.trace.cost(fn, params, x)
    assert found.total.multiply_adds == 8 * 64 * (64 + 64 + 3)
    counted = jax.jit(fn).lower(params, x).cost_analysis()["flops"]
    assert found.flops == pytest.approx(counted, abs=4)  # XLA counts the turns of the loop too
    assert jc.calibrate(fn, params, [(x,)]).notes["e"] == "not used"
    groups = jc.trace.coupling(fn, params, x)
    assert groups.multiply_adds({}) == found.total.multiply_adds
    assert "nothing reads it" in groups["e[0]"].reason
