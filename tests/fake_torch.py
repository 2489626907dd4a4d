"""A `torch.onnx` that replays recorded exports, as the real one writes them, without torch."""

from __future__ import annotations

import io
import os
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime

RECORDED = Path(__file__).parent / "data" / "exports"
Model = str | onnx.ModelProto  # the name of a recording, or what the exporter shall come up with


def recording(model: Model, dynamo: bool) -> onnx.ModelProto:
    """What the exporter made of the model."""
    if isinstance(model, onnx.ModelProto):
        copy = onnx.ModelProto()
        copy.CopyFrom(model)
        return copy
    return onnx.load(RECORDED / f"{model}.{'dynamo' if dynamo else 'torchscript'}.onnx")


class IrModel:
    """Stands for onnx_ir.Model: something else than a ModelProto that holds one."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto


class ONNXProgram:
    """What the dynamo exporter returns."""

    def __init__(self, model: IrModel) -> None:
        self.model = model
        self._session: onnxruntime.InferenceSession | None = None

    @property
    def model_proto(self) -> onnx.ModelProto:
        return recording(self.model.proto, True)

    def save(self, destination: str | os.PathLike[str], *, external_data: bool = False) -> None:
        save(self.model_proto, Path(destination), external_data)

    def __call__(self, *args: np.ndarray) -> list[np.ndarray]:
        if self._session is None:
            self._session = onnxruntime.InferenceSession(self.model_proto.SerializeToString())
        names = [value.name for value in self._session.get_inputs()]
        return list(self._session.run(None, dict(zip(names, args, strict=True))))

    def release(self) -> None:
        self._session = None


def save(proto: onnx.ModelProto, path: Path, external: bool, one_file: bool = True) -> None:
    """Write a model; tensors from 256 bytes on in one file beside it, or each in its own."""
    if external:
        path.with_name(f"{path.name}.data").unlink(missing_ok=True)  # torch replaces, onnx refuses
        onnx.save_model(
            recording(proto, True),
            path,
            save_as_external_data=True,
            location=f"{path.name}.data" if one_file else None,
            all_tensors_to_one_file=one_file,
            size_threshold=256,
        )
    else:
        onnx.save(proto, path)


def export(
    model: Model,
    args: tuple[Any, ...] = (),
    f: Any = None,
    *,
    dynamo: bool = True,
    external_data: bool = True,
    keep_initializers_as_inputs: bool = False,
    one_file: bool = True,
    before: Callable[[], object] = lambda: None,
) -> ONNXProgram | None:
    """Replay. `before` is called first; `one_file` is what >2 GB of TorchScript lack."""
    before()
    proto = recording(model, dynamo)
    if keep_initializers_as_inputs:
        proto.graph.input.extend(
            onnx.helper.make_tensor_value_info(t.name, t.data_type, list(t.dims))
            for t in proto.graph.initializer
        )
    if isinstance(f, str | os.PathLike):
        external = external_data if dynamo else not one_file
        save(proto, Path(f), external, one_file)
    elif dynamo and isinstance(f, io.BytesIO):
        onnx.save(proto, f)
    elif f is not None:
        f.write(proto.SerializeToString())
    return ONNXProgram(IrModel(proto)) if dynamo else None


def modules() -> dict[str, types.ModuleType]:
    """The modules to put into sys.modules."""
    torch, torch_onnx, onnx_ir = (
        types.ModuleType(name) for name in ("torch", "torch.onnx", "onnx_ir")
    )
    vars(torch_onnx).update(export=export, ONNXProgram=ONNXProgram)
    vars(torch)["onnx"] = torch_onnx
    vars(onnx_ir).update(from_proto=IrModel, load=lambda path: IrModel(onnx.load(path)))
    return {"torch": torch, "torch.onnx": torch_onnx, "onnx_ir": onnx_ir}
