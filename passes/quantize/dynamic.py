"""Products on integers whose activations are quantized as the model runs: nothing to calibrate.

Activations become u8 by tensor, each time by their own range (DynamicQuantizeLinear), weights s8
by column. onnxruntime's CPU provider computes one reader of an activation as
DynamicQuantizeMatMul, several as MatMulIntegerToFloat behind one DynamicQuantizeLinear.
"""

from __future__ import annotations

from typing import Final

import onnx

from graphopt.edit import Editor
from graphopt.ir import Graph, Node, Value
from graphopt.kernels.affine import channel_affine, quantize
from graphopt.passes.quantize.products import Product, product_of
from graphopt.passes.quantize.recurrent import make_recurrent, recurrent_of
from graphopt.passes.quantize.site import CONTRIB, Site, import_contrib, is_visible

RULE: Final = "quantize-dynamic"
_SINCE: Final = 11  # opset of DynamicQuantizeLinear


def can_be_dynamic(node: Node, edit: Editor) -> str | None:
    """None where `make_dynamic` takes the node, else the reason why not.

    Taken are MatMul of an activation of two or more axes with a constant matrix, Gemm likewise
    (alpha and beta 1, transA 0), each with the Add of a constant bias behind it, and LSTM.
    """
    if node.op in ("LSTM", "GRU", "RNN") and not node.domain:
        found: object = recurrent_of(node, edit)
    else:
        found = product_of(node, edit)
    return found if isinstance(found, str) else None


def make_dynamic(
    edit: Editor,
    node: Node,
    *,
    bits: int = 8,
    portable: bool = False,
) -> bool:
    """Compute the node on integers; False where that change is not allowed.

    `bits` 7 is for CPUs without VNNI, which saturate sums of two products; weights are
    rounded to nearest, since what is lost with the activations is ten times as much. `portable`
    states products by standard operators (opset 11 on), which onnxruntime fuses to the
    same kernels. Raises ValueError for a node that `can_be_dynamic` has a reason against.
    """
    if node.op == "LSTM" and not node.domain:
        return make_recurrent(edit, node, bits=bits)
    product = product_of(node, edit)
    if isinstance(product, str):
        raise ValueError(f"{node.label} cannot be dynamic: {product}")
    if not edit.allows(RULE, product.result.name):
        return False
    if not portable:
        import_contrib(edit)
    affine = channel_affine(product.matrix, 1, bits=bits)
    site = Site(edit, product.nodes, RULE)
    weights = site.constant(product.owner, "int8", quantize(product.matrix, affine))
    scales = site.constant(product.owner, "scales", affine.scale)
    bias = product.stored_bias(site)
    if edit.model.opsets.get("", 1) < _SINCE:
        inputs = [product.source, weights, scales, None, bias]
        site.call("DynamicQuantizeMatMul", inputs, [product.result], CONTRIB)
    elif portable:
        _standard(site, product, weights, scales, bias)
    else:
        x, scale, zero = _quantized(site, product.source)
        inputs = [x, weights, scale, scales, zero, None, bias]
        site.call("MatMulIntegerToFloat", inputs, [product.result], CONTRIB)
    site.close()
    return True


def _standard(
    site: Site, product: Product, weights: Value, scales: Value, bias: Value | None
) -> None:
    """The product by operators of ONNX, in the order in which onnxruntime looks for them."""
    x, scale, zero = _quantized(site, product.source)
    name = product.result.name
    (sums,) = site.call("MatMulInteger", [x, weights, zero], [f"{name}/sums"])
    (wide,) = site.call("Cast", [sums], [f"{name}/float"], to=onnx.TensorProto.FLOAT)
    (steps,) = site.call("Mul", [scale, scales], [f"{name}/scales"])
    scaled = product.result if bias is None else f"{name}/scaled"
    (result,) = site.call("Mul", [wide, steps], [scaled])
    if bias is not None:
        site.call("Add", [result, bias], [product.result])


def _quantized(site: Site, source: Value) -> tuple[Value, Value, Value]:
    """u8 activations, scale and zero point: of the DynamicQuantizeLinear that is there, if any."""
    for reader in source.consumers:
        if reader.op == "DynamicQuantizeLinear" and not reader.domain:
            x, scale, zero = reader.outputs
            if x and scale and zero and _all_visible((x, scale, zero), site.node.graph):
                return x, scale, zero
    names = [f"{source.name}/{part}" for part in ("uint8", "scale", "zero_point")]
    x, scale, zero = site.call("DynamicQuantizeLinear", [source], names)
    return x, scale, zero


def _all_visible(values: tuple[Value, ...], graph: Graph) -> bool:
    return all(is_visible(value, graph) for value in values)
