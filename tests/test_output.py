"""Targets: whole or not at all, whatever goes wrong; and what lies inside or beside a model."""

from __future__ import annotations

import errno
import os
import resource
import shutil
import stat
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from graphopt import exporter, output, sources
from graphopt.errors import ModelError, OutputError
from graphopt.ir import Model
from graphopt.output import Target, output_errors
from tests import graphs


def names(folder: Path) -> list[str]:
    return sorted(file.name for file in folder.iterdir())


def save(loaded: Model, path: Path, policy: output.ExternalPolicy = "auto") -> list[Path]:
    """As `graphopt.optimize` writes."""
    with Target(path) as target, output_errors(path):
        return target.commit(exporter.save(loaded, target.staged, policy))


def large(seed: int = 0) -> onnx.ModelProto:
    """A weight that is copied in the kernel: over 64 KB."""
    return graphs.matmul(graphs.weight("w", (16, 4096), seed))


# -- inside or beside ------------------------------------------------------------------------------


def test_the_policies(tmp_path: Path) -> None:
    loaded = Model.load(large())
    for policy, files in (("auto", 1), ("never", 1), ("always", 2)):
        folder = tmp_path / policy
        folder.mkdir()
        written = save(loaded, folder / "m.onnx", policy)  # type: ignore[arg-type]
        assert written == [folder / name for name in ("m.onnx", "m.onnx.data")[:files]]
        assert names(folder) == [file.name for file in written]
        assert _content(folder / "m.onnx") == _content(large())


def _content(model: Path | onnx.ModelProto) -> dict[str, bytes]:
    proto = onnx.load(model) if isinstance(model, Path) else model
    return {t.name: numpy_helper.to_array(t).tobytes() for t in proto.graph.initializer}


def test_only_initializers_go_beside() -> None:
    """onnxruntime reads no external data of attributes."""
    proto = large()
    proto.graph.node.append(graphs.node("Constant", [], ["k"], value=graphs.weight("inner")))
    loaded = Model.load(proto)
    pieces, layout = output._expand(
        loaded.proto, loaded.store, output._initializer_indices(loaded.proto, loaded.store), "x"
    )
    assert len(layout.ranges) == 1
    assert graphs.weight("inner").raw_data in b"".join(
        p if isinstance(p, bytes) else loaded.store[p.place].source.view(
            loaded.store[p.place].offset, p.length).tobytes()  # type: ignore[union-attr]
        for p in pieces
    )  # fmt: skip


def test_two_tensors_of_one_store_entry_lie_beside_once(tmp_path: Path) -> None:
    """A pass may let two initializers share what it read once."""
    proto = large()
    loaded = Model.load(proto)
    hollow = exporter.to_hollow(loaded)
    twin = hollow.graph.initializer.add()
    twin.CopyFrom(hollow.graph.initializer[0])
    twin.name = "twin"
    files = output.write(hollow, loaded.store, tmp_path / "m.onnx", "always")
    assert files[1].stat().st_size == 16 * 4096 * 4
    content = _content(tmp_path / "m.onnx")
    assert content["w"] == content["twin"] == _content(proto)["w"]


def test_typed_data_becomes_raw_beside(tmp_path: Path) -> None:
    """external_data is the flat array: int32_data of bytes or halves has to be converted."""
    values = (np.arange(3000) % 100).astype(np.float16)
    tensor = helper.make_tensor("w", TensorProto.FLOAT16, [3000], values)
    assert len(tensor.int32_data) == 3000
    out = graphs.value("y", (3000,), TensorProto.FLOAT16)
    proto = graphs.model([graphs.node("Identity", ["w"], ["y"])], [], [out], [tensor])
    files = save(Model.load(proto), tmp_path / "m.onnx", "always")
    assert files[1].read_bytes() == values.tobytes()
    np.testing.assert_array_equal(
        numpy_helper.to_array(onnx.load(files[0]).graph.initializer[0]), values
    )


@pytest.fixture
def limit_of_64_kb(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(output, "PROTO_LIMIT", 1 << 16)


@pytest.mark.usefixtures("limit_of_64_kb")
def test_over_2_gb_auto_puts_all_initializers_beside(tmp_path: Path) -> None:
    proto = large()
    proto.graph.initializer.append(graphs.weight("second"))
    written = save(Model.load(proto), tmp_path / "m.onnx")
    assert len(written) == 2
    bare = onnx.load(written[0], load_external_data=False)
    assert all(onnx.external_data_helper.uses_external_data(t) for t in bare.graph.initializer)
    assert _content(written[0]) == _content(proto)


@pytest.mark.usefixtures("limit_of_64_kb")
def test_over_2_gb_never_and_in_memory_are_refused(tmp_path: Path) -> None:
    loaded = Model.load(large())
    with pytest.raises(ModelError, match=r"the model has 262,\d+ bytes, over the 2 GB that one"):
        save(loaded, tmp_path / "m.onnx", "never")
    with pytest.raises(ModelError, match="the model exceeds the 2 GB of one ModelProto"):
        exporter.to_proto(loaded)
    assert names(tmp_path) == []


@pytest.mark.usefixtures("limit_of_64_kb")
def test_over_2_gb_even_without_initializers_is_refused(tmp_path: Path) -> None:
    constant = graphs.node("Constant", [], ["y"], value=graphs.weight("k", (20_000,)))
    proto = graphs.model([constant], [], [graphs.value("y", (20_000,))])
    with pytest.raises(ModelError, match="over 2 GB even with all initializers external"):
        save(Model.load(proto), tmp_path / "m.onnx")
    assert names(tmp_path) == []


def test_the_limit_is_protobufs() -> None:
    assert output.PROTO_LIMIT == 2**31 - 1


@pytest.mark.parametrize(
    "refusal", [errno.EXDEV, errno.ENOSYS, errno.EINVAL, errno.EOPNOTSUPP, errno.EPERM]
)
def test_what_the_kernel_will_not_copy_is_copied_by_us(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refusal: int
) -> None:
    def refuse(*_: object) -> int:
        raise OSError(refusal, os.strerror(refusal))

    path = graphs.save(large(), tmp_path / "m.onnx")
    monkeypatch.setattr(os, "copy_file_range", refuse)
    save(Model.load(path), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()


def test_a_kernel_that_copies_in_small_steps_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    genuine = os.copy_file_range
    calls = []

    def little(source: int, target: int, count: int, offset: int) -> int:
        calls.append(count)
        return genuine(source, target, min(count, 1000), offset) if len(calls) < 5 else 0

    path = graphs.save(large(), tmp_path / "m.onnx")
    monkeypatch.setattr(os, "copy_file_range", little)
    save(Model.load(path), tmp_path / "out.onnx")
    assert len(calls) == 5
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()


def test_systems_without_kernel_copy_or_reservation(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = graphs.save(graphs.matmul(graphs.weight("w", (16, 32768))), tmp_path / "m.onnx")
    monkeypatch.delattr(os, "copy_file_range")
    monkeypatch.delattr(os, "posix_fallocate")
    save(Model.load(path), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()


def test_a_file_system_that_cannot_reserve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise OSError(errno.EOPNOTSUPP, "no")

    path = graphs.save(graphs.matmul(graphs.weight("w", (16, 32768))), tmp_path / "m.onnx")
    monkeypatch.setattr(os, "posix_fallocate", refuse)
    save(Model.load(path), tmp_path / "out.onnx")
    assert (tmp_path / "out.onnx").read_bytes() == path.read_bytes()


def test_short_writes_are_continued(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    genuine = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: genuine(descriptor, data[:777]))
    save(Model.load(large()), tmp_path / "out.onnx")
    assert onnx.load(tmp_path / "out.onnx") == large()


def test_files_reach_the_disk_before_they_get_their_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    genuine_sync, genuine_replace = os.fsync, Path.replace

    def sync(descriptor: int) -> None:
        kind = "folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file"
        events.append(f"sync {kind}")
        genuine_sync(descriptor)

    def replace(self: Path, target: Path) -> Path:
        events.append(f"place {target.name}")
        return genuine_replace(self, target)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(Path, "replace", replace)
    save(Model.load(large()), tmp_path / "m.onnx", "always")
    assert events == ["sync file", "sync file", "place m.onnx.data", "place m.onnx", "sync folder"]


# -- whole or not at all ---------------------------------------------------------------------------


@pytest.fixture
def existing(tmp_path: Path) -> Path:
    path = tmp_path / "out" / "m.onnx"
    path.parent.mkdir()
    path.write_bytes(b"what was there")
    return path


def untouched(path: Path) -> None:
    assert path.read_bytes() == b"what was there"
    assert names(path.parent) == [path.name]


def test_nothing_happens_without_commit(existing: Path) -> None:
    with Target(existing) as target:
        exporter.save(Model.load(large()), target.staged)
        assert existing.read_bytes() == b"what was there"
    untouched(existing)


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt, ModelError, SystemExit])
def test_any_exception_leaves_the_target(existing: Path, error: type[BaseException]) -> None:
    def interrupted() -> None:
        with Target(existing) as target:
            exporter.save(Model.load(large()), target.staged)
            raise error("stop")

    with pytest.raises(error):
        interrupted()
    untouched(existing)


def test_a_commit_replaces_and_cleans_up(existing: Path) -> None:
    with Target(existing) as target:
        assert target.commit(exporter.save(Model.load(large()), target.staged)) == [existing]
    assert onnx.load(existing) == large()
    assert names(existing.parent) == ["m.onnx"]


def test_two_targets_at_once_do_not_meet(existing: Path) -> None:
    with Target(existing) as one, Target(existing) as other:
        files = exporter.save(Model.load(large(1)), one.staged)
        one.commit(files)
        other.commit(exporter.save(Model.load(large(2)), other.staged))
    assert onnx.load(existing) == large(2)
    assert names(existing.parent) == ["m.onnx"]


def _full(*_: object) -> int:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("call", ["write", "copy_file_range", "fsync", "posix_fallocate"])
@pytest.mark.parametrize("policy", ["never", "always"])
def test_a_full_disk(
    existing: Path, monkeypatch: pytest.MonkeyPatch, call: str, policy: output.ExternalPolicy
) -> None:
    source = graphs.save(
        graphs.matmul(graphs.weight("w", (16, 32768))), existing.parent.parent / "in"
    )
    loaded = Model.load(source)
    monkeypatch.setattr(os, call, _full)
    with pytest.raises(OutputError) as caught:
        save(loaded, existing, policy)
    assert str(caught.value) == f"{existing}: cannot be written: No space left on device"
    untouched(existing)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", folder], capture_output=True, check=False
    )
    if not mounted or mounted.returncode:
        pytest.skip("NOT TESTED: needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", folder], check=True)


@pytest.mark.parametrize("size", [1 << 18, 1 << 20], ids=["1 MB", "4 MB"])
def test_a_really_full_disk(small_disk: Path, size: int) -> None:
    """Another file system as well: the kernel may refuse to copy between the two."""
    path = small_disk / "m.onnx"
    path.write_bytes(b"what was there")
    loaded = Model.load(graphs.matmul(graphs.weight("w", (16, size // 16))))
    with pytest.raises(OutputError, match="cannot be written: No space left on device"):
        save(loaded, path)
    untouched(path)
    source = graphs.save(large(), small_disk.parent / "in.onnx")
    save(Model.load(source), path)
    assert path.read_bytes() == source.read_bytes()


def test_a_limit_on_file_size(existing: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    import signal

    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(OutputError, match="cannot be written: File too large"):
            save(Model.load(large()), existing)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        signal.signal(signal.SIGXFSZ, handler)
    untouched(existing)


# -- targets that cannot be ------------------------------------------------------------------------


def refused(path: Path, reason: str) -> None:
    with pytest.raises(OutputError) as caught:
        Target(path)
    assert str(caught.value) == f"{path}: cannot be written: {reason}"


def test_a_folder_that_does_not_exist(tmp_path: Path) -> None:
    refused(tmp_path / "no" / "m.onnx", "No such file or directory")


def test_a_folder_that_is_a_file(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    refused(tmp_path / "file" / "m.onnx", "Not a directory")


def test_a_target_that_is_a_folder(tmp_path: Path) -> None:
    refused(tmp_path, "it is a directory")
    refused(Path("/"), "it is a directory")
    refused(Path(), "it is a directory")


def test_a_target_that_is_a_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    refused(tmp_path / "pipe", "it is not a regular file")


def test_a_name_that_is_too_long(tmp_path: Path) -> None:
    refused(tmp_path / ("x" * 300), "File name too long")


def test_a_loop_of_links(tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to("b")
    (tmp_path / "b").symlink_to("a")
    refused(tmp_path / "a", "Too many levels of symbolic links")


def test_a_folder_that_takes_no_files() -> None:
    """Even root cannot write there."""
    if not Path("/proc/self").exists():
        pytest.skip("needs /proc")
    with pytest.raises(OutputError, match=r"^/proc/m[.]onnx: cannot be written: "):
        Target(Path("/proc/m.onnx"))


def test_a_read_only_file(existing: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Renaming over it would work, against the will of who set the mode. (Root may always.)"""
    monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
    refused(existing, "the file is read-only")


# -- links and modes -------------------------------------------------------------------------------


def test_the_content_behind_a_link_is_replaced(existing: Path) -> None:
    link = existing.parent.parent / "link.onnx"
    link.symlink_to(existing)
    assert save(Model.load(large()), link) == [existing]
    assert link.is_symlink()
    assert not existing.is_symlink()
    assert onnx.load(existing) == large()
    assert names(existing.parent) == ["m.onnx"]
    assert names(link.parent) == ["link.onnx", "out"]


def test_a_link_to_nothing_gets_its_file(tmp_path: Path) -> None:
    link = tmp_path / "link.onnx"
    link.symlink_to("real.onnx")
    save(Model.load(large()), link)
    assert names(tmp_path) == ["link.onnx", "real.onnx"]
    assert link.is_symlink()


def test_external_data_lies_beside_the_file_behind_a_link(existing: Path) -> None:
    """The location in the model is relative to the real file."""
    link = existing.parent.parent / "link.onnx"
    link.symlink_to(existing)
    save(Model.load(large()), link, "always")
    assert names(existing.parent) == ["m.onnx", "m.onnx.data"]
    assert _content(existing) == _content(large())


def test_a_replaced_file_keeps_its_mode(existing: Path) -> None:
    existing.chmod(0o640)
    save(Model.load(large()), existing)
    assert stat.S_IMODE(existing.stat().st_mode) == 0o640


# -- onto the input --------------------------------------------------------------------------------


def test_a_model_may_replace_its_own_input(tmp_path: Path) -> None:
    path = graphs.save(large(), tmp_path / "m.onnx")
    loaded = Model.load(path)
    save(loaded, path)
    assert onnx.load(path) == large()
    save(loaded, path)  # still reads the old bytes, of a file that has no name any more
    assert onnx.load(path) == large()


def pair(folder: Path, seed: int = 0) -> Path:
    """A model with its data beside it, laid out otherwise than ours."""
    tensor = large(seed).graph.initializer[0]
    (folder / "m.onnx.data").write_bytes(b"other layout" + tensor.raw_data)
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    for key, text in (("location", "m.onnx.data"), ("offset", "12")):
        tensor.external_data.add(key=key, value=text)
    return graphs.save(graphs.matmul(tensor), folder / "m.onnx")


@pytest.mark.parametrize("policy", ["auto", "always"])
def test_a_pair_may_replace_itself(tmp_path: Path, policy: output.ExternalPolicy) -> None:
    path = pair(tmp_path)
    loaded = Model.load(path)
    written = save(loaded, path, policy)
    assert written == [path, tmp_path / "m.onnx.data"]
    assert _content(path) == _content(large())
    assert (tmp_path / "m.onnx.data").stat().st_size == 16 * 4096 * 4
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]


def test_a_pair_that_becomes_one_file_leaves_its_old_data(tmp_path: Path) -> None:
    """Another model may use it: what we did not write we do not remove."""
    path = pair(tmp_path)
    assert save(Model.load(path), path, "never") == [path]
    assert onnx.load(path, load_external_data=False) == large()
    assert names(tmp_path) == ["m.onnx", "m.onnx.data"]


@pytest.mark.parametrize("error", [OSError(errno.EIO, "Input/output error"), KeyboardInterrupt()])
@pytest.mark.parametrize("fails_at", ["m.onnx", "m.onnx.data"])
def test_a_pair_is_restored_when_its_commit_breaks(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails_at: str, error: BaseException
) -> None:
    path = pair(tmp_path, seed=1)
    before = {name: (tmp_path / name).read_bytes() for name in names(tmp_path)}
    source = graphs.save(large(2), tmp_path.parent / "source.onnx")
    loaded = Model.load(source)
    genuine: Callable[[Path, Path], Path] = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target.name == fails_at and self.parent.name.endswith(".tmp") and self.name == fails_at:
            raise error
        return genuine(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    expected = OutputError if isinstance(error, OSError) else KeyboardInterrupt
    with pytest.raises(expected):
        save(loaded, path, "always")
    assert {name: (tmp_path / name).read_bytes() for name in names(tmp_path)} == before


@pytest.mark.parametrize("before", [None, b"what was there"])
def test_new_data_goes_again_when_its_model_cannot_be_placed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, before: bytes | None
) -> None:
    path = tmp_path / "m.onnx"
    if before is not None:
        path.write_bytes(before)
    genuine: Callable[[Path, Path], Path] = Path.replace

    def replace(self: Path, target: Path) -> Path:
        if target == path:
            raise OSError(errno.EIO, "Input/output error")
        return genuine(self, target)

    monkeypatch.setattr(Path, "replace", replace)
    with pytest.raises(OutputError, match="Input/output error"):
        save(Model.load(large()), path, "always")
    assert names(tmp_path) == ([] if before is None else ["m.onnx"])
    assert before is None or path.read_bytes() == before


def test_file_systems_without_hard_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """exFAT and many network file systems."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    monkeypatch.setattr(Path, "hardlink_to", refuse)
    path = pair(tmp_path)
    save(Model.load(path), path, "always")
    assert _content(path) == _content(large())


# -- sources ---------------------------------------------------------------------------------------


def test_memory_that_a_caller_holds_is_not_written_through_us() -> None:
    held = np.zeros(8, np.uint8)
    view = sources.MemorySource(held).view(0, 8)
    with pytest.raises(ValueError, match="read-only"):
        view[0] = 1
    held[0] = 1  # the caller's own array stays writable
    with pytest.raises(ValueError, match="read-only"):
        sources.MemorySource(b"bytes").view(0, 5)[0] = 1


def test_descriptors_are_closed(tmp_path: Path) -> None:
    folder = Path("/proc/self/fd")
    if not folder.exists():
        pytest.skip("needs /proc")
    path = graphs.save(large(), tmp_path / "m.onnx")
    before = len(list(folder.iterdir()))
    for _ in range(20):
        sources.FileSource(path)
    assert len(list(folder.iterdir())) <= before + 1
