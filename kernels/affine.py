"""Affine int8 quantization: x ~ (q - zero_point) * scale, as ONNX QuantizeLinear rounds it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
from numpy.typing import ArrayLike, DTypeLike, NDArray

from graphopt.kernels.clipping import best_factor, group_step

Array = NDArray[Any]
Method = Literal["max", "mse"]

SMALLEST_SCALE: Final = np.finfo(np.float32).tiny  # below, quotients by it may flush or overflow
BIAS_LIMIT: Final = 2.0**30  # half of an int32 accumulator is left to the products


@dataclass(frozen=True, slots=True, eq=False)
class Affine:
    """How real numbers map to integers: x ~ (q - zero_point) * scale.

    `scale` is float32, of shape [] for a tensor or [C] for channels along `axis`; `zero_point` has
    the quantized `dtype` and the same shape. `levels` are the values at which `quantize` saturates,
    None for all of the dtype as QuantizeLinear does. Raises ValueError for a scale that is not
    positive and finite.
    """

    scale: NDArray[np.float32]
    zero_point: Array
    dtype: np.dtype[Any]
    axis: int | None = None
    levels: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        scale = np.array(self.scale, np.float32)
        zero = np.array(self.zero_point, np.dtype(self.dtype))
        if scale.shape != zero.shape or scale.ndim != (self.axis is not None):
            raise ValueError(f"scale {scale.shape}, zero point {zero.shape}, axis {self.axis}")
        if not (np.isfinite(scale) & (scale > 0)).all():
            raise ValueError("a scale is not positive and finite")
        scale.flags.writeable = zero.flags.writeable = False
        object.__setattr__(self, "scale", scale)
        object.__setattr__(self, "zero_point", zero)
        object.__setattr__(self, "dtype", np.dtype(self.dtype))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Affine) and self._key() == other._key()

    def __hash__(self) -> int:
        return hash(self._key())

    def _key(self) -> tuple[Any, ...]:
        values = self.scale.tobytes(), self.zero_point.tobytes()
        return (*values, self.scale.shape, self.dtype, self.axis, self.levels)

    @property
    def limits(self) -> tuple[int, int]:
        """The lowest and highest quantized values."""
        return self.levels or limits(self.dtype)

    @property
    def bounds(self) -> tuple[Array, Array]:
        """The lowest and highest numbers that are represented, float64, shaped like the scale."""
        zero = self.zero_point.astype(np.float64)
        low, high = self.limits
        return (low - zero) * self.scale, (high - zero) * self.scale

    def along(self, rank: int) -> tuple[NDArray[np.float32], NDArray[np.int32]]:
        """Scale and zero point (int32) shaped to broadcast against a tensor of this rank."""
        shape = [1] * rank
        if self.axis is not None:
            shape[self.axis] = self.scale.size
        scale, zero = self.scale, self.zero_point.astype(np.int32)
        return (scale, zero) if self.axis is None else (scale.reshape(shape), zero.reshape(shape))


def limits(dtype: DTypeLike) -> tuple[int, int]:
    """The lowest and highest value of an integer type, INT4 and UINT4 of ml_dtypes included."""
    kind = np.dtype(dtype)
    if kind.kind in "iu":
        info = np.iinfo(kind)
        return int(info.min), int(info.max)
    return {np.dtype(ml_dtypes.int4): (-8, 7), np.dtype(ml_dtypes.uint4): (0, 15)}[kind]


def asymmetric(
    low: float, high: float, dtype: DTypeLike = np.uint8, levels: tuple[int, int] | None = None
) -> Affine:
    """The affine map of [low, high], widened to contain 0, onto all of `dtype`, or `levels` of it.

    Zero is represented exactly, so either end may be clipped by half a step. A range of zero width
    has scale 1. With `levels` (0..127 for CPUs without VNNI) `quantize` saturates there, where
    QuantizeLinear at run time goes on to the ends of the dtype. Raises ValueError for bounds that
    are not finite or not in order.
    """
    if not (np.isfinite(low) and np.isfinite(high) and low <= high):
        raise ValueError(f"no range to quantize: [{low}, {high}]")
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    first, last = levels or limits(dtype)
    scale = _positive(np.asarray(high / (last - first) - low / (last - first)))
    zero = np.clip(np.rint(first - low / float(scale)), first, last)
    return Affine(scale, zero.astype(np.int32), np.dtype(dtype), levels=levels)


def symmetric(
    bound: ArrayLike, dtype: DTypeLike = np.int8, bits: int = 8, axis: int | None = None
) -> Affine:
    """The affine map of [-bound, bound] around the middle of `dtype` (0, or 128 for uint8).

    `bound` is a number, or [C] with an `axis`; zero has scale 1. With fewer `bits` than the dtype
    has, the bound maps to 2**(bits - 1): bits=7 gives -64..64, the most that u8 x s8 products can
    have on CPUs without VNNI, which add pairs of them in 16 bits (255 * 64 * 2 < 2**15).
    """
    first, last = limits(dtype)
    middle = (first + last + 1) // 2
    largest = min(2 ** (bits - 1), last - middle)
    bounds = np.asarray(bound, np.float64)
    full = 2**bits > last - first
    return Affine(
        _positive(bounds / largest),
        np.full(bounds.shape, middle),
        np.dtype(dtype),
        axis,
        None if full else (middle - largest, middle + largest),
    )


def quantize(x: ArrayLike, affine: Affine) -> Array:
    """Integers of `affine.dtype`, in x's shape, exactly as ONNX QuantizeLinear gives them.

    x / scale in float32, rounded half to even, plus the zero point, saturated; a NaN becomes the
    lowest value, as onnxruntime has it. Into int32 (biases) the arithmetic is float64.
    """
    wide = np.float64 if affine.dtype.itemsize >= 4 else np.float32
    scale, zero = affine.along(np.ndim(x))
    low, high = affine.limits
    q = np.empty(np.shape(x), wide)
    np.rint(np.divide(np.asarray(x, wide), scale, out=q), out=q)
    # Saturated before the zero point is added, where nothing can overflow; fmax drops a NaN.
    np.fmax(q, (low - zero).astype(wide), out=q)
    np.fmin(q, (high - zero).astype(wide), out=q)
    q += zero.astype(wide)
    return q.astype(affine.dtype)


def dequantize(q: ArrayLike, affine: Affine) -> NDArray[np.float32]:
    """float32 (q - zero_point) * scale, exactly as ONNX DequantizeLinear gives it."""
    scale, zero = affine.along(np.ndim(q))
    steps = np.asarray(q).astype(np.int32)
    steps -= zero
    x = steps.astype(np.float32)
    x *= scale
    return x


def fake(x: ArrayLike, affine: Affine) -> NDArray[np.float32]:
    """What is left of x after quantizing and back, float32."""
    return dequantize(quantize(x, affine), affine)


def channel_affine(
    w: Array,
    axis: int | None,
    *,
    bits: int = 8,
    method: Method = "max",
    dtype: DTypeLike = np.int8,
) -> Affine:
    """A symmetric map for each channel of a weight along `axis`, or for all of it with None.

    "max" covers the largest magnitude; "mse" clips to the share of it, of forty, that has the
    least squared error. Raises ValueError for weights that are not finite.
    """
    if axis is not None:
        axis = range(np.ndim(w))[axis]
    rows = np.reshape(w, (1, -1)) if axis is None else np.moveaxis(w, axis, 0)
    rows = rows.reshape(len(rows), -1, 1)
    bound = np.zeros(len(rows))
    if rows.size:
        bound = np.maximum(rows.max(axis=(1, 2)), -rows.min(axis=(1, 2))).astype(np.float64)
    whole = symmetric(bound, dtype, bits, axis=0)
    if method == "mse":
        step = group_step(rows.shape)
        for start in range(0, len(rows), step):
            part = slice(start, start + step)

            def encode(factor: Array, part: slice = part) -> tuple[Array, Array]:
                shrunk = symmetric((bound[part] * factor).ravel(), dtype, bits, axis=0)
                return shrunk.along(3)

            chunk = rows[part].astype(np.float32)
            bound[part] *= best_factor(chunk, encode, whole.limits).ravel()
    return symmetric(bound[0] if axis is None else bound, dtype, bits, axis)


def quantize_blocks(
    w: Array, block: int, bits: int = 4, symmetric: bool = True, method: Method = "max"
) -> tuple[Array, NDArray[np.float32], Array]:
    """A weight [K, N] in blocks of `block` rows, as DequantizeLinear-21 with axis 0 undoes it.

    Returns q [K, N], scales float32 and zero points [ceil(K / block), N]; the last block may be
    shorter. Symmetric gives INT4 or int8 (4 or 8 `bits`) with zero points 0, else UINT4 or uint8.
    "mse" clips both ends of each block by the share that has the least squared error.
    """
    signed, unsigned = {4: (ml_dtypes.int4, ml_dtypes.uint4), 8: (np.int8, np.uint8)}[bits]
    dtype = np.dtype(signed if symmetric else unsigned)
    rows, columns = w.shape
    count = -(-rows // block)
    q = np.empty((count * block, columns), dtype)
    scales = np.empty((count, columns), np.float32)
    zeros = np.empty((count, columns), dtype)
    step = group_step((count, block, columns))
    for start in range(0, count, step):
        stop = min(count, start + step)
        part = w[start * block : stop * block].astype(np.float32)
        # Zeros neither widen a range, which contains 0 anyway, nor have an error.
        part = np.pad(part, ((0, (stop - start) * block - len(part)), (0, 0)))
        done = _blocks(part.reshape(stop - start, block, columns), dtype, symmetric, method)
        q[start * block : stop * block] = done[0].reshape(-1, columns)
        scales[start:stop], zeros[start:stop] = done[1], done[2]
    return q[:rows], scales, zeros


def _blocks(
    x: Array, dtype: np.dtype[Any], symmetric: bool, method: Method
) -> tuple[Array, Array, Array]:
    first, last = limits(dtype)
    low = np.minimum(x.min(axis=1, keepdims=True), 0.0).astype(np.float64)
    high = np.maximum(x.max(axis=1, keepdims=True), 0.0).astype(np.float64)

    def encode(factor: Array) -> tuple[Array, Array]:
        bottom, top = low * factor, high * factor
        if symmetric:  # the dtype reaches one step further down than up
            scale = _positive(np.maximum(bottom / first, top / last))
            return scale, np.zeros(scale.shape, np.int32)
        scale = _positive((top - bottom) / (last - first))
        zero = np.clip(np.rint(first - bottom / scale), first, last)
        return scale, zero.astype(np.int32)

    factor = np.ones((1, 1, 1))
    if method == "mse":
        factor = best_factor(x, encode, (first, last))
    scale, zero = encode(factor)
    q = np.clip(np.rint(x / scale), first - zero, last - zero) + zero
    return q.astype(dtype), scale[:, 0], zero[:, 0].astype(dtype)


def bias_affine(
    bias: Array, x_scale: ArrayLike, w_scale: ArrayLike
) -> tuple[Affine, NDArray[np.bool_]]:
    """The int32 map of a bias [C], whose scale x_scale * w_scale the integer kernels presume.

    `w_scale` is a number or [C]. Also returns where the bias [C] would take more than half of an
    int32 accumulator: there the weight's scale has to grow, see `scale_for_bias`.
    """
    product = np.asarray(x_scale, np.float64) * np.asarray(w_scale, np.float64)
    scale = np.maximum(product, SMALLEST_SCALE).astype(np.float32)
    axis = 0 if scale.ndim else None
    affine = Affine(scale, np.zeros(scale.shape, np.int32), np.dtype(np.int32), axis)
    return affine, np.abs(bias, dtype=np.float64) > BIAS_LIMIT * scale


def scale_for_bias(bias: Array, x_scale: ArrayLike, w_scale: ArrayLike) -> NDArray[np.float32]:
    """The least weight scale, from `w_scale` up and of its shape, at which the bias [C] fits.

    Channels of all but dead weights have so small a scale that their bias saturates at it.
    """
    scale = np.asarray(w_scale, np.float32)
    magnitude = np.abs(np.asarray(bias, np.float32)).astype(np.float64)
    need = magnitude / (BIAS_LIMIT * np.asarray(x_scale, np.float64))
    need = need if scale.ndim else np.asarray(need.max(initial=0.0))
    # A product that is no less than the bias, itself a float32, is not rounded below it.
    above = np.nextafter(need.astype(np.float32), np.float32(np.inf))
    return np.maximum(scale, np.where(need > 0, above, np.float32(0))).astype(np.float32)


def _positive(scale: Array) -> NDArray[np.float32]:
    """A scale in float32: 1 where it is zero, and not so small that quotients overflow."""
    safe = np.where(scale == 0, 1.0, np.maximum(scale, SMALLEST_SCALE))
    return np.asarray(safe).astype(np.float32)
