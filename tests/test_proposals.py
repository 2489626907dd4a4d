"""Feeds without data: what is drawn, what a graph tells about it, and when to give up."""

from __future__ import annotations

import itertools
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from graphopt.data import refusal
from graphopt.errors import DataError, UnprovenError
from graphopt.hints import Hint, constant_array, integer_hints
from graphopt.ir import Model
from graphopt.proposals import KINDS, Proposer, Sizes, draw, first_feed, propose, smooth
from graphopt.runtime import Port, Session
from tests.graphs import CONDITION, graph, if_node, model, node, parsed, save, value

Array = NDArray[Any]
INT = TensorProto.INT64


def session(proto: onnx.ModelProto) -> Session:
    return Session(proto.SerializeToString(), optimizations="off")


def constant(name: str, values: Any, dtype: Any = np.float32) -> onnx.TensorProto:
    return numpy_helper.from_array(np.asarray(values, dtype), name)


def feeds(
    proto: onnx.ModelProto, count: int = 24, **options: Any
) -> list[tuple[str, dict[str, Any]]]:
    with session(proto) as running:
        return list(itertools.islice(propose(Model.load(proto), running, **options), count))


def equal(a: dict[str, Any], b: dict[str, Any]) -> bool:
    return a.keys() == b.keys() and all(np.array_equal(a[name], b[name]) for name in a)


def relu(*shape: int | str) -> onnx.ModelProto:
    return model([node("Relu", ["x"], ["y"])], [value("x", shape)], [value("y", None)])


def gather(rows: int = 7, columns: int = 2) -> onnx.ModelProto:
    table = constant("table", np.ones((rows, columns)))
    inputs, outputs = [value("i", ("N",), INT)], [value("y", None)]
    return model([node("Gather", ["table", "i"], ["y"])], inputs, outputs, [table])


# ------------------------------------------------------------------------------------- drawing


def test_same_seed_same_feeds_other_seed_others() -> None:
    first, again, other = (feeds(relu("N", 4), seed=seed) for seed in (3, 3, 4))
    assert [kind for kind, _ in first] == [kind for kind, _ in again]
    assert all(equal(a, b) for (_, a), (_, b) in zip(first, again, strict=True))
    assert not any(equal(a, b) for (_, a), (_, b) in zip(first, other, strict=True))


def test_no_feed_comes_twice() -> None:
    for proto in (relu("N", 4), gather(rows=10_000)):
        drawn = [feed for _, feed in feeds(proto, 48)]
        for a, b in itertools.combinations(drawn, 2):
            assert not equal(a, b)


def test_values_of_an_input_do_not_depend_on_the_others() -> None:
    def made(names: str) -> onnx.ModelProto:
        nodes = [node("Sum", list(names), ["y"])]
        return model(nodes, [value(name, (4,)) for name in names], [value("y", None)])

    alone, between = feeds(made("b")), feeds(made("abc"))
    for (_, one), (_, three) in zip(alone, between, strict=True):
        np.testing.assert_array_equal(one["b"], three["b"])
        assert not np.array_equal(three["a"], three["b"])


def test_every_kind_comes_twice_in_every_size_before_any_starts_over() -> None:
    drawn = [kind for kind, _ in feeds(relu("N", 4), 24)]
    assert Counter(drawn) == {f"{kind} {shape}": 2 for kind in KINDS for shape in ("1x4", "2x4")}
    assert [kind for kind, _ in feeds(relu("N", 4), 48)][24:] == drawn


def test_kinds_have_their_scale_and_distribution() -> None:
    shape, rng = (1, 64, 64), np.random.default_rng
    made = {kind: draw(np.dtype("f4"), shape, Hint(), kind, rng(0)) for kind in KINDS}
    assert {kind: array.dtype for kind, array in made.items()} == dict.fromkeys(
        KINDS, np.dtype("f4")
    )
    assert np.std(made["normal"]) == pytest.approx(1, abs=0.05)
    assert np.std(made["large"]) == pytest.approx(8, abs=0.4)
    assert np.std(made["larger"]) == pytest.approx(64, abs=3)
    assert np.std(made["small"]) == pytest.approx(0.01, abs=0.001)
    assert 0 <= made["uniform"].min() < 0.01
    assert 0.99 < made["uniform"].max() <= 1


def test_every_type_is_drawn_in_its_own_dtype() -> None:
    rng = np.random.default_rng(0)
    for name in ("f2", "f4", "f8", "c8", "i1", "u1", "i8", "?"):
        array = draw(np.dtype(name), (50,), Hint(high=3), "normal", rng)
        assert array.dtype == np.dtype(name)
    assert np.iscomplexobj(draw(np.dtype("c8"), (5,), Hint(), "normal", rng))
    assert np.abs(draw(np.dtype("c8"), (5,), Hint(), "normal", rng).imag).min() > 0
    assert set(draw(np.dtype("O"), (50,), Hint(), "normal", rng)) == {"a", "b c", "ONNX"}


def test_masks_are_mostly_true() -> None:
    mask = draw(np.dtype("?"), (4000,), Hint(), "normal", np.random.default_rng(0))
    assert mask.mean() == pytest.approx(0.75, abs=0.03)


def test_integers_take_both_bounds() -> None:
    drawn = draw(np.dtype("i8"), (400,), Hint(low=-1, high=2), "large", np.random.default_rng(0))
    assert set(drawn.tolist()) == {-1, 0, 1, 2}


def test_smooth_is_standardised_and_falls_with_frequency() -> None:
    noise = np.random.default_rng(0).standard_normal((2, 3, 64, 64))
    values = smooth(noise)
    assert values.shape == noise.shape
    assert values.mean() == pytest.approx(0, abs=1e-12)
    assert values.std() == pytest.approx(1)
    along = smooth(np.random.default_rng(0).standard_normal((4000, 64)))
    power = (np.abs(np.fft.fft(along, axis=-1)) ** 2).mean(axis=0)
    assert power[2] / power[16] == pytest.approx(8**2, rel=0.2)
    steps = np.abs(np.diff(values, axis=-1)).mean()
    assert steps < 0.6 * np.abs(np.diff(noise, axis=-1)).mean()


def test_smooth_leaves_batches_and_short_axes_alone() -> None:
    noise = np.random.default_rng(0).standard_normal((64, 7))
    assert smooth(noise) is noise  # axis 0 is the batch, 7 is too short to be smooth along
    assert smooth(np.zeros((1, 8))).tolist() == [[0.0] * 8]
    along = smooth(np.random.default_rng(0).standard_normal((1, 8)))
    assert along.std() == pytest.approx(1)


def test_sequences_are_proposed() -> None:
    sequence = parsed(
        "agraph (seq(float[N, M]) s) => (float[K, M] y) { y = ConcatFromSequence <axis = 0> (s) }"
    )
    (kind, feed), (_, other) = feeds(sequence, 2)
    assert kind == "normal "
    assert [part.shape for part in feed["s"]] == [(2, 3), (2, 3)]
    assert not np.array_equal(feed["s"][0], other["s"][0])


# --------------------------------------------------------------------------------------- sizes


def test_two_sizes_of_every_free_dim() -> None:
    shapes = {feed["x"].shape for _, feed in feeds(relu("N", 3, "H", "W"))}
    assert len(shapes) == 2
    for sizes in zip(*shapes, strict=True):
        assert len(set(sizes)) == (1 if sizes[0] == 3 else 2)


def test_one_size_where_nothing_is_free() -> None:
    assert {feed["x"].shape for _, feed in feeds(relu(2, 3))} == {(2, 3)}


def test_dims_of_one_name_are_equal_and_unnamed_ones_independent() -> None:
    def shapes(left: tuple[str, ...], right: tuple[str, ...]) -> set[tuple[Any, ...]]:
        """Neither sum needs the sizes of the other input: only names tie them."""
        nodes = [node("ReduceSum", ["a"], ["p"]), node("ReduceSum", ["b"], ["q"])]
        inputs = [value("a", left), value("b", right)]
        proto = model(nodes, inputs, [value("p", None), value("q", None)])
        with session(proto) as running:
            sizes = Proposer(Model.load(proto), running, {}).sizes()
            return {tuple(one.dims) for one in sizes}

    assert shapes(("N", "S"), ("N", "S")) == {("N", "S")}
    for unnamed in ("?", "", "-1", " None "):
        (keys,) = shapes(("N", unnamed), ("N", unnamed))
        assert keys == ("N", ("a", 1), ("b", 1))


def test_unnamed_dims_that_must_be_equal_are_found() -> None:
    proto = model(
        [node("Add", ["a", "b"], ["y"])],
        [value("a", ("N", "?")), value("b", ("N", "?"))],
        [value("y", None)],
    )
    assert all(feed["a"].shape == feed["b"].shape for _, feed in feeds(proto))


def test_sizes_come_from_what_the_model_accepts() -> None:
    """Only 28 columns fit the weight, far down the ladder; batches stay free."""
    w = constant("w", np.ones((28, 3)))
    proto = model(
        [node("Flatten", ["x"], ["f"]), node("MatMul", ["f", "w"], ["y"])],
        [value("x", ("N", 1, "H", 1))],
        [value("y", None)],
        [w],
    )
    assert {feed["x"].shape for _, feed in feeds(proto)} == {(1, 1, 28, 1), (2, 1, 28, 1)}


def test_two_dims_that_add_up() -> None:
    """A mask over what is cached and what is new, as decoders have."""
    nodes = [
        node("Concat", ["past", "new"], ["all"], axis=1),
        node("Mul", ["all", "mask"], ["y"]),
    ]
    inputs = [value("past", ("B", "P")), value("new", ("B", 16)), value("mask", ("B", "T"))]
    drawn = [feed for _, feed in feeds(model(nodes, inputs, [value("y", None)]))]
    widths = {(feed["past"].shape[1], feed["mask"].shape[1]) for feed in drawn}
    assert all(total in (past + 16, 1) for past, total in widths)


def test_fixed_shapes_are_kept_and_free_ones_in_them_tried() -> None:
    drawn = feeds(relu("N", "M"), shapes={"x": (5, 6)})
    assert {feed["x"].shape for _, feed in drawn} == {(5, 6)}
    drawn = feeds(relu("N", "M"), shapes={"x": (-1, 6)})
    assert {feed["x"].shape for _, feed in drawn} == {(1, 6), (2, 6)}


def test_shape_of_an_unknown_input() -> None:
    with pytest.raises(DataError) as caught:
        feeds(relu("N"), shapes={"z": (5,)})
    assert str(caught.value) == "shape of 'z': the model's inputs are x"


def test_huge_inputs_are_not_proposed() -> None:
    with session(relu(1 << 14, "N")) as running:
        proposer = Proposer(Model.load(relu(1 << 14, "N")), running, {})
        small, big = (Sizes({"N": n}) for n in (1 << 12, (1 << 12) + 1))
        assert not proposer._accepted(big)
        assert proposer._shape(running.inputs[0], small) == (1 << 14, 1 << 12)


def test_a_model_without_inputs_has_one_empty_feed() -> None:
    proto = model([node("Neg", ["c"], ["y"])], [], initializers=[constant("c", [1, 2, 3, 4])])
    assert feeds(proto) == [("no inputs", {})]


def test_no_feed_is_accepted() -> None:
    proto = model(
        [node("Reshape", ["x", "s"], ["y"], name="flat")],
        [value("x", ("N",))],
        [value("y", None)],
        [constant("s", [7, 11], np.int64)],
    )
    with pytest.raises(UnprovenError) as caught:
        feeds(proto)
    message = str(caught.value)
    assert message.startswith("no proposed feed runs on the original (Reshape node 'flat' failed: ")
    assert message.endswith("); give --data")
    assert "\n" not in message


def test_feeds_that_the_model_refuses_are_left_out() -> None:
    """The greatest element must lie below a bound, else an index falls outside of its table."""
    proto = _picky(0.5)
    with session(proto) as running:
        drawn = itertools.islice(propose(Model.load(proto), running), 24)
        assert all(refusal(running, feed) is None for _, feed in drawn)


def test_proposing_ends_where_hardly_any_feed_runs() -> None:
    """A first feed is accepted, all others have elements above every bound."""
    accepted = feeds(relu(4), 1)[0][1]["x"].max()
    with pytest.raises(UnprovenError, match="feeds run on the original too rarely; give --data"):
        feeds(_picky(float(accepted), exactly=True), 24)


def _picky(bound: float, exactly: bool = False) -> onnx.ModelProto:
    """Fails where the greatest element is above the bound, or else just not the bound."""
    compare = "Equal" if exactly else "LessOrEqual"
    return model(
        [
            node("ReduceMax", ["x"], ["m"], keepdims=0),
            node(compare, ["m", "bound"], ["fits"]),
            node("Cast", ["fits"], ["one"], to=INT),
            node("Sub", ["one", "first"], ["at"]),
            node("Gather", ["table", "at"], ["picked"]),
            node("Add", ["x", "picked"], ["y"]),
        ],
        [value("x", (4,))],
        [value("y", None)],
        [
            constant("bound", bound),
            constant("first", 2, np.int64),
            constant("table", [1.0]),  # index -1 is in it, -2 is not
        ],
    )


def test_first_feed_is_of_data_or_proposed(tmp_path: Path) -> None:
    path = save(relu("N", 4), tmp_path / "m.onnx")
    assert first_feed(path)["x"].shape == (1, 4)
    assert first_feed(path, shapes={"x": (3, 4)})["x"].shape == (3, 4)
    assert not equal(first_feed(path), first_feed(path, seed=1))
    np.savez(tmp_path / "d.npz", x=np.full((2, 4), 7, "f"))
    assert first_feed(path, data=str(tmp_path / "d.npz"))["x"].tolist() == [[7.0] * 4]


# --------------------------------------------------------------------------------------- hints


def hint(proto: onnx.ModelProto, name: str = "i") -> Hint:
    return integer_hints(Model.load(proto).graph.values[name])


@pytest.mark.parametrize(
    ("text", "high"),
    [
        ("y = Gather (table, i)", 6),
        ("y = Gather <axis = 1> (table, i)", 1),
        ("y = Gather <axis = -1> (table, i)", 1),
        ("y = GatherElements <axis = 1> (table, i)", 1),
        ("y = GatherND (table, i)", 1),
        ("c = Cast <to = 7> (i) y = Gather (table, c)", 6),
        ("s = Constant <value_ints = [-1, 1]> () r = Reshape (i, s) y = Gather (table, r)", 6),
        ("c = Concat <axis = 0> (i, i) y = Gather (table, c)", 6),
        ("t = Cast <to = 10> (table) y = Gather (t, i)", 6),
        ("p = Gather (table, i) q = Gather <axis = 1> (table, i) y = Identity (p)", 1),
        ("n = Neg (i) y = Gather (table, n)", 1),  # nothing is known of what is computed from it
        ("y = Gather (i, i)", 1),
        ("t = Neg (table) y = Gather (t, i)", 1),
    ],
)
def test_indices_stay_below_what_they_index(text: str, high: int) -> None:
    header = '<ir_version: 10, opset_import: ["": 17]> agraph (int64[N, 2] i) => (float[M] y)'
    proto = onnx.parser.parse_model(f"{header} {{ {text} }}")
    proto.graph.initializer.append(constant("table", np.ones((7, 2))))
    assert hint(proto) == Hint(high=high)


def test_tables_in_constant_nodes_and_large_tables_bound_too() -> None:
    large = gather(rows=5000)
    assert hint(large) == Hint(high=4999)
    node_table = onnx.helper.make_node(
        "Constant", [], ["table"], value=constant("", np.ones((9, 2)))
    )
    proto = model(
        [node_table, node("Gather", ["table", "i"], ["y"])],
        [value("i", ("N",), INT)],
        [value("y", None)],
    )
    assert hint(proto) == Hint(high=8)


def test_indices_read_in_a_body_are_bounded() -> None:
    inner = graph([node("Gather", ["table", "i"], ["t"])], [], ["t"], name="t")
    other = graph([node("Identity", ["table"], ["e"])], [], ["e"], name="e")
    table = constant("table", np.ones(5))
    proto = model([if_node(inner, other)], [CONDITION, value("i", ("N",), INT)], ["y"], [table])
    assert hint(proto) == Hint(high=4)


def test_drawn_indices_use_the_whole_table() -> None:
    drawn = np.concatenate([feed["i"] for _, feed in feeds(gather(), 96)])
    assert set(drawn.tolist()) == set(range(7))


def test_shapes_are_small_and_positive() -> None:
    proto = model(
        [node("ConstantOfShape", ["i"], ["y"])], [value("i", (2,), INT)], [value("y", None)]
    )
    assert hint(proto) == Hint(low=1, high=4)
    assert all(1 <= n <= 4 for _, feed in feeds(proto) for n in feed["i"])
    table = constant("table", np.ones((7, 2)))
    for op in ("Reshape", "Expand", "Tile"):
        nodes = [node(op, ["table", "i"], ["y"])]
        made = model(nodes, [value("i", (2,), INT)], [value("y", None)], [table])
        assert hint(made) == Hint(low=1, high=4)


def test_integers_nobody_explains_are_bits() -> None:
    proto = model([node("Neg", ["i"], ["y"])], [value("i", ("N",), INT)], [value("y", None, INT)])
    assert hint(proto) == Hint(low=0, high=1)


def branches(compared: tuple[int, ...] = (16000, 8000)) -> onnx.ModelProto:
    """A branch for each integer that "i" is compared with, and one for the rest."""
    rest = graph([node("Identity", ["x"], ["last"])], [], ["last"], name="rest")
    for number in compared:
        taken = graph([node("Neg", ["x"], [f"t{number}"])], [], [f"t{number}"], name="t")
        name = f"o{number}"
        condition = node("Equal", ["i", f"k{number}"], [f"c{number}"])
        chosen = node("If", [f"c{number}"], [name], then_branch=taken, else_branch=rest)
        rest = graph([condition, chosen], [], [name], name="rest")
    numbers = [constant(f"k{number}", number, np.int64) for number in compared]
    nodes = [*rest.node]
    nodes[-1].output[0] = "y"
    return model(nodes, [value("i", (), INT), "x"], ["y"], numbers)


def test_compared_integers_take_every_branch_in_turn() -> None:
    assert hint(branches()) == Hint(compared=(16000, 8000, 7999))
    drawn = feeds(branches(), 6)
    assert [int(feed["i"]) for _, feed in drawn] == [16000, 16000, 8000, 8000, 7999, 7999]
    assert [kind for kind, _ in drawn][::2] == [f"normal i={n}, 4" for n in (16000, 8000, 7999)]


def test_choices_are_bounded() -> None:
    many = branches((5, 4, 3, 2, 1))
    assert hint(many) == Hint(compared=(5, 4, 3, 2, 1, 0))
    assert {int(feed["i"]) for _, feed in feeds(many)} == {5, 4, 3, 2}


@pytest.mark.parametrize(
    ("shape", "compared"), [((), True), ((1,), True), ((2,), False), (("N",), False), (None, True)]
)
def test_only_one_element_chooses_a_branch(shape: Any, compared: bool) -> None:
    proto = model(
        [node("Equal", ["i", "k"], ["y"])],
        [value("i", shape, INT)],
        [value("y", None, TensorProto.BOOL)],
        [constant("k", [3], np.int64)],
    )
    assert hint(proto) == (Hint(compared=(3, 2)) if compared else Hint())


def test_comparison_in_either_operand() -> None:
    for inputs in (["i", "k"], ["k", "i"]):
        proto = model(
            [node("Less", inputs, ["y"])],
            [value("i", (), INT)],
            [value("y", None, TensorProto.BOOL)],
            [constant("k", 3, np.int64)],
        )
        assert hint(proto) == Hint(compared=(3, 2))


def test_one_truth_value_takes_both_branches() -> None:
    inner = graph([node("Neg", ["x"], ["t"])], [], ["t"], name="t")
    other = graph([node("Identity", ["x"], ["e"])], [], ["e"], name="e")
    drawn = feeds(model([if_node(inner, other)], ["x", CONDITION]), 4)
    assert [bool(feed["c"]) for _, feed in drawn] == [True, True, False, False]
    assert [kind for kind, _ in drawn] == ["normal 4, c=1"] * 2 + ["normal 4, c=0"] * 2
    one = value("c", (1,), TensorProto.BOOL)
    chosen = model([node("Where", ["c", "x", "x"], ["y"])], [one, "x"], [value("y", None)])
    assert [bool(feed["c"][0]) for _, feed in feeds(chosen, 4)] == [True, True, False, False]
    shaped = value("c", ("N",), TensorProto.BOOL)
    masked = model([node("Where", ["c", "x", "x"], ["y"])], [shaped, "x"], [value("y", None)])
    assert hint(masked, "c") == Hint()
    assert all(feed["c"].ndim == 1 for _, feed in feeds(masked, 4))


def test_branches_the_model_refuses_are_skipped() -> None:
    """Where "i" is 1, the model fails: 0 alone is left."""
    proto = model(
        [
            node("Equal", ["i", "k"], ["c"]),
            node("Cast", ["c"], ["at"], to=INT),
            node("Gather", ["x", "at"], ["y"]),
        ],
        [value("x", (1,)), value("i", (), INT)],
        [value("y", None)],
        [constant("k", 1, np.int64)],
    )
    assert {int(feed["i"]) for _, feed in feeds(proto)} == {0}


def test_constant_arrays() -> None:
    def first(text: str) -> Array | None:
        return constant_array(
            Model.load(parsed(f"agraph () => (float y) {{ {text} }}")).graph.outputs[0]
        )

    assert first("y = Constant <value_int = 3> ()") == np.int64(3)
    assert (found := first("y = Constant <value_ints = [3, 4]> ()")) is not None
    assert found.tolist() == [3, 4]
    assert first("y = Constant <value = float {2.5}> ()") == np.float32(2.5)
    assert first("y = Constant <value_float = 3.0> ()") is None
    assert first("c = Constant <value_int = 3> () y = Neg (c)") is None
    assert constant_array(None) is None
    weights = Model.load(gather(rows=128)).graph.values["table"]
    assert (kept := constant_array(weights)) is not None
    assert kept.shape == (128, 2)
    assert constant_array(Model.load(gather(rows=129)).graph.values["table"]) is None


def test_ports_without_a_name_for_a_dim() -> None:
    """Sizes that are not positive numbers are free."""
    with session(relu("N", 4)) as running:
        proposer = Proposer(Model.load(relu("N", 4)), running, {})
        port = Port("x", "tensor(float)", (0, 4))
        assert proposer._shape(port, Sizes({("x", 0): 3})) == (3, 4)
