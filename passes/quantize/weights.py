"""Products with weights of few bits: smaller, and faster where reading them takes the time.

onnxruntime's CPU provider computes DequantizeLinear -> MatMul as MatMulNBits, which multiplies
integers of 8 bits with activations that it quantizes by block. One row of activations takes half
the time that it takes with floats, many take no less: see `dynamic` for those.
"""

from __future__ import annotations

from typing import Any, Final, Literal

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from graphopt.edit import Editor
from graphopt.ir import Node, Value
from graphopt.kernels.affine import channel_affine, quantize, quantize_blocks
from graphopt.kernels.rounding import gptq, gptq_blocks
from graphopt.passes.quantize.products import Product, product_of
from graphopt.passes.quantize.site import CONTRIB, Site, import_contrib

RULE: Final = "quantize-weights"
BLOCKS: Final = (16, 32, 64, 128, 256)  # rows that share a scale: those that the kernel takes
_BY_BLOCK: Final = 21  # opset since which DequantizeLinear takes blocks, and 4 bits
_BY_COLUMN: Final = 13  # and columns
_WHOLE: Final = 128  # rows of a block where one scale a column cannot be stated
_ACCURACY: Final = 4  # activations are quantized to 8 bits; the others are many times slower

Array = NDArray[Any]
Rounding = Literal["nearest", "gptq"]


def can_be_weight_only(node: Node, edit: Editor) -> str | None:
    """None where `make_weight_only` takes the node, else the reason why not.

    Taken are MatMul of an activation of two or more axes with a constant matrix, and Gemm
    likewise (alpha and beta 1, transA 0), each with the Add of a constant bias behind it.
    """
    found = product_of(node, edit)
    return found if isinstance(found, str) else None


def make_weight_only(
    edit: Editor,
    node: Node,
    *,
    bits: int = 8,
    block: int | None = 128,
    rounding: Rounding = "nearest",
    gram: Array | None = None,
) -> bool:
    """Store the node's weights in 8 or 4 bits; False where that change is not allowed.

    A scale serves `block` rows of a column (one of BLOCKS), or all of them with None. 8 bits cover
    the largest weight, 4 clip to the least squared error; "gptq" rounds with the activations'
    `gram` matrix [K, K]. Stated as DequantizeLinear -> MatMul where the model's opset has it (21,
    by column and 8 bits 13) and onnxruntime fuses it, else as MatMulNBits, there with blocks of
    128 for None. Raises ValueError for other options and for a node that `can_be_weight_only` has
    a reason against.
    """
    product = product_of(node, edit)
    if isinstance(product, str):
        raise ValueError(f"{node.label} cannot have weights of {bits} bits: {product}")
    if bits not in (4, 8) or block not in (*BLOCKS, None):
        raise ValueError(f"no kernel takes {bits} bits in blocks of {block}")
    if rounding == "gptq" and gram is None:
        raise ValueError("GPTQ needs the Gram matrix of the activations")
    if not edit.allows(RULE, product.result.name):
        return False
    is_standard = _is_stated(edit.model.opsets.get("", 1), bits, block) and _fuses(product)
    used = gram if rounding == "gptq" else None
    if not is_standard:
        import_contrib(edit)
    site = Site(edit, product.nodes, RULE)
    if is_standard:
        _standard(site, product, *_stored(product.matrix, bits, block, used), block)
    else:
        size = block or _WHOLE
        _packed(site, product, *_stored(product.matrix, bits, size, used), size, bits)
    site.close()
    return True


def _is_stated(opset: int, bits: int, block: int | None) -> bool:
    """True where DequantizeLinear can say it."""
    return opset >= _BY_BLOCK or (block is None and bits == 8 and opset >= _BY_COLUMN)


def _fuses(product: Product) -> bool:
    """True where onnxruntime makes one operator of DequantizeLinear and MatMul.

    It leaves weights alone that two nodes read, and refuses a model in which two bodies read them
    from the graph around; those of one body are stored in it.
    """
    owner = product.owner
    others = any(name.startswith(f"{owner.name}/packed") for name in owner.graph.values)
    return not others and sum(owner.consumers.values()) == 1


def _stored(matrix: Array, bits: int, block: int | None, gram: Array | None) -> tuple[Array, Array]:
    """Integers [K, N], and scales [ceil(K / block), N], or [N] without blocks."""
    method: Literal["max", "mse"] = "max" if bits == 8 else "mse"
    if block is not None:
        q, scales, zeros = quantize_blocks(matrix, block, bits, method=method)
        if gram is not None:
            q = gptq_blocks(matrix, gram, scales, zeros, block)
        return q, scales
    dtype = np.int8 if bits == 8 else ml_dtypes.int4
    affine = channel_affine(matrix, 1, bits=bits, method=method, dtype=dtype)
    if gram is None:
        return quantize(matrix, affine), affine.scale
    rows = channel_affine(matrix.T, 0, bits=bits, method=method, dtype=dtype)
    return np.ascontiguousarray(gptq(matrix.T, gram, rows).T), rows.scale


def _standard(site: Site, product: Product, q: Array, scales: Array, block: int | None) -> None:
    name = product.result.name
    along: dict[str, Any] = {"axis": 1} if block is None else {"axis": 0, "block_size": block}
    inputs: list[Value | None] = [
        site.constant(product.owner, q.dtype.name, q),
        site.constant(product.owner, "scales", scales),
    ]
    # One for each reader, though weights may be shared: the runtime fuses no other.
    (weights,) = site.call("DequantizeLinear", inputs, [f"{name}/weights"], **along)
    bias = product.stored_bias(site)
    (result,) = site.call(
        "MatMul",
        [product.source, weights],
        [product.result if bias is None else f"{name}/product"],
    )
    if bias is not None:
        site.call("Add", [result, bias], [product.result])


def _packed(site: Site, product: Product, q: Array, scales: Array, block: int, bits: int) -> None:
    """MatMulNBits: columns first, each in blocks of unsigned integers around the middle."""
    rows, columns = q.shape
    blocks = len(scales)
    middle = 1 << (bits - 1)
    u: Array = np.full((blocks * block, columns), middle, np.uint8)
    u[:rows] = (q.astype(np.int16) + middle).astype(np.uint8)
    u = np.ascontiguousarray(u.T).reshape(columns, blocks, block)
    if bits == 4:
        u = u[:, :, 0::2] | u[:, :, 1::2] << 4
    inputs = [
        product.source,
        site.constant(product.owner, f"packed{bits}", u),
        site.constant(product.owner, "scales", np.ascontiguousarray(scales.T)),
        None,
        None,
        product.stored_bias(site),
    ]
    site.call(
        "MatMulNBits",
        inputs,
        [product.result],
        CONTRIB,
        K=rows,
        N=columns,
        bits=bits,
        block_size=block,
        accuracy_level=_ACCURACY,
    )
