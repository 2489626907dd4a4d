"""Affine quantization: against ONNX's reference, onnxruntime, plain loops and exact fractions."""

from __future__ import annotations

from fractions import Fraction
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator

from graphopt.kernels.affine import (
    BIAS_LIMIT,
    Affine,
    asymmetric,
    bias_affine,
    channel_affine,
    dequantize,
    fake,
    limits,
    quantize,
    quantize_blocks,
    scale_for_bias,
    symmetric,
)
from graphopt.kernels.clipping import FACTORS

Array = NDArray[Any]
TYPES = [np.uint8, np.int8, np.uint16, np.int16]
ALL_TYPES = [*TYPES, ml_dtypes.uint4, ml_dtypes.int4]
floats = st.floats(-(2.0**100), 2.0**100, width=32)


def one_node(operator: str, inputs: list[Array], **attributes: Any) -> onnx.ModelProto:
    """The operator over its inputs: the first is fed, the rest are constants."""
    names = ["x", "scale", "zero"]
    kind = helper.np_dtype_to_tensor_dtype
    constants = [
        onnx.numpy_helper.from_array(v, n) for v, n in zip(inputs[1:], names[1:], strict=True)
    ]
    result = kind(inputs[2].dtype) if operator == "QuantizeLinear" else TensorProto.FLOAT
    graph = helper.make_graph(
        [helper.make_node(operator, names, ["y"], **attributes)],
        "g",
        [helper.make_tensor_value_info("x", kind(inputs[0].dtype), inputs[0].shape)],
        [helper.make_tensor_value_info("y", result, None)],
        constants,
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def reference(operator: str, *inputs: Array, **attributes: Any) -> Array:
    model = one_node(operator, list(inputs), **attributes)
    return np.asarray(ReferenceEvaluator(model).run(None, {"x": inputs[0]})[0])


def onnxruntime_gives(operator: str, *inputs: Array, **attributes: Any) -> Array:
    model = one_node(operator, list(inputs), **attributes).SerializeToString()
    session = onnxruntime.InferenceSession(model, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": inputs[0]})[0])


def attributes(affine: Affine) -> dict[str, int]:
    return {} if affine.axis is None else {"axis": affine.axis}


def ties(rng: np.random.Generator, affine: Affine, shape: tuple[int, ...]) -> Array:
    """Multiples of half a step, most of them within the range and some far beyond it."""
    low, high = limits(affine.dtype)
    halves = rng.integers(2 * (low - high), 2 * (high - low), shape).astype(np.float32)
    x = halves * np.float32(0.5) * affine.along(len(shape))[0]
    x.flat[:4] = [1e30, -1e30, 0.0, -0.0]
    return x.astype(np.float32)


@pytest.mark.parametrize("dtype", ALL_TYPES)
@pytest.mark.parametrize("axis", [None, 0, 1, 2])
def test_rounds_as_the_standard_says(dtype: Any, axis: int | None) -> None:
    rng = np.random.default_rng(0)
    shape = (3, 4, 50)
    size = () if axis is None else (shape[axis],)
    low, high = limits(dtype)
    scale = rng.choice([0.1, 0.25, 0.0073, 3.0], size).astype(np.float32)
    affine = Affine(scale, rng.integers(low, high, size), np.dtype(dtype), axis)
    x = ties(rng, affine, shape)
    q = quantize(x, affine)
    assert q.dtype == np.dtype(dtype)
    small = np.clip(x, -1e6, 1e6)  # the reference overflows int32 where the standard saturates
    expected = reference(
        "QuantizeLinear", small, affine.scale, affine.zero_point, **attributes(affine)
    )
    np.testing.assert_array_equal(q.astype(np.int32), expected.astype(np.int32))
    back = reference("DequantizeLinear", q, affine.scale, affine.zero_point, **attributes(affine))
    assert dequantize(q, affine).dtype == np.float32
    np.testing.assert_array_equal(dequantize(q, affine), back)
    np.testing.assert_array_equal(fake(x, affine), back)


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("axis", [None, 1])
def test_rounds_as_onnxruntime_does(dtype: Any, axis: int | None) -> None:
    rng = np.random.default_rng(1)
    size = () if axis is None else (5,)
    low, high = limits(dtype)
    scale = rng.choice([0.1, 0.0073], size).astype(np.float32)
    affine = Affine(scale, rng.integers(low, high, size), np.dtype(dtype), axis)
    x = ties(rng, affine, (7, 5, 40))
    x.flat[4:7] = [np.nan, np.inf, -np.inf]
    expected = onnxruntime_gives(
        "QuantizeLinear", x, affine.scale, affine.zero_point, **attributes(affine)
    )
    np.testing.assert_array_equal(quantize(x, affine), expected)


def test_a_number_is_quantized_to_a_number() -> None:
    affine = asymmetric(-1.0, 1.0)
    assert quantize(np.float32(1.0), affine).shape == ()
    assert fake(np.asarray(0.0), affine) == 0.0


@given(floats, floats, st.sampled_from(ALL_TYPES))
def test_an_asymmetric_range_is_kept_to_half_a_step(a: float, b: float, dtype: Any) -> None:
    low, high = sorted((a, b))
    affine = asymmetric(low, high, dtype)
    assert affine.scale.shape == ()
    assert fake(np.zeros(1, np.float32), affine) == 0.0
    x = np.linspace(min(low, 0.0), max(high, 0.0), 97).astype(np.float32)
    error = np.abs(fake(x, affine).astype(np.float64) - x)
    # float32 rounds x, the quotient and the product, each by 2**-24 of itself.
    slack = 4 * 2.0**-24 * max(-low, high, 0.0)
    assert error.max() <= float(affine.scale) / 2 + slack


def test_the_levels_of_a_range() -> None:
    affine = asymmetric(0.0, 6.0)
    assert (affine.zero_point, affine.scale) == (0, np.float32(6 / 255))
    affine = asymmetric(-1.0, 3.0, np.int8)
    assert affine.zero_point == round(-128 + 255 / 4)
    affine = asymmetric(2.0, 12.7, levels=(0, 127))
    assert (affine.zero_point, affine.scale) == (0, np.float32(0.1))
    assert quantize(np.float32([12.7, 20.0]), affine).tolist() == [127, 127]
    assert affine.bounds == (0.0, 127 * float(np.float32(0.1)))


@pytest.mark.parametrize("low_high", [(0.0, 0.0), (0.0, 1e-44), (-1e-44, 0.0)])
def test_a_range_of_no_width_has_a_harmless_scale(low_high: tuple[float, float]) -> None:
    affine = asymmetric(*low_high)
    assert np.isfinite(np.float32(1) / affine.scale)
    assert fake(np.zeros(3, np.float32), affine).tolist() == [0, 0, 0]
    if low_high == (0.0, 0.0):
        assert affine.scale == 1.0


@pytest.mark.parametrize("low_high", [(1.0, 0.0), (np.nan, 1.0), (0.0, np.inf)])
def test_no_range(low_high: tuple[float, float]) -> None:
    with pytest.raises(ValueError, match="no range to quantize"):
        asymmetric(*low_high)


@pytest.mark.parametrize(
    ("dtype", "bits", "middle", "largest"),
    [
        (np.int8, 8, 0, 127),
        (np.uint8, 8, 128, 127),
        (np.int8, 7, 0, 64),
        (np.uint8, 7, 128, 64),
        (ml_dtypes.int4, 4, 0, 7),
        (ml_dtypes.uint4, 4, 8, 7),
    ],
)
def test_symmetric(dtype: Any, bits: int, middle: int, largest: int) -> None:
    affine = symmetric([2.0, 0.0, 5.0], dtype, bits, axis=0)
    assert affine.zero_point.astype(int).tolist() == [middle] * 3
    np.testing.assert_array_equal(affine.scale, np.float32([2 / largest, 1.0, 5 / largest]))
    q = quantize(np.float32([2.0, 0.0, -5.0]), affine).astype(int)
    assert q.tolist() == [middle + largest, middle, middle - largest]


def test_seven_bits_saturate_where_pairs_of_products_still_fit_in_16_bits() -> None:
    q = quantize(np.float32([9.0, -9.0]), symmetric(1.0, bits=7)).astype(int)
    assert q.tolist() == [64, -64]
    assert 2 * 255 * q.max() < 2**15


def test_what_an_affine_is() -> None:
    one, same = symmetric([1.0, 2.0], axis=0), symmetric([1.0, 2.0], axis=0)
    assert one == same
    assert hash(one) == hash(same)
    others = symmetric([1.0, 2.5], axis=0), symmetric([1.0, 2.0], bits=7, axis=0), None
    assert all(one != other for other in others)
    assert one.dtype == np.dtype(np.int8)
    with pytest.raises(ValueError, match="read-only"):
        one.scale[0] = 3.0
    for scale in (0.0, -1.0, np.nan, np.inf):
        with pytest.raises(ValueError, match="not positive and finite"):
            Affine(np.float32(scale), np.int8(0), np.dtype(np.int8))
    with pytest.raises(ValueError, match="axis None"):
        Affine(np.float32([1.0]), np.int8([0]), np.dtype(np.int8))


# --------------------------------------------------------------------------------- weights


def squared_error(w: Array, affine: Affine) -> Array:
    """By channel, in float64."""
    lost = np.square(fake(w, affine).astype(np.float64) - w)
    kept = tuple(a for a in range(w.ndim) if a != affine.axis)
    return np.asarray(lost.sum(axis=kept))


@pytest.mark.parametrize(("shape", "axis"), [((5, 3, 2, 2), 0), ((7, 4), 1), ((7, 4), -1)])
@pytest.mark.parametrize("bits", [7, 8])
def test_the_largest_weight_of_each_channel_sets_its_scale(
    shape: tuple[int, ...], axis: int, bits: int
) -> None:
    w = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    affine = channel_affine(w, axis, bits=bits)
    largest = 127 if bits == 8 else 64
    assert affine.axis == axis % w.ndim
    for channel in range(shape[axis]):
        bound = np.abs(np.take(w, channel, axis)).max()
        assert affine.scale[channel] == np.float32(float(bound) / largest)


def test_one_scale_for_a_whole_weight() -> None:
    w = np.random.default_rng(0).standard_normal((300, 400)).astype(np.float32)
    affine = channel_affine(w, None)
    assert affine.axis is None
    assert affine.scale == np.float32(float(np.abs(w).max()) / 127)
    clipped = channel_affine(w, None, bits=7, method="mse")
    errors = [squared_error(w, symmetric(np.abs(w).max() * f, bits=7)) for f in FACTORS]
    assert clipped == symmetric(np.abs(w).max() * FACTORS[np.argmin(errors)], bits=7)


@pytest.mark.parametrize("dtype", [np.int8, ml_dtypes.int4])
def test_clipping_is_the_best_of_its_grid(dtype: Any) -> None:
    rng = np.random.default_rng(0)
    w = rng.standard_t(3, (6, 900)).astype(np.float32)
    found = channel_affine(w, 0, method="mse", dtype=dtype)
    bound = np.abs(w).max(axis=1).astype(np.float64)
    errors = np.stack([squared_error(w, symmetric(bound * f, dtype, axis=0)) for f in FACTORS])
    expected = symmetric(bound * FACTORS[errors.argmin(axis=0)], dtype, axis=0)
    np.testing.assert_array_equal(found.scale, expected.scale)
    assert (errors.argmin(axis=0) > 0).any()  # something was clipped at all


@given(st.integers(0, 2**32 - 1), st.sampled_from([1, 2, 5, 33]))
def test_clipping_never_costs(seed: int, length: int) -> None:
    w = np.random.default_rng(seed).standard_cauchy((4, length)).astype(np.float32)
    best, whole = channel_affine(w, 0, method="mse"), channel_affine(w, 0)
    # The search leaves out the last rounding of the product to float32.
    assert (squared_error(w, best) <= squared_error(w, whole) * (1 + 1e-5)).all()


def test_chunks_of_channels_change_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    w = np.random.default_rng(0).standard_t(3, (37, 64)).astype(np.float32)
    whole, blocks = channel_affine(w, 0, method="mse"), quantize_blocks(w, 8, method="mse")
    monkeypatch.setattr("graphopt.kernels.clipping.CHUNK", 100)
    np.testing.assert_array_equal(channel_affine(w, 0, method="mse").scale, whole.scale)
    for a, b in zip(quantize_blocks(w, 8, method="mse"), blocks, strict=True):
        np.testing.assert_array_equal(a, b)


def test_weights_that_have_no_scale() -> None:
    w = np.zeros((2, 3), np.float32)
    assert channel_affine(w, 0, method="mse").scale.tolist() == [1.0, 1.0]
    assert channel_affine(np.zeros((2, 0), np.float32), 0).scale.tolist() == [1.0, 1.0]
    w[1, 1] = np.inf
    with pytest.raises(ValueError, match="not positive and finite"):
        channel_affine(w, 0)


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("symmetric_", [True, False])
@pytest.mark.parametrize("method", ["max", "mse"])
@pytest.mark.parametrize("rows", [64, 72, 3])
def test_blocks_are_what_the_standard_undoes(
    bits: int, symmetric_: bool, method: Any, rows: int
) -> None:
    w = np.random.default_rng(0).standard_normal((rows, 5)).astype(np.float32)
    w[:16, 0] = 0.0
    w[:16, 1] = np.abs(w[:16, 1])
    q, scales, zeros = quantize_blocks(w, 16, bits, symmetric_, method)
    assert q.shape == w.shape
    assert scales.shape == zeros.shape == (-(-rows // 16), 5)
    assert q.dtype == zeros.dtype == np.dtype(f"{'' if symmetric_ else 'u'}int{bits}")
    assert not (symmetric_ and zeros.astype(int).any())
    back = reference("DequantizeLinear", q, scales, zeros, axis=0, block_size=16)
    assert back[:16, 0].tolist() == [0.0] * min(16, rows)
    if method == "max":
        steps = np.repeat(scales, 16, axis=0)[:rows]
        assert (np.abs(back - w) <= steps * (0.5 + 1e-5)).all()


@pytest.mark.parametrize("symmetric_", [True, False])
def test_blocks_by_a_plain_loop(symmetric_: bool) -> None:
    w = np.random.default_rng(0).standard_normal((20, 3)).astype(np.float32)
    q, scales, zeros = quantize_blocks(w, 8, 4, symmetric_)
    for block in range(3):
        for column in range(3):
            part = [Fraction(float(v)) for v in w[8 * block : 8 * block + 8, column]]
            low, high = min(*part, Fraction(0)), max(*part, Fraction(0))
            exact = max(low / -8, high / 7) if symmetric_ else (high - low) / 15
            scale = np.float32(float(exact))
            zero = 0 if symmetric_ else round(-low / Fraction(float(scale)))
            assert scales[block, column] == scale
            assert int(zeros[block, column]) == zero
            least, most = (-8, 7) if symmetric_ else (0, 15)
            for at, value in enumerate(part):
                expected = min(max(round(value / Fraction(float(scale))) + zero, least), most)
                assert int(q[8 * block + at, column]) == expected


@pytest.mark.parametrize("symmetric_", [True, False])
def test_clipped_blocks_lose_less(symmetric_: bool) -> None:
    w = np.random.default_rng(0).standard_t(3, (128, 40)).astype(np.float32)

    def lost(method: Any) -> Array:
        q, scales, zeros = quantize_blocks(w, 32, 4, symmetric_, method)
        scale, zero = (np.repeat(v.astype(np.float64), 32, axis=0) for v in (scales, zeros))
        error = np.square((q.astype(np.float64) - zero) * scale - w)
        return np.asarray(error.reshape(4, 32, 40).sum(axis=1))

    assert (lost("mse") <= lost("max") * (1 + 1e-5)).all()
    assert lost("mse").sum() < 0.95 * lost("max").sum()


# ---------------------------------------------------------------------------------- biases


def test_a_bias_in_the_scale_of_the_products() -> None:
    bias = np.float32([1.0, -2.5, 0.0, 1000.0])
    x_scale, w_scale = np.float32(0.02), np.float32([0.01, 0.003, 1e-30, 1e-9])
    affine, saturated = bias_affine(bias, x_scale, w_scale)
    assert affine.dtype == np.dtype(np.int32)
    assert affine.axis == 0
    np.testing.assert_array_equal(affine.scale, x_scale * w_scale)
    assert saturated.tolist() == [False, False, False, True]
    q = quantize(bias, affine)
    pairs = zip(bias.tolist(), affine.scale.tolist(), strict=True)
    exact = [round(Fraction(b) / Fraction(s)) for b, s in pairs]
    assert q.tolist() == [*exact[:3], 2**31 - 1]
    back = reference("DequantizeLinear", q, affine.scale, affine.zero_point, axis=0)
    np.testing.assert_array_equal(dequantize(q, affine), back)


@given(
    st.lists(st.floats(-(2.0**60), 2.0**60, width=32), min_size=1, max_size=5),
    st.floats(2.0**-30, 2.0**10, width=32),
    st.floats(1e-15, 1.0),
    st.booleans(),
)
def test_a_weight_scale_grows_until_the_bias_fits(
    values: list[float], x_scale: float, w_scale: float, channels: bool
) -> None:
    bias = np.float32(values)
    before = np.full(len(values) if channels else (), w_scale, np.float32)
    after = scale_for_bias(bias, np.float32(x_scale), before)
    assert after.shape == before.shape
    assert (after >= before).all()
    affine, saturated = bias_affine(bias, np.float32(x_scale), after)
    assert not saturated.any()
    least = np.abs(bias).max() if not channels else np.abs(bias).astype(np.float64)
    needed = least / (BIAS_LIMIT * float(np.float32(x_scale)))
    assert (after <= np.maximum(before, needed * (1 + 1e-6) + 1e-44)).all()
    assert affine.axis == (0 if channels else None)


def test_rounding_of_the_scales_leaves_no_bias_saturated() -> None:
    rng = np.random.default_rng(0)
    bias = np.exp(rng.uniform(-20, 20, 100_000)).astype(np.float32)
    x_scale = np.exp(rng.uniform(-9, 0, bias.shape)).astype(np.float32)
    scale = scale_for_bias(bias, x_scale, np.full(bias.shape, 1e-12, np.float32))
    assert not bias_affine(bias, x_scale, scale)[1].any()
