"""What to do to a model, as data: it makes the same file again, here or on another machine."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

from numpy.typing import NDArray

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model, Node
from graphopt.kernels.affine import Affine
from graphopt.manager import run_pipeline
from graphopt.output import ExternalPolicy
from graphopt.passes.canonicalize.remove_dead import RemoveDead
from graphopt.passes.quantize.dynamic import can_be_dynamic, make_dynamic
from graphopt.passes.quantize.embeddings import can_be_int8_table, make_int8_table
from graphopt.passes.quantize.emission import Emitter, Options
from graphopt.passes.quantize.half import can_be_half, store_half
from graphopt.passes.quantize.products import product_of
from graphopt.passes.quantize.units import Units
from graphopt.passes.quantize.weights import can_be_weight_only, make_weight_only

_PRODUCTS: Final = frozenset({"MatMul", "Gemm", "LSTM"})

STATIC: Final = "static"
DYNAMIC: Final = "dynamic"
WEIGHTS: Final = {8: "weights8", 4: "weights4"}  # by bits
TABLE: Final = "int8-table"
HALF: Final = "half"


@dataclass(frozen=True)
class Recipe:
    """Which regions take which option, by root; what is not named stays floating-point.

    `tensors` has the parameters of all activations that static regions read or give,
    `corrections` what is added to their biases.
    """

    options: Mapping[str, str]
    tensors: Mapping[str, Affine] = field(default_factory=dict)
    corrections: Mapping[str, NDArray[Any]] = field(default_factory=dict)
    weights: Options = field(default_factory=Options)

    def taking(self, option: str) -> frozenset[str]:
        """The roots of regions with this option."""
        return frozenset(root for root, taken in self.options.items() if taken == option)

    def without(self, roots: frozenset[str]) -> Recipe:
        """The same, these regions in floats."""
        kept = {root: taken for root, taken in self.options.items() if root not in roots}
        return replace(self, options=kept)

    def apply(self, lossless: Path) -> Model:
        """The lossless model with it. Raises LookupError for a region that is not there."""
        model = Model.load(lossless)
        edit = Editor(model)
        static = self.taking(STATIC)
        units = [unit for unit in Units(edit) if unit.root in static]
        if missing := static - {unit.root for unit in units}:
            raise LookupError(f"there is no region {min(missing)!r}")
        dynamic, tables = dynamic_regions(edit), table_regions(edit)
        if units:
            Emitter(edit, self.tensors, self.weights, self.corrections).emit(units)
            edit.settle()
        for root in sorted(self.taking(DYNAMIC)):
            make_dynamic(edit, _found(dynamic, root), bits=self.weights.bits)
        for bits, option in WEIGHTS.items():
            for root in sorted(self.taking(option)):
                make_weight_only(edit, _found(dynamic, root), bits=bits)
        for root in sorted(self.taking(TABLE)):
            make_int8_table(edit, _found(tables, root))
        edit.settle()
        for name in sorted(self.taking(HALF)):
            value = model.graph.values.get(name)
            if value is not None and value.consumers:  # else it is stored as integers already
                store_half(edit, value)
        edit.settle()
        run_pipeline(model, [RemoveDead()])
        return model

    def write(self, lossless: Path, target: Path, external: ExternalPolicy = "auto") -> list[Path]:
        """Write the model that `apply` makes; the files."""
        return exporter.save(self.apply(lossless), target, external)


def dynamic_regions(edit: Editor) -> dict[str, Node]:
    """Products and recurrent nodes that can be dynamic, by what they compute; bodies included."""
    found = {}
    for node in edit.model.nodes():
        if node.op in _PRODUCTS and not node.domain and can_be_dynamic(node, edit) is None:
            product = product_of(node, edit)
            result = node.outputs[0] if isinstance(product, str) else product.result
            first = result or next(value for value in node.outputs if value is not None)
            found[first.name] = node
    return found


def weight_regions(edit: Editor) -> dict[str, Node]:
    """Products whose weights alone can be stored as integers, by what they compute."""
    products = dynamic_regions(edit).items()
    return {root: node for root, node in products if can_be_weight_only(node, edit) is None}


def table_regions(edit: Editor) -> dict[str, Node]:
    """Gathers of rows of large float tables, by what they compute."""
    nodes = (n for n in edit.model.graph.nodes if n.op == "Gather" and not n.domain)
    found = ((n.outputs[0], n) for n in nodes if can_be_int8_table(n, edit) is None)
    return {value.name: node for value, node in found if value is not None}


def half_regions(edit: Editor) -> list[str]:
    """Float weights that lose nothing worth mentioning when they are stored as float16."""
    values = edit.model.graph.initializers
    return [value.name for value in values if can_be_half(value, edit) is None]


def _found(regions: Mapping[str, Node], root: str) -> Node:
    if root not in regions:
        raise LookupError(f"there is no region {root!r}")
    return regions[root]
