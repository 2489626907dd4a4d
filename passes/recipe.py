"""What pruning does to a model, as data: it makes the same file again, here or elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray

from graphopt import exporter
from graphopt.edit import Editor
from graphopt.ir import Model
from graphopt.manager import run_pipeline
from graphopt.passes.fitting import add_bias
from graphopt.passes.linear import linear_layers
from graphopt.passes.prune.channels import Cut, take_out
from graphopt.passes.prune.groups import groups_of
from graphopt.passes.prune.sparse import Sparsify

Array = NDArray[Any]


@dataclass(frozen=True)
class Stage:
    """New numbers for initializers, by name, new biases of layers, by root, and units that go.

    All names are those of the model that the stage is applied to.
    """

    weights: Mapping[str, Array] = field(default_factory=dict)
    biases: Mapping[str, Array] = field(default_factory=dict)
    cut: Cut = field(default_factory=dict)

    @classmethod
    def between(cls, before: Model, after: Editor, cut: Cut) -> Stage:
        """What leads from one model to another one of its graph, with other weights and biases."""
        known = before.graph.values
        weights, biases = {}, {}
        for value in after.model.graph.initializers:
            weight = value.weight
            assert weight is not None
            if value.name in known:
                old = known[value.name].weight
                if old is not None and old.proto is not weight.proto and _differ(old, weight):
                    weights[value.name] = np.array(weight.values)
        for layer in linear_layers(after):
            bias = None if layer.bias is None else layer.bias.value
            if bias is not None and bias.name not in known and bias.weight is not None:
                biases[layer.root] = np.array(bias.weight.values)
        return cls(weights, biases, cut)

    def apply(self, edit: Editor) -> None:
        """Change the model. Raises LookupError or ValueError where it is another one."""
        for name, array in self.weights.items():
            value = edit.model.graph.values.get(name)
            if value is None or value.weight is None:
                raise LookupError(f"there are no weights {name!r}")
            if value.weight.shape != array.shape:
                raise ValueError(f"{name!r} has the shape {value.weight.shape}, not {array.shape}")
            edit.set_weight(value, onnx.numpy_helper.from_array(array, name))
        layers = {layer.root: layer for layer in linear_layers(edit)} if self.biases else {}
        for root, bias in self.biases.items():
            if root not in layers:
                raise LookupError(f"there is no layer {root!r}")
            add_bias(edit, layers[root], bias)
        if self.cut:
            groups = {group.root: group for group in groups_of(edit)}
            if missing := set(self.cut) - set(groups):
                raise LookupError(f"there is no group {min(missing)!r}")
            take_out(edit, groups.values(), self.cut)


def _differ(old: Any, new: Any) -> bool:
    return bool(old.values.tobytes() != new.values.tobytes())


@dataclass(frozen=True)
class StagedRecipe:
    """Stages one after another; zeros are stored as such at the end where that is smaller."""

    stages: tuple[Stage, ...] = ()

    def dense(self, lossless: Path) -> Model:
        """The pruned model with all zeros in it."""
        model = Model.load(lossless)
        edit = Editor(model)
        for stage in self.stages:
            stage.apply(edit)
            edit.settle()
        return model

    def apply(self, lossless: Path) -> Model:
        """The pruned model. Raises LookupError or ValueError where it fits another one."""
        model = self.dense(lossless)
        run_pipeline(model, [Sparsify()])
        return model

    def write(self, lossless: Path, target: Path) -> list[Path]:
        """Write the model that `apply` makes; the files."""
        return exporter.save(self.apply(lossless), target)

    @property
    def arrays(self) -> dict[str, Array]:
        """All numbers that it holds, by names that say what they are."""
        found: dict[str, Array] = {}
        for number, stage in enumerate(self.stages):
            found |= {f"{number}/weights/{name}": array for name, array in stage.weights.items()}
            found |= {f"{number}/biases/{name}": array for name, array in stage.biases.items()}
            for name, units in stage.cut.items():
                found[f"{number}/cut/{name}"] = np.asarray(units, np.int64)
        return found

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> StagedRecipe:
        """The recipe of such arrays. Raises ValueError for any others."""
        stages: dict[int, dict[str, dict[str, Any]]] = {}
        for key, array in arrays.items():
            number, kind, name = key.split("/", 2)
            if kind not in ("weights", "biases", "cut"):
                raise ValueError(f"{key!r} is no part of a recipe")
            content = tuple(int(unit) for unit in array) if kind == "cut" else array
            stages.setdefault(int(number), {}).setdefault(kind, {})[name] = content
        if sorted(stages) != list(range(len(stages))):
            raise ValueError(f"there are stages {sorted(stages)}")
        return cls(tuple(Stage(**stages[number]) for number in sorted(stages)))
