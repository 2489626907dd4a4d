"""Feeds that the user gives: streamed one at a time, whatever the size of the data set.

`--data` takes
* an .npz with one array per input. Where an array has the rank of its input, axis 0 is the batch
  and every row a sample; with one axis more, axis 0 enumerates whole feeds;
  an array without axes is the same in every feed;
* a directory of .npz files, each one feed;
* `module:function` or `file.py:function`, which returns an iterable of feeds (dicts of arrays).

Ranks and batch sizes are settled by running the model, since declarations can be wrong.
"""

from __future__ import annotations

import importlib
import importlib.util
import itertools
import zipfile
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import IO, Any, Final, Literal

import numpy as np

from graphopt.errors import DataError
from graphopt.runtime import Array, Port, Session

Mode = Literal["rows", "feeds"]
Attempt = Callable[[Mapping[str, Any]], str | None]
"""Runs a feed: None where the model accepts it, else the reason."""

_MAX_MODES: Final = 32  # combinations of modes worth trying
# What reading an array out of a broken archive raises, by where it is broken.
_DAMAGE: Final = (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error)


def given_feeds(spec: str, session: Session, limit: int | None = None) -> Iterator[dict[str, Any]]:
    """The feeds that `spec` names, checked against the session's inputs; at most `limit`.

    Raises DataError for a file that cannot be read, a missing input, or a shape or type that the
    model rejects.
    """
    ports = {port.name: port for port in session.inputs}
    optional = {port.name: port for port in session.overridable}

    def attempt(feed: Mapping[str, Any]) -> str | None:
        return refusal(session, _checked(spec, feed, ports, optional))

    path = Path(spec)
    if path.is_dir():
        feeds = _directory(path)
    elif path.suffix == ".npz" or path.is_file():
        feeds = _npz(path, ports, optional, attempt)
    elif ":" in spec:
        feeds = _function(spec)
    else:
        raise DataError(
            f"data {spec}: no such file or directory (an .npz, a directory of .npz, or "
            "module:function)"
        )
    checked = (_checked(spec, feed, ports, optional) for feed in feeds)
    first = next(checked, None)
    if first is None:
        raise DataError(f"data {spec}: there are no feeds in it")
    if (reason := attempt(first)) is not None:
        raise DataError(f"data {spec}: the model rejects the first feed: {reason}")
    return itertools.islice(itertools.chain([first], checked), limit)


def refusal(session: Session, feed: Mapping[str, Any]) -> str | None:
    """None where the model runs on the feed, else onnxruntime's reason in one line."""
    from graphopt.errors import RuntimeFailure

    try:
        session.run(feed)
    except RuntimeFailure as failure:
        return str(failure)
    return None


def _checked(
    spec: str, feed: Mapping[str, Any], ports: Mapping[str, Port], optional: Mapping[str, Port]
) -> dict[str, Any]:
    """The feed restricted to the model's inputs, each cast to its type where that is safe."""
    missing = [name for name in ports if name not in feed]
    if missing:
        raise DataError(
            f"data {spec}: input {missing[0]!r} is missing; the model reads "
            f"{', '.join(ports)}, the data has {', '.join(feed) or 'nothing'}"
        )
    known = {**ports, **optional}
    return {name: _cast(spec, known[name], feed[name]) for name in feed if name in known}


def _cast(spec: str, port: Port, value: Any) -> Any:
    if port.dtype is None or value is None or isinstance(value, list):
        return value
    array = np.asarray(value)
    if array.dtype == port.dtype or port.dtype.kind in "OUS":
        return array
    if array.dtype.kind == "V" and port.foreign and array.itemsize == port.dtype.itemsize:
        return array.view(port.dtype)  # .npy files do not name the types of ml_dtypes
    if not np.can_cast(array.dtype, port.dtype, "same_kind"):
        raise DataError(
            f"data {spec}: input {port.name!r} is {array.dtype}, the model reads {port.dtype}"
        )
    with np.errstate(over="ignore"):
        cast = array.astype(port.dtype)
    if array.dtype.kind in "iu" and not np.array_equal(cast.astype(array.dtype), array):
        raise DataError(
            f"data {spec}: input {port.name!r} holds integers beyond {port.dtype}, "
            "which the model reads"
        )
    return cast


def _directory(folder: Path) -> Iterator[dict[str, Any]]:
    for file in sorted(folder.glob("*.npz")):
        with _open(file) as archive:
            names = archive.files
        yield {name: _array(file, name) for name in names}


def _open(file: Path) -> Any:
    try:
        archive = np.load(file, allow_pickle=False)
    except FileNotFoundError:
        raise DataError(f"data {file}: no such file") from None
    except (OSError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"data {file}: not an .npz file ({error})") from None
    if not isinstance(archive, np.lib.npyio.NpzFile):
        raise DataError(f"data {file}: a single array; save it by name, np.savez(f, input=array)")
    return archive


def _function(spec: str) -> Iterator[dict[str, Any]]:
    module_name, _, name = spec.rpartition(":")
    try:
        module = load_module(module_name)
        feeds = getattr(module, name)()
        if not isinstance(feeds, Iterable):
            raise DataError(f"data {spec}: {name}() returns {type(feeds).__name__}, not feeds")
        for feed in feeds:
            if not isinstance(feed, Mapping):
                kind = type(feed).__name__
                raise DataError(f"data {spec}: a feed is a dict of arrays, not {kind}")
            yield dict(feed)
    except DataError:
        raise
    except Exception as error:  # the user's own code: whatever it raises is the answer
        said = " ".join(str(error).split())
        raise DataError(f"data {spec}: {type(error).__name__}: {said}") from error


def load_module(name: str) -> Any:
    """A module by dotted name, or by path if it ends in .py."""
    if not name.endswith(".py"):
        return importlib.import_module(name)
    specification = importlib.util.spec_from_file_location(Path(name).stem, name)
    if specification is None or specification.loader is None:
        raise ImportError(f"{name} cannot be imported")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


def _npz(
    file: Path, ports: Mapping[str, Port], optional: Mapping[str, Port], attempt: Attempt
) -> Iterator[dict[str, Any]]:
    """Feeds of one archive, read row by row, in the layout that the model accepts."""
    with _open(file) as archive:
        present = archive.files
    wanted = {name: port for name, port in {**optional, **ports}.items() if name in present}
    missing = [name for name in ports if name not in present]
    if missing or not wanted:
        return iter([dict.fromkeys(present)])  # `_checked` says what is missing
    headers = {name: _header(file, name) for name in wanted}
    scalars = {name: _array(file, name) for name, shape in headers.items() if not shape}
    wanted = {name: port for name, port in wanted.items() if name not in scalars}
    headers = {name: shape for name, shape in headers.items() if shape}
    if not wanted:
        return iter([scalars])
    if len({shape[0] for shape in headers.values()}) != 1:
        listed = ", ".join(f"{name} {list(shape)}" for name, shape in headers.items())
        raise DataError(f"data {file}: the arrays disagree about the number of samples: {listed}")
    reasons: list[str] = []
    for modes, batch in _layouts(wanted, headers):
        first = next(_rows(file, wanted, modes, batch), None)
        if first is None:
            continue
        if (reason := attempt(scalars | first)) is None:
            return (scalars | feed for feed in _rows(file, wanted, modes, batch))
        reasons.append(reason)
    raise DataError(
        f"data {file}: the model rejects it: {reasons[0] if reasons else 'there are no samples'}"
    )


def _layouts(
    wanted: Mapping[str, Port], headers: Mapping[str, tuple[int, ...]]
) -> Iterator[tuple[dict[str, Mode], int]]:
    """How the arrays may be meant, the declared way first: modes per input, rows per feed."""
    declared: dict[str, Mode] = {
        name: "feeds" if _has_feed_axis(headers[name], port) else "rows"
        for name, port in wanted.items()
    }
    fixed = [
        port.shape[0]
        for name, port in wanted.items()
        if declared[name] == "rows" and port.shape and isinstance(port.shape[0], int)
    ]
    batch = next((size for size in fixed if size > 1), 1)
    options: Sequence[Mode] = ("rows", "feeds")
    every = itertools.product(options, repeat=len(wanted))
    combinations = [declared, *(dict(zip(wanted, modes, strict=True)) for modes in every)]
    for modes in combinations[:_MAX_MODES]:
        if batch > 1 and "feeds" not in modes.values():
            yield modes, batch
        yield modes, 1


def _has_feed_axis(shape: tuple[int, ...], port: Port) -> bool:
    # an unknown rank reads as (), as a scalar does: only a single axis can enumerate scalars
    return len(shape) > len(port.shape) if port.shape else len(shape) == 1


def _rows(
    file: Path, names: Iterable[str], modes: Mapping[str, Mode], batch: int
) -> Iterator[dict[str, Any]]:
    """Feeds of `batch` rows each; only those rows are ever in memory. A last, short one is left."""
    with ExitStack() as stack:
        archive = stack.enter_context(zipfile.ZipFile(file))
        streams = {name: stack.enter_context(archive.open(f"{name}.npy")) for name in names}
        try:
            readers = {name: _Rows(stream) for name, stream in streams.items()}
        except _DAMAGE as error:
            raise DataError(f"data {file}: damaged: {error}") from None
        count = min(reader.count for reader in readers.values())
        for _ in range(count // batch):
            try:
                chunks = {name: reader.next(batch) for name, reader in readers.items()}
            except _DAMAGE as error:
                raise DataError(f"data {file}: damaged: {error}") from None
            yield {
                name: chunk if modes[name] == "rows" else chunk[0] for name, chunk in chunks.items()
            }


class _Rows:
    """Rows of one .npy stream, in order."""

    def __init__(self, stream: IO[bytes]) -> None:
        self._stream = stream
        self.shape, fortran, self.dtype = _npy_header(stream)
        self.count = self.shape[0] if self.shape else 0
        self._whole: Array | None = None
        self._at = 0
        if fortran:  # rows do not lie together: there is no way but to read it all
            data = np.frombuffer(stream.read(), self.dtype)
            self._whole = data.reshape(self.shape, order="F")

    def next(self, rows: int) -> Array:
        start, self._at = self._at, self._at + rows
        if self._whole is not None:
            return np.ascontiguousarray(self._whole[start : self._at])
        shape = (rows, *self.shape[1:])
        size = int(np.prod(shape)) * self.dtype.itemsize
        return np.frombuffer(self._stream.read(size), self.dtype).reshape(shape)


def _header(file: Path, name: str) -> tuple[int, ...]:
    try:
        with zipfile.ZipFile(file) as archive, archive.open(f"{name}.npy") as stream:
            return _npy_header(stream)[0]
    except (*_DAMAGE, KeyError) as error:
        raise DataError(f"data {file}: {name} cannot be read: {error}") from None


def _array(file: Path, name: str) -> Array:
    """One array of an archive as a whole."""
    with _open(file) as archive:
        try:
            return np.asarray(archive[name])
        except _DAMAGE as error:
            raise DataError(f"data {file}: {name} cannot be read: {error}") from None


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of an .npy stream, left at its first value."""
    version = np.lib.format.read_magic(stream)
    read = (
        np.lib.format.read_array_header_1_0
        if version == (1, 0)
        else np.lib.format.read_array_header_2_0
    )
    shape, fortran, dtype = read(stream)
    if dtype.hasobject:
        raise ValueError("it holds Python objects")
    return tuple(shape), bool(fortran), dtype
