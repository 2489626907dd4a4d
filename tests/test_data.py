"""Feeds that a user gives: every layout, every mistake, and memory that does not grow."""

from __future__ import annotations

import itertools
import tracemalloc
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from graphopt.data import given_feeds, load_module, refusal
from graphopt.errors import DataError
from graphopt.runtime import Session
from tests.graphs import CONDITION, graph, if_node, model, node, parsed, value

Array = NDArray[Any]
RNG = np.random.default_rng(0)


def session(proto: onnx.ModelProto) -> Session:
    return Session(proto.SerializeToString(), optimizations="off")


def identity(
    shape: tuple[int | str, ...] | None, element: int = TensorProto.FLOAT, op: str = "Identity"
) -> Session:
    output = value("y", None, element)
    return session(model([node(op, ["x"], ["y"])], [value("x", shape, element)], [output]))


def npz(path: Path, **arrays: Any) -> str:
    np.savez(path, **arrays)
    return str(path)


def read(spec: str | Path, running: Session, limit: int | None = None) -> list[dict[str, Any]]:
    return list(given_feeds(str(spec), running, limit))


def rejected(spec: str | Path, running: Session) -> str:
    """The one line that a user sees."""
    with pytest.raises(DataError) as caught:
        read(spec, running)
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"data {spec}") or spec in map(str, Path(str(spec)).parents)
    return message


# ------------------------------------------------------------------------------- layouts of .npz


def test_rows_of_an_array_with_the_inputs_rank_are_samples(tmp_path: Path) -> None:
    rows = RNG.normal(size=(5, 4)).astype(np.float32)
    feeds = read(npz(tmp_path / "d.npz", x=rows), identity(("N", 4)))
    assert [feed["x"].shape for feed in feeds] == [(1, 4)] * 5
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in feeds]), rows)


def test_one_axis_more_enumerates_whole_feeds(tmp_path: Path) -> None:
    whole = RNG.normal(size=(3, 2, 4)).astype(np.float32)
    feeds = read(npz(tmp_path / "d.npz", x=whole), identity(("N", 4)))
    assert [feed["x"].shape for feed in feeds] == [(2, 4)] * 3
    np.testing.assert_array_equal(np.stack([feed["x"] for feed in feeds]), whole)


def test_inputs_may_differ_in_layout(tmp_path: Path) -> None:
    both = session(
        model(
            [node("Mul", ["x", "s"], ["y"])],
            [value("x", ("N", 4)), value("s", ())],
            [value("y", None)],
        )
    )
    rows, factors = RNG.normal(size=(3, 4)).astype("f"), np.arange(3, dtype="f")
    feeds = read(npz(tmp_path / "d.npz", x=rows, s=factors), both)
    assert [(feed["x"].shape, feed["s"].shape) for feed in feeds] == [((1, 4), ())] * 3
    assert [float(feed["s"]) for feed in feeds] == [0.0, 1.0, 2.0]


def test_an_array_without_axes_is_the_same_in_every_feed(tmp_path: Path) -> None:
    both = session(
        model(
            [node("Mul", ["x", "s"], ["y"])],
            [value("x", ("N", 4)), value("s", ())],
            [value("y", None)],
        )
    )
    feeds = read(npz(tmp_path / "d.npz", x=np.ones((3, 4), "f"), s=np.float32(7)), both)
    assert [float(feed["s"]) for feed in feeds] == [7.0] * 3


def test_only_arrays_without_axes_are_one_feed(tmp_path: Path) -> None:
    feeds = read(npz(tmp_path / "d.npz", x=np.float32(7)), identity(()))
    assert feeds == [{"x": np.float32(7)}]


def convolution(shape: tuple[int | str, ...] | None) -> Session:
    kernel = numpy_helper.from_array(np.ones((2, 3, 3, 3), np.float32), "w")
    nodes = [node("Conv", ["x", "w"], ["y"])]
    return session(model(nodes, [value("x", shape)], [value("y", None)], [kernel]))


@pytest.mark.parametrize("shape", [(6, 3, 8, 8), (6, 1, 3, 8, 8)])
def test_rank_that_is_not_declared_is_settled_by_running(
    tmp_path: Path, shape: tuple[int, ...]
) -> None:
    feeds = read(npz(tmp_path / "d.npz", x=np.ones(shape, "f")), convolution(None))
    assert [feed["x"].shape for feed in feeds] == [(1, 3, 8, 8)] * 6


def test_rank_that_is_declared_as_scalar_is_settled_by_running(tmp_path: Path) -> None:
    """A scalar is declared, but the model asks for the size of the first axis."""
    nodes = [node("Shape", ["x"], ["s"]), node("Gather", ["s", "zero"], ["y"])]
    zero = numpy_helper.from_array(np.asarray(0, np.int64), "zero")
    output = value("y", None, TensorProto.INT64)
    running = session(model(nodes, [value("x", ())], [output], [zero]))
    feeds = read(npz(tmp_path / "d.npz", x=np.ones(5, "f")), running)
    assert [feed["x"].shape for feed in feeds] == [(1,)] * 5


def test_axis_zero_is_the_batch_where_no_rank_is_known_and_both_would_run(tmp_path: Path) -> None:
    feeds = read(npz(tmp_path / "d.npz", x=np.ones((5, 3), "f")), identity(None))
    assert [feed["x"].shape for feed in feeds] == [(1, 3)] * 5
    feeds = read(npz(tmp_path / "e.npz", x=np.ones(5, "f")), identity(None))
    assert [feed["x"].shape for feed in feeds] == [()] * 5


def test_declared_layout_wins_where_both_would_run(tmp_path: Path) -> None:
    """Relu takes any rank: only the declaration tells that an axis enumerates feeds."""
    loose = parsed("agraph (float[N, M] x) => (float[?, ?] y) { y = Relu(x) }")
    feeds = read(npz(tmp_path / "d.npz", x=np.ones((5, 2, 3), "f")), session(loose))
    assert [feed["x"].shape for feed in feeds] == [(2, 3)] * 5


def test_batch_that_the_model_fixes_groups_the_rows(tmp_path: Path) -> None:
    rows = np.arange(30, dtype=np.float32).reshape(10, 3)
    feeds = read(npz(tmp_path / "d.npz", x=rows), identity((4, 3)))
    assert [feed["x"].shape for feed in feeds] == [(4, 3)] * 2  # the last two rows fill no batch
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in feeds]), rows[:8])


def test_batch_that_the_model_fixes_leaves_whole_feeds_alone(tmp_path: Path) -> None:
    feeds = read(npz(tmp_path / "d.npz", x=np.ones((5, 4, 3), "f")), identity((4, 3)))
    assert [feed["x"].shape for feed in feeds] == [(4, 3)] * 5


def test_fewer_rows_than_the_fixed_batch_are_said_to_be_too_few(tmp_path: Path) -> None:
    message = rejected(npz(tmp_path / "d.npz", x=np.ones((2, 3), "f")), identity((4, 3)))
    assert message.endswith(
        "index: 0 Got: 1 Expected: 4 Please fix either the inputs/outputs or the model."
    )


def test_whole_feeds_of_one_input_beside_a_fixed_batch_of_another_are_not_dropped(
    tmp_path: Path,
) -> None:
    """Four rows a feed cannot be, where another array enumerates feeds: none may go missing."""
    nodes = [node("Add", ["x", "s"], ["y"])]
    running = session(
        model(
            nodes,
            [value("x", (2, 3)), value("s", ("A", "B"))],
            [value("y", None)],
            [numpy_helper.from_array(np.zeros((1, 1), np.float32), "s")],
        )
    )
    data = npz(tmp_path / "d.npz", x=np.ones((4, 2, 3), "f"), s=np.ones((4, 2, 3), "f"))
    assert [sorted(feed) for feed in read(data, running)] == [["s", "x"]] * 4


def test_fixed_batch_of_one_needs_no_grouping(tmp_path: Path) -> None:
    feeds = read(npz(tmp_path / "d.npz", x=np.ones((3, 4), "f")), identity((1, 4)))
    assert [feed["x"].shape for feed in feeds] == [(1, 4)] * 3


# ------------------------------------------------------------------------- contents of the arrays


def test_fortran_order_reads_the_same_rows(tmp_path: Path) -> None:
    rows = np.asfortranarray(RNG.normal(size=(5, 4, 3)).astype(np.float32))
    feeds = read(npz(tmp_path / "d.npz", x=rows), identity(("N", 4, 3)))
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in feeds]), rows)
    assert all(feed["x"].flags.c_contiguous for feed in feeds)


def test_compressed_archives_read_the_same(tmp_path: Path) -> None:
    rows = RNG.normal(size=(5, 4)).astype(np.float32)
    np.savez_compressed(tmp_path / "d.npz", x=rows)
    feeds = read(tmp_path / "d.npz", identity(("N", 4)))
    np.testing.assert_array_equal(np.concatenate([feed["x"] for feed in feeds]), rows)


@pytest.mark.parametrize("stored", ["float64", "float16", ">f4", "int32", "bool"])
def test_types_are_cast_where_the_kind_allows(tmp_path: Path, stored: str) -> None:
    rows = np.ones((3, 4), stored)
    for spec in (npz(tmp_path / "d.npz", x=rows), str(_directory(tmp_path / "many", x=rows[:1]))):
        feeds = read(spec, identity(("N", 4)))
        assert {feed["x"].dtype for feed in feeds} == {np.dtype(np.float32)}
        assert feeds[0]["x"].tolist() == [[1.0] * 4]


def _directory(folder: Path, **arrays: Any) -> Path:
    folder.mkdir()
    npz(folder / "0.npz", **arrays)
    return folder


def test_bfloat16_is_made_from_floats_and_read_back_from_npz(tmp_path: Path) -> None:
    nodes = [node("Cast", ["x"], ["y"], to=TensorProto.FLOAT)]
    running = session(
        model(nodes, [value("x", ("N", 2), TensorProto.BFLOAT16)], [value("y", None)])
    )
    for rows in (np.full((3, 2), 1.5, "f"), np.full((3, 2), 1.5, ml_dtypes.bfloat16)):
        feeds = read(npz(tmp_path / "d.npz", x=rows), running)
        assert [feed["x"].dtype for feed in feeds] == [np.dtype(ml_dtypes.bfloat16)] * 3
        assert feeds[0]["x"].astype("f").tolist() == [[1.5, 1.5]]


def test_floats_are_not_truncated_to_integers(tmp_path: Path) -> None:
    data = npz(tmp_path / "d.npz", x=np.ones((3, 4)))
    message = rejected(data, identity(("N", 4), TensorProto.INT64))
    assert message == f"data {data}: input 'x' is float64, the model reads int64"


def test_integers_that_do_not_fit_are_not_wrapped(tmp_path: Path) -> None:
    running = identity(("N", 1), TensorProto.INT32)
    fitting = npz(tmp_path / "d.npz", x=np.array([[-(2**31)], [2**31 - 1]]))
    assert [int(feed["x"][0, 0]) for feed in read(fitting, running)] == [-(2**31), 2**31 - 1]
    beyond = npz(tmp_path / "e.npz", x=np.array([[2**31]]))
    assert rejected(beyond, running) == (
        f"data {beyond}: input 'x' holds integers beyond int32, which the model reads"
    )


def test_strings_are_read(tmp_path: Path) -> None:
    running = identity(("N",), TensorProto.STRING)
    feeds = read(npz(tmp_path / "d.npz", x=np.array(["a", "bcd"])), running)
    assert [feed["x"].tolist() for feed in feeds] == [["a"], ["bcd"]]


def test_arrays_that_are_no_inputs_are_ignored(tmp_path: Path) -> None:
    """Labels may have any number of samples: nobody reads them."""
    data = npz(tmp_path / "d.npz", x=np.ones((3, 4), "f"), labels=np.arange(17))
    assert [list(feed) for feed in read(data, identity(("N", 4)))] == [["x"]] * 3
    folder = _directory(tmp_path / "many", x=np.ones((3, 4), "f"), labels=np.arange(17))
    assert [list(feed) for feed in read(folder, identity(("N", 4)))] == [["x"]]


def with_default() -> Session:
    start = numpy_helper.from_array(np.zeros((1, 4), np.float32), "s")
    inputs = [value("x", ("N", 4)), value("s", (1, 4))]
    return session(model([node("Add", ["x", "s"], ["y"])], inputs, [value("y", None)], [start]))


def test_inputs_with_a_default_may_be_given_or_left_out(tmp_path: Path) -> None:
    rows = np.ones((3, 4), np.float32)
    without = read(npz(tmp_path / "d.npz", x=rows), with_default())
    assert [list(feed) for feed in without] == [["x"]] * 3
    given = read(npz(tmp_path / "e.npz", x=rows, s=2.0 * rows), with_default())
    assert [sorted(feed) for feed in given] == [["s", "x"]] * 3
    assert given[0]["s"].tolist() == [[2.0] * 4]


def test_data_for_a_model_without_inputs_is_one_empty_feed(tmp_path: Path) -> None:
    constant = numpy_helper.from_array(np.ones(4, np.float32), "c")
    running = session(model([node("Neg", ["c"], ["y"])], [], [value("y", (4,))], [constant]))
    assert read(npz(tmp_path / "d.npz", x=np.ones((3, 4))), running) == [{}]


def test_limit_is_the_most_that_is_read(tmp_path: Path) -> None:
    data = npz(tmp_path / "d.npz", x=np.ones((9, 4), "f"))
    assert len(read(data, identity(("N", 4)), 4)) == 4
    assert len(read(data, identity(("N", 4)), 99)) == 9


# -------------------------------------------------------------------------------- one bad archive


def test_missing_input_lists_what_there_is(tmp_path: Path) -> None:
    data = npz(tmp_path / "d.npz", image=np.ones((3, 4)), labels=np.ones(3))
    assert rejected(data, identity(("N", 4))) == (
        f"data {data}: input 'x' is missing; the model reads x, the data has image, labels"
    )


def test_empty_archive_has_nothing(tmp_path: Path) -> None:
    data = npz(tmp_path / "d.npz")
    assert rejected(data, identity(("N", 4))) == (
        f"data {data}: input 'x' is missing; the model reads x, the data has nothing"
    )


def test_no_samples(tmp_path: Path) -> None:
    data = npz(tmp_path / "d.npz", x=np.ones((0, 4), "f"))
    expected = f"data {data}: the model rejects it: there are no samples"
    assert rejected(data, identity(("N", 4))) == expected


def test_wrong_shape_gives_the_models_reason(tmp_path: Path) -> None:
    data = npz(tmp_path / "d.npz", x=np.ones((3, 5), "f"))
    assert rejected(data, identity(("N", 4))) == (
        f"data {data}: the model rejects it: Got invalid dimensions for input: x for the following "
        "indices index: 1 Got: 5 Expected: 4 Please fix either the inputs/outputs or the model."
    )


def test_reason_is_that_of_the_declared_layout(tmp_path: Path) -> None:
    data = npz(tmp_path / "d.npz", x=np.ones((3, 2, 5), "f"))
    assert "index: 1 Got: 5 Expected: 4" in rejected(data, identity(("N", 4)))


def test_arrays_of_different_length(tmp_path: Path) -> None:
    nodes = [node("Add", ["x", "z"], ["y"])]
    running = session(
        model(nodes, [value("x", ("N", 4)), value("z", ("N", 4))], [value("y", None)])
    )
    data = npz(tmp_path / "d.npz", x=np.ones((3, 4), "f"), z=np.ones((2, 4), "f"))
    assert rejected(data, running) == (
        f"data {data}: the arrays disagree about the number of samples: z [2, 4], x [3, 4]"
    ) or rejected(data, running).endswith("x [3, 4], z [2, 4]")


def test_python_objects_are_refused(tmp_path: Path) -> None:
    data = npz(tmp_path / "d.npz", x=np.array([None, 1], object))
    expected = f"data {data}: x cannot be read: it holds Python objects"
    assert rejected(data, identity(("N", 4))) == expected
    folder = _directory(tmp_path / "many", x=np.array([None, 1], object))
    assert "many/0.npz: x cannot be read: Object arrays cannot be loaded" in rejected(
        folder, identity(("N", 4))
    )


def test_single_array_and_other_files(tmp_path: Path) -> None:
    np.save(tmp_path / "d.npy", np.ones((3, 4), "f"))
    assert rejected(tmp_path / "d.npy", identity(("N", 4))) == (
        f"data {tmp_path}/d.npy: a single array; save it by name, np.savez(f, input=array)"
    )
    (tmp_path / "d.npz").write_bytes(b"PK\x03\x04 no archive")
    assert "not an .npz file" in rejected(tmp_path / "d.npz", identity(("N", 4)))
    (tmp_path / "e.npz").write_bytes(b"")
    assert "not an .npz file" in rejected(tmp_path / "e.npz", identity(("N", 4)))


def test_no_such_file(tmp_path: Path) -> None:
    assert rejected(tmp_path / "none.npz", identity(("N", 4))) == (
        f"data {tmp_path}/none.npz: no such file"
    )
    assert rejected("nothing", identity(("N", 4))) == (
        "data nothing: no such file or directory (an .npz, a directory of .npz, or module:function)"
    )


def damage(path: Path, at: Callable[[int], slice]) -> None:
    """Overwrite a part of the only member's stored bytes."""
    with zipfile.ZipFile(path) as archive:
        (info,) = archive.infolist()
    raw = bytearray(path.read_bytes())
    start = info.header_offset + 30 + len(info.filename) + 20  # behind the local header
    place = at(info.compress_size)
    raw[start + place.start : start + place.stop] = b"\xff" * (place.stop - place.start)
    path.write_bytes(bytes(raw))


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("where", ["header", "rows"])
def test_damage_is_told_in_one_line(tmp_path: Path, compressed: bool, where: str) -> None:
    data = tmp_path / "d.npz"
    rows = RNG.normal(size=(4000, 4)).astype(np.float32)
    (np.savez_compressed if compressed else np.savez)(data, x=rows)
    damage(data, lambda size: slice(0, 40) if where == "header" else slice(size // 2, size - 99))
    assert "cannot be read" in (message := rejected(data, identity(("N", 4)))) or (
        "damaged" in message
    )


def test_damage_of_a_fortran_array_and_of_a_member_of_a_directory(tmp_path: Path) -> None:
    rows = np.asfortranarray(RNG.normal(size=(400, 40)).astype(np.float32))
    folder = tmp_path / "many"
    folder.mkdir()
    np.savez_compressed(folder / "0.npz", x=rows)
    damage(folder / "0.npz", lambda size: slice(size // 2, size - 99))
    assert "0.npz: damaged: " in rejected(folder / "0.npz", identity(("N", 40)))
    assert "0.npz: x cannot be read: " in rejected(folder, identity(("N", 40)))


def test_member_that_is_shorter_than_its_header_says(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive, archive.open("x.npy", "w") as member:
        header = {"descr": "<f4", "fortran_order": False, "shape": (3, 4)}
        np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
        member.write(bytes(4 * 4 * 2))
    assert "d.npz: damaged: " in rejected(tmp_path / "d.npz", identity(("N", 4)))


def test_long_headers_of_version_two_are_read(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "d.npz", "w") as archive, archive.open("x.npy", "w") as member:
        np.lib.format.write_array(member, np.ones((3, 4), "f"), version=(2, 0))
    assert len(read(tmp_path / "d.npz", identity(("N", 4)))) == 3


# ------------------------------------------------------------------- directories and functions


def test_directory_holds_one_feed_a_file_in_order_of_names(tmp_path: Path) -> None:
    for name, fill in (("b", 2), ("a", 1), ("c", 3)):
        npz(tmp_path / f"{name}.npz", x=np.full((fill, 4), fill, np.float32))
    (tmp_path / "notes.txt").write_text("no feed")
    feeds = read(tmp_path, identity(("N", 4)))
    assert [feed["x"].shape for feed in feeds] == [(1, 4), (2, 4), (3, 4)]


def test_directory_without_npz(tmp_path: Path) -> None:
    assert rejected(tmp_path, identity(("N", 4))) == f"data {tmp_path}: there are no feeds in it"


def test_directory_whose_first_feed_does_not_fit(tmp_path: Path) -> None:
    npz(tmp_path / "a.npz", x=np.ones((2, 5), "f"))
    assert rejected(tmp_path, identity(("N", 4))).startswith(
        f"data {tmp_path}: the model rejects the first feed: Got invalid dimensions for input: x"
    )


def script(folder: Path, body: str) -> str:
    path = folder / "feeds_of_the_user.py"
    path.write_text(f"import numpy as np\n{body}")
    return f"{path}:feeds"


def test_functions_by_file_and_by_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    spec = script(tmp_path, "def feeds():\n return [{'x': np.ones((2, 4), 'f')}] * 3\n")
    assert len(read(spec, identity(("N", 4)))) == 3
    monkeypatch.syspath_prepend(tmp_path)
    assert len(read("feeds_of_the_user:feeds", identity(("N", 4)))) == 3


def test_generators_are_taken_one_feed_at_a_time(tmp_path: Path) -> None:
    spec = script(
        tmp_path,
        "taken = []\n"
        "def feeds():\n"
        "    for i in range(10**9):\n"
        "        taken.append(i)\n"
        "        yield {'x': np.full((1, 4), i, 'f')}\n",
    )
    feeds = given_feeds(spec, identity(("N", 4)))
    assert [float(feed["x"][0, 0]) for feed in itertools.islice(feeds, 3)] == [0, 1, 2]
    assert len(read(spec, identity(("N", 4)), 5)) == 5


def test_feeds_of_a_function_may_be_lists_and_none(tmp_path: Path) -> None:
    """Values of sequences and empty optionals pass untouched."""
    sequence = parsed(
        "agraph (seq(float[N]) s) => (float[M] y) { y = ConcatFromSequence <axis = 0> (s) }"
    )
    spec = script(tmp_path, "def feeds():\n return [{'s': [np.ones(2, 'f'), np.ones(3, 'f')]}]\n")
    (feed,) = read(spec, session(sequence))
    assert [part.shape for part in feed["s"]] == [(2,), (3,)]


@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("def feeds():\n raise ValueError('two\\nlines')\n", "ValueError: two lines"),
        (
            "def feeds():\n yield {'x': np.ones((1, 4), 'f')}\n raise KeyError('later')\n",
            "KeyError: 'later'",
        ),
        ("def feeds():\n return 3\n", "feeds() returns int, not feeds"),
        ("def feeds():\n return [np.ones(3)]\n", "a feed is a dict of arrays, not ndarray"),
        ("def feeds():\n return []\n", "there are no feeds in it"),
        (
            "def other():\n return []\n",
            "AttributeError: module 'feeds_of_the_user' has no attribute 'feeds'",
        ),
        (
            "def feeds():\n return [{'z': 1}]\n",
            "input 'x' is missing; the model reads x, the data has z",
        ),
        (
            "def feeds():\n return [{'x': np.array(['a'])}]\n",
            "input 'x' is <U1, the model reads float32",
        ),
    ],
)
def test_mistakes_in_functions(tmp_path: Path, body: str, reason: str) -> None:
    spec = script(tmp_path, body)
    assert rejected(spec, identity(("N", 4))) == f"data {spec}: {reason}"


def test_modules_that_cannot_be_imported(tmp_path: Path) -> None:
    assert rejected(f"{tmp_path}/none.py:feeds", identity(("N", 4))) == (
        f"data {tmp_path}/none.py:feeds: FileNotFoundError: [Errno 2] No such file or directory: "
        f"'{tmp_path}/none.py'"
    )
    assert rejected("no_such_module:feeds", identity(("N", 4))) == (
        "data no_such_module:feeds: ModuleNotFoundError: No module named 'no_such_module'"
    )
    assert load_module("itertools") is itertools


def test_a_later_feed_that_lacks_an_input_is_an_error_when_it_comes(tmp_path: Path) -> None:
    spec = script(tmp_path, "def feeds():\n return [{'x': np.ones((1, 4), 'f')}, {}]\n")
    feeds = given_feeds(spec, identity(("N", 4)))
    next(feeds)
    with pytest.raises(DataError, match="input 'x' is missing; the model reads x, the data has n"):
        next(feeds)


def test_refusal_is_the_models_reason_or_none() -> None:
    condition = if_node(
        graph([node("Neg", ["x"], ["t"])], [], ["t"], name="t"),
        graph([node("Identity", ["x"], ["e"])], [], ["e"], name="e"),
    )
    running = session(model([condition], ["x", CONDITION]))
    feed: Mapping[str, Array] = {"x": np.ones(4, np.float32), "c": np.array(True)}
    assert refusal(running, feed) is None
    assert (
        refusal(running, {"x": feed["x"]})
        == "Required inputs (['c']) are missing from input feed (['x'])."
    )


# ------------------------------------------------------------------------------------- streaming


@pytest.mark.parametrize("layout", ["compressed", "stored", "function", "directory"])
def test_peak_memory_does_not_grow_with_the_number_of_samples(tmp_path: Path, layout: str) -> None:
    """Rows of 256 KB that do not compress: all at once they would be 2.5, 8 and 25 MB."""
    row = RNG.normal(size=(1, 1 << 16)).astype(np.float32)
    running = identity(("N", row.size), op="Neg")

    def peak(samples: int) -> int:
        if layout == "function":
            body = f"def feeds():\n for i in range({samples}):\n"
            spec = script(tmp_path, body + f"  yield {{'x': np.full((1, {row.size}), i, 'f')}}\n")
        elif layout == "directory":
            for number in range(min(samples, 40)):
                np.savez_compressed(tmp_path / f"{number:03}.npz", x=row)
            spec = str(tmp_path)
        else:
            spec = _archive(tmp_path / f"{samples}.npz", row, samples, layout == "compressed")
        feeds = given_feeds(spec, running)
        tracemalloc.start()
        count = 0
        for feed in feeds:
            assert feed["x"].nbytes == row.nbytes
            count += 1
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == (min(samples, 40) if layout == "directory" else samples)
        return highest

    peaks = [peak(samples) for samples in (10, 30, 100)]
    assert max(peaks) < 8 * row.nbytes
    assert max(peaks) < 1.5 * min(peaks)


def test_a_thousand_samples_take_no_more_memory_than_ten(tmp_path: Path) -> None:
    row = RNG.normal(size=(1, 1 << 13)).astype(np.float32)
    running = identity(("N", row.size))
    peaks = []
    for samples in (10, 1000):
        feeds = given_feeds(_archive(tmp_path / f"{samples}.npz", row, samples, True), running)
        tracemalloc.start()
        assert sum(1 for _ in feeds) == samples
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] < 1.5 * peaks[0] < 30 * row.nbytes


def _archive(path: Path, row: Array, samples: int, compressed: bool) -> str:
    """An .npz of equal rows, written row by row."""
    kind = zipfile.ZIP_DEFLATED if compressed else zipfile.ZIP_STORED
    header = {"descr": "<f4", "fortran_order": False, "shape": (samples, *row.shape[1:])}
    with (
        zipfile.ZipFile(path, "w", kind, compresslevel=1) as archive,
        archive.open("x.npy", "w", force_zip64=True) as member,
    ):
        np.lib.format.write_array_header_1_0(member, header)  # type: ignore[arg-type]
        for _ in range(samples):
            member.write(row.tobytes())
    return str(path)
