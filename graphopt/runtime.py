"""The only module that imports onnxruntime: sessions on the CPU provider and what they report.

Everything else asks this module to load, run, profile or inspect a model. onnxruntime's own log
is switched off (an optimiser that proves its results by running them must not repeat onnxruntime's
warnings to the user), and each of its exceptions becomes one `RuntimeFailure` of one clean line.
"""

from __future__ import annotations

import ctypes
import functools
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, Literal, Self

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray

from graphopt.errors import RuntimeFailure

Array = NDArray[Any]
Feed = Mapping[str, Any]
"""Input name to value: an array, a list of arrays (sequence), or None (an optional left empty)."""

Level = Literal["off", "basic", "extended", "default"]

# Severity 4 is FATAL: warnings about foreign opsets or unused initializers also go through the
# default logger, before a session's own severity is in force.
_SILENT = 4
ort.set_default_logger_severity(_SILENT)

_LEVELS = {
    "off": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "default": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
_TENSOR = re.compile(r"tensor\((\w+)\)$")


@dataclass(frozen=True)
class Port:
    """An input or output of a session, as onnxruntime declares it.

    `type` is onnxruntime's spelling (`tensor(float)`, `seq(tensor(int64))`); a dimension is a
    size, a symbol, or None when nothing is declared (an unknown rank also reads as `()`).
    """

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    @property
    def is_tensor(self) -> bool:
        """True for a dense tensor; False for sequences, optionals, maps and sparse tensors."""
        return _TENSOR.match(self.type) is not None

    @property
    def element(self) -> int | None:
        """The element type as an `onnx.TensorProto` data type; None if this is no tensor."""
        found = _TENSOR.match(self.type)
        return onnx.TensorProto.DataType.Value(found[1].upper()) if found else None

    @property
    def dtype(self) -> np.dtype[Any] | None:
        """The element type (bfloat16, float8 and int4 as ml_dtypes); None if this is no tensor."""
        return None if self.element is None else onnx.helper.tensor_dtype_to_np_dtype(self.element)

    @property
    def foreign(self) -> bool:
        """True if onnxruntime cannot exchange this tensor with numpy (bfloat16, float8, int4)."""
        # isbuiltin is 1 for numpy's own types, 2 for types that a package (ml_dtypes) registered.
        return self.dtype is not None and self.dtype.isbuiltin != 1


class Session:
    """A model loaded by onnxruntime's CPU provider.

    `model` is a path, or the bytes of a ModelProto; the external data of bytes is looked up in
    `folder`. `threads` is the size of the intra-op pool, 0 for onnxruntime's default (all cores).
    Threads sleep between runs unless `spinning`: a pool that spins takes the cores away from
    whatever is timed next. `config` holds further session configuration entries.

    Raises RuntimeFailure if onnxruntime refuses the model.
    """

    def __init__(
        self,
        model: Path | bytes,
        *,
        optimizations: Level = "default",
        threads: int = 0,
        custom_ops: Sequence[Path] = (),
        folder: Path | None = None,
        profile_prefix: Path | None = None,
        optimized_model: Path | None = None,
        memory_pattern: bool = True,
        memory_reuse: bool = True,
        spinning: bool = False,
        order: Literal["default", "priority"] = "default",
        config: Mapping[str, str] | None = None,
    ) -> None:
        options = ort.SessionOptions()
        options.log_severity_level = _SILENT
        options.graph_optimization_level = _LEVELS[optimizations]
        options.intra_op_num_threads = threads
        options.enable_mem_pattern = memory_pattern
        options.enable_mem_reuse = memory_reuse
        if order == "priority":
            options.execution_order = ort.ExecutionOrder.PRIORITY_BASED
        if profile_prefix is not None:
            options.enable_profiling = True
            options.profile_file_prefix = str(profile_prefix)
        if optimized_model is not None:
            options.optimized_model_filepath = str(optimized_model)
        entries = {"session.intra_op.allow_spinning": "1" if spinning else "0", **(config or {})}
        if folder is not None:
            entries["session.model_external_initializers_file_folder_path"] = str(folder)
        try:
            for key, value in entries.items():
                options.add_session_config_entry(key, value)
            for library in custom_ops:
                options.register_custom_ops_library(str(library))
            # A fallback would print to stdout and retry what has just failed.
            self._session: ort.InferenceSession | None = ort.InferenceSession(
                model if isinstance(model, bytes) else str(model),
                options,
                providers=["CPUExecutionProvider"],
                enable_fallback=0,
                read_config_from_model=0,
            )
        except Exception as error:
            raise failure(error) from error
        self.inputs = _ports(self._session.get_inputs())
        self.outputs = _ports(self._session.get_outputs())
        self.overridable = _ports(self._session.get_overridable_initializers())
        self._ports = {p.name: p for p in (*self.overridable, *self.outputs, *self.inputs)}
        self._foreign = frozenset(name for name, port in self._ports.items() if port.foreign)

    def run(self, feed: Feed, outputs: Sequence[str] | None = None) -> dict[str, Any]:
        """Run once and return the named outputs (all by default) by name.

        Arrays come back with the dtype the model declares, bfloat16, float8 and int4 as ml_dtypes;
        an optional output that is empty is None. Raises RuntimeFailure if the feed does not fit
        or a node fails.
        """
        names = [port.name for port in self.outputs] if outputs is None else list(outputs)
        if not names:
            return {}
        try:
            values = self.bind(feed, names)()
            if self._is_foreign(feed, names):
                values = [_from_ort(self._ports[n], v) for n, v in zip(names, values, strict=True)]
        except RuntimeFailure:
            raise
        except Exception as error:
            raise failure(error) from error
        return dict(zip(names, values, strict=True))

    def bind(self, feed: Feed, outputs: Sequence[str] | None = None) -> Callable[[], Sequence[Any]]:
        """A function that runs this feed with the least work in Python, for timing.

        It returns onnxruntime's own values and raises onnxruntime's own errors; run the feed once
        with `run` first.
        """
        session = self._open()
        names = [port.name for port in self.outputs] if outputs is None else list(outputs)
        if self._is_foreign(feed, names):
            values = {name: _to_ort(self._ports.get(name), name, v) for name, v in feed.items()}
            return functools.partial(session.run_with_ort_values, names, values)
        return functools.partial(session.run, names, _plain(feed))

    def _is_foreign(self, feed: Feed, names: Sequence[str]) -> bool:
        return not (self._foreign.isdisjoint(feed) and self._foreign.isdisjoint(names))

    def end_profiling(self) -> Path:
        """Stop profiling (the session needs a `profile_prefix`) and return the trace's path."""
        return Path(self._open().end_profiling())

    def close(self) -> None:
        """Release the session's memory and threads; running it afterwards is an error."""
        self._session = None

    def _open(self) -> ort.InferenceSession:
        if self._session is None:
            raise RuntimeFailure("the session is closed")
        return self._session

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


def _ports(arguments: Sequence[Any]) -> tuple[Port, ...]:
    return tuple(Port(a.name, a.type, tuple(a.shape)) for a in arguments)


def _plain(feed: Feed) -> dict[str, Any]:
    # onnxruntime rejects numpy scalars, which is what indexing a batch of scalars gives.
    return {
        name: np.asarray(value) if isinstance(value, np.generic | float | int) else value
        for name, value in feed.items()
    }


def _to_ort(port: Port | None, name: str, value: Any) -> ort.OrtValue:
    if port is None:
        raise RuntimeFailure(f"Invalid input name: {name}")
    if port.dtype is None or port.dtype.kind == "O":
        raise RuntimeFailure(
            f"onnxruntime cannot run a model from Python that mixes {port.type} (input "
            f"'{name}') with bfloat16, 8-bit float or 4-bit inputs or outputs"
        )
    array = np.ascontiguousarray(value).reshape(np.shape(value))
    if array.dtype != port.dtype:
        raise RuntimeFailure(f"input '{name}' is {array.dtype}, the model wants {port.dtype}")
    if not port.foreign:
        return ort.OrtValue.ortvalue_from_numpy(array)
    # onnxruntime reads ONNX's packed layout (two int4 a byte), ml_dtypes keeps one a byte. The
    # shape of the array handed over is the tensor's, so packed data leaves its tail unused.
    packed = np.frombuffer(onnx.numpy_helper.from_array(array).raw_data, np.uint8)
    if packed.size < array.size:
        memory = np.zeros(array.size, np.uint8)
        memory[: packed.size] = packed
        array = memory.reshape(array.shape)
    return ort.OrtValue.ortvalue_from_numpy_with_onnx_type(array, port.element)


def _from_ort(port: Port, value: ort.OrtValue) -> Any:
    if not value.has_value():
        return None
    if not value.is_tensor():
        raise RuntimeFailure(
            f"onnxruntime cannot return {port.type} (output '{port.name}') to Python beside "
            "bfloat16, 8-bit float or 4-bit inputs or outputs"
        )
    element = value.element_type()
    dtype = onnx.helper.tensor_dtype_to_np_dtype(element)
    if dtype.isbuiltin == 1:
        return np.array(value.numpy())
    size = value.tensor_size_in_bytes()
    raw = ctypes.string_at(value.data_ptr(), size) if size else b""
    proto = onnx.TensorProto(dims=value.shape(), data_type=element, raw_data=raw)
    return onnx.numpy_helper.to_array(proto)


def failure(error: BaseException) -> RuntimeFailure:
    """One line of what onnxruntime said, without error codes, C++ files and C++ signatures."""
    text = " ".join(str(error).split())
    text = re.sub(r"^\[ONNXRuntimeError\] : -?\d+ : \w+ : ", "", text)
    text = re.sub(
        r"Non-zero status code returned while running (\S+) node\. Name:'(.*?)' Status Message: ",
        r"\1 node '\2' failed: ",
        text,
    )
    while found := re.search(r"\S+\.(?:cc|cpp|cxx|cuh|h|hpp):\d+ ", text):
        text = text[: found.start()] + text[_signature_end(text, found.end()) :].lstrip()
    return RuntimeFailure(text.strip() or type(error).__name__)


def _signature_end(text: str, start: int) -> int:
    """Where the C++ function signature that starts at `start` ends (`start` if there is none)."""
    named = re.compile(r"\S*::[^\s(]*\(").search(text, start)
    if named is None:  # other compilers give the bare name of the function
        bare = re.compile(r"\S*::\S+").match(text, start)
        return bare.end() if bare else start
    depth = 0
    for i in range(named.end() - 1, len(text)):
        depth += (text[i] == "(") - (text[i] == ")")
        if depth == 0 and text[i + 1 : i + 2] in ("", " "):
            tail = re.compile(r"(?: const| noexcept)*(?: \[with [^\]]*\])?").match(text, i + 1)
            return tail.end() if tail else i + 1
    return start


@dataclass(frozen=True)
class Limits:
    """The newest IR version and ai.onnx opset that the installed onnxruntime and onnx both know."""

    ir: int
    opset: int


@functools.cache
def limits() -> Limits:
    """Find the limits by loading tiny models, newest first; a few milliseconds, once."""
    for ir in range(int(onnx.IR_VERSION), 2, -1):
        if _loads(ir, 13):
            break
    for opset in range(onnx.defs.onnx_opset_version(), 12, -1):
        if _loads(ir, opset):
            break
    return Limits(ir, opset)


def _loads(ir: int, opset: int) -> bool:
    value = functools.partial(
        onnx.helper.make_tensor_value_info, elem_type=onnx.TensorProto.FLOAT, shape=[1]
    )
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Identity", ["x"], ["y"])], "limits", [value("x")], [value("y")]
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", opset)])
    model.ir_version = ir
    try:
        Session(model.SerializeToString(), optimizations="off", threads=1).close()
    except RuntimeFailure:
        return False
    return True
