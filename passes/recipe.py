"""What pruning and splitting do to a model, as data: it makes the same file again anywhere."""

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
from graphopt.passes.lowrank.forms import FORMS, METHODS, Split
from graphopt.passes.lowrank.split import by_weights, split_layers
from graphopt.passes.prune.channels import Cut, take_out
from graphopt.passes.prune.groups import groups_of
from graphopt.passes.prune.sparse import Sparsify

Array = NDArray[Any]


@dataclass(frozen=True)
class Stage:
    """New numbers for initializers, by name, new biases of layers, by root, splits and cuts.

    `splits` are of layers by root, where several read one weight that of the first, `cut` of units
    by group. All names are those of the model that the stage is applied to.
    """

    weights: Mapping[str, Array] = field(default_factory=dict)
    biases: Mapping[str, Array] = field(default_factory=dict)
    cut: Cut = field(default_factory=dict)
    splits: Mapping[str, Split] = field(default_factory=dict)

    @classmethod
    def between(
        cls,
        before: Model,
        after: Editor,
        cut: Cut | None = None,
        splits: Mapping[str, Split] | None = None,
    ) -> Stage:
        """What leads from one model to another one of its graph, with other weights and biases.

        Layers that are about to be split need no weights: their factors are all that is kept.
        """
        known, splits = before.graph.values, splits or {}
        weights, biases = {}, {}
        layers = linear_layers(after)
        gone = {layer.weights for layer in layers if layer.root in splits}
        for value in after.model.graph.initializers:
            weight = value.weight
            assert weight is not None
            if value.name in known and value not in gone:
                old = known[value.name].weight
                if old is not None and old.proto is not weight.proto and _differ(old, weight):
                    weights[value.name] = np.array(weight.values)
        for layer in layers:
            bias = None if layer.bias is None else layer.bias.value
            if bias is not None and bias.name not in known and bias.weight is not None:
                biases[layer.root] = np.array(bias.weight.values)
        return cls(weights, biases, cut or {}, splits)

    def apply(self, edit: Editor) -> None:
        """Change the model. Raises LookupError or ValueError where it is another one."""
        for name, array in self.weights.items():
            value = edit.model.graph.values.get(name)
            if value is None or value.weight is None:
                raise LookupError(f"there are no weights {name!r}")
            if value.weight.shape != array.shape:
                raise ValueError(f"{name!r} has the shape {value.weight.shape}, not {array.shape}")
            if onnx.helper.np_dtype_to_tensor_dtype(array.dtype) != value.weight.data_type:
                raise ValueError(f"{name!r} holds no {array.dtype}")
            edit.set_weight(value, onnx.numpy_helper.from_array(array, name))
        layers = {layer.root: layer for layer in linear_layers(edit)} if self.biases else {}
        for root, bias in self.biases.items():
            if root not in layers:
                raise LookupError(f"there is no layer {root!r}")
            if bias.dtype != np.float32 or bias.shape != layers[root].shape[:1]:
                raise ValueError(f"{root!r} takes no bias of {bias.dtype} {bias.shape}")
            add_bias(edit, layers[root], bias)
        self._split(edit)
        if self.cut:
            groups = {group.root: group for group in groups_of(edit)}
            if missing := set(self.cut) - set(groups):
                raise LookupError(f"there is no group {min(missing)!r}")
            take_out(edit, groups.values(), self.cut)

    def _split(self, edit: Editor) -> None:
        found = by_weights(linear_layers(edit)) if self.splits else []
        groups = {layers[0].root: layers for layers in found}
        for root, split in self.splits.items():
            if root not in groups:
                raise LookupError(f"there is no layer {root!r}")
            split_layers(edit, groups[root], split)

    @property
    def arrays(self) -> dict[str, Array]:
        """All numbers that it holds, by names that say what they are."""
        found = {f"weights/{name}": array for name, array in self.weights.items()}
        found |= {f"biases/{name}": array for name, array in self.biases.items()}
        found |= {f"cut/{name}": np.asarray(units, np.int64) for name, units in self.cut.items()}
        for root, split in self.splits.items():
            for number, factor in enumerate(split.factors):
                found[f"{split.method}.{number}/{root}"] = factor
        return found

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> Stage:
        """The stage of such arrays. Raises ValueError for any others."""
        found: dict[str, dict[str, Any]] = {"weights": {}, "biases": {}, "cut": {}}
        factors: dict[tuple[str, str], dict[int, Array]] = {}
        for key, array in arrays.items():
            kind, name = key.split("/", 1)
            method, _, number = kind.partition(".")
            if method in FORMS and number.isdecimal():
                factors.setdefault((name, method), {})[int(number)] = array
            elif kind in found:
                found[kind][name] = _units(name, array) if kind == "cut" else array
            else:
                raise ValueError(f"{key!r} is no part of a recipe")
        splits = {}
        for (name, method), parts in factors.items():
            form = next(each for each in METHODS if each == method)
            if sorted(parts) != list(range(FORMS[form].parts)):
                raise ValueError(f"{name!r} has the factors {sorted(parts)} of {method}")
            if name in splits:
                raise ValueError(f"{name!r} is split in two ways")
            splits[name] = Split(form, tuple(parts[number] for number in sorted(parts)))
        return cls(splits=splits, **found)


def _units(name: str, array: Array) -> tuple[int, ...]:
    if array.ndim != 1 or not np.issubdtype(array.dtype, np.integer):
        raise ValueError(f"{name!r} is cut by {array.dtype} of {array.ndim} axes")
    return tuple(int(unit) for unit in array)


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
        stages = enumerate(stage.arrays for stage in self.stages)
        return {
            f"{number}/{name}": array for number, arrays in stages for name, array in arrays.items()
        }

    @classmethod
    def of(cls, arrays: Mapping[str, Array]) -> StagedRecipe:
        """The recipe of such arrays. Raises ValueError for any others."""
        stages: dict[int, dict[str, Array]] = {}
        for key, array in arrays.items():
            number, _, name = key.partition("/")
            stages.setdefault(int(number), {})[name] = array
        if sorted(stages) != list(range(len(stages))):
            raise ValueError(f"there are stages {sorted(stages)}")
        return cls(tuple(Stage.of(stages[number]) for number in sorted(stages)))
