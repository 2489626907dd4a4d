"""Where bytes lie: a mapped file or memory, read in ranges and streamed to a file descriptor."""

from __future__ import annotations

import errno
import mmap
import os
import stat
from pathlib import Path
from typing import Final, Protocol

import numpy as np
from numpy.typing import NDArray

from graphopt.errors import ModelError

_CHUNK: Final = 8 << 20
# errno values that say "this pair of files cannot be copied inside the kernel", not "copy failed"
_NOT_IN_KERNEL: Final = frozenset(
    {errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM}
)


class Source(Protocol):
    """Immutable bytes that can be viewed or streamed in ranges."""

    @property
    def nbytes(self) -> int:
        """Total size in bytes."""

    def view(self, offset: int, length: int) -> NDArray[np.uint8]:
        """Read-only 1-D view, no copy."""

    def copy_to(self, descriptor: int, offset: int, length: int) -> None:
        """Append the range to an open file at its current position."""


class MemorySource:
    """Bytes that a pass or the caller already holds."""

    def __init__(self, data: bytes | NDArray[np.uint8]) -> None:
        self._data = np.frombuffer(data, np.uint8) if isinstance(data, bytes) else data.view()
        self._data.flags.writeable = False

    @property
    def nbytes(self) -> int:
        return int(self._data.nbytes)

    def view(self, offset: int, length: int) -> NDArray[np.uint8]:
        return self._data[offset : offset + length]

    def copy_to(self, descriptor: int, offset: int, length: int) -> None:
        write_all(descriptor, self.view(offset, length).data)


class FileSource:
    """A file mapped read-only; the mapping outlives a rename or replacement of the path."""

    def __init__(self, path: Path) -> None:
        try:
            mode = path.stat().st_mode  # first: opening a pipe would wait for its writer
            if stat.S_ISDIR(mode):
                raise ModelError(f"{shown(path)}: this is a directory, not an ONNX file")
            if not stat.S_ISREG(mode):
                raise ModelError(f"{shown(path)}: this is not a regular file")
            with path.open("rb") as stream:
                self._descriptor = os.dup(stream.fileno())
        except FileNotFoundError:
            raise ModelError(f"{shown(path)}: no such file") from None
        except OSError as error:
            raise ModelError(f"{shown(path)}: cannot be read: {error.strerror}") from None
        except ValueError:  # a NUL in the name
            raise ModelError(f"{shown(path)}: no file can have this name") from None
        self.path = path
        status = os.fstat(self._descriptor)
        self.nbytes = status.st_size
        self.identity = (status.st_dev, status.st_ino)
        if self.nbytes == 0:
            raise ModelError(f"{shown(path)}: the file is empty")
        self.map: mmap.mmap = mmap.mmap(self._descriptor, 0, access=mmap.ACCESS_READ)

    def __del__(self) -> None:
        if (descriptor := self.__dict__.pop("_descriptor", None)) is not None:
            os.close(descriptor)

    def view(self, offset: int, length: int) -> NDArray[np.uint8]:
        return np.frombuffer(self.map, np.uint8, length, offset)

    def copy_to(self, descriptor: int, offset: int, length: int) -> None:
        end = offset + length
        if hasattr(os, "copy_file_range"):
            offset = self._copy_in_kernel(descriptor, offset, end)
        while offset < end:
            # pread rather than the map: the pages of the map would count as our memory
            chunk = os.pread(self._descriptor, min(_CHUNK, end - offset), offset)
            if not chunk:
                raise ModelError(f"{self.path}: the file became shorter while it was read")
            write_all(descriptor, memoryview(chunk))
            offset += len(chunk)

    def _copy_in_kernel(self, descriptor: int, offset: int, end: int) -> int:
        """Copy what the kernel will; returns the offset where the ordinary copy has to go on."""
        while offset < end:
            try:
                copied = os.copy_file_range(self._descriptor, descriptor, end - offset, offset)
            except OSError as error:
                if error.errno in _NOT_IN_KERNEL:
                    break
                raise
            if copied == 0:
                break
            offset += copied
        return offset


def shown(path: Path) -> str:
    """The path as messages of one line show it."""
    text = str(path)
    return text if text.isprintable() else repr(text)


def write_all(descriptor: int, data: memoryview | bytes | bytearray) -> None:
    """Write everything; `os.write` alone may stop short, at 2 GB for one."""
    view = memoryview(data).cast("B")
    while view:
        view = view[os.write(descriptor, view[: 1 << 30]) :]
