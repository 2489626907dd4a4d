"""`graphopt ranks`: what it finds, its table, its picture, and what it says of mistakes."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from io import StringIO
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper, numpy_helper
from rich.cells import cell_len
from rich.console import Console
from typer.testing import CliRunner, Result

from graphopt import cli, low_rank_search
from graphopt import ranks as ranks_module
from graphopt.errors import UsageError
from graphopt.ranks import LayerRanks, RankOption, RanksRecord, ranks
from graphopt.render import ranks_plot, text
from graphopt.render.ranks import show_ranks
from graphopt.report import host
from tests.graphs import ROOT, graph, node, value, wrap
from tests.low_rank_runs import decide_layers

DIGITS = ROOT / "models" / "digits"
CNN, MLP, DATA = DIGITS / "cnn.onnx", DIGITS / "mlp.onnx", DIGITS / "calibration.npz"


@pytest.fixture
def decided(monkeypatch: pytest.MonkeyPatch) -> None:
    """Layers take as long as they have MACs: all that is split pays."""
    decide_layers(monkeypatch)
    monkeypatch.setattr(ranks_module, "SplitTimes", low_rank_search.SplitTimes)


def run(*arguments: object) -> Result:
    return CliRunner().invoke(cli.app, ["ranks", *map(str, arguments)])


def refused(result: Result) -> str:
    """The one line on stderr, where that is all there is."""
    assert (result.exit_code, result.stdout) == (2, "")
    assert result.stderr.startswith("error: ")
    assert result.stderr.count("\n") == 1
    return result.stderr[len("error: ") : -1]


def product(path: Path, weights: np.ndarray, *, readers: int = 1, bias: bool = False) -> Path:
    """y = x W [+ b], for `readers` outputs."""
    inputs, outputs = weights.shape
    constants = [numpy_helper.from_array(weights.astype(np.float32), "w")]
    constants += [numpy_helper.from_array(np.ones(outputs, np.float32), "b")] * bias
    nodes = []
    for n in range(readers):
        result = f"m{n}" if bias else f"y{n}"
        nodes.append(node("MatMul", [f"x{n}", "w"], [result]))
        if bias:
            nodes.append(node("Add", [result, "b"], [f"y{n}"]))
    made = helper.make_graph(
        nodes,
        "product",
        [value(f"x{n}", ("rows", inputs)) for n in range(readers)],
        [value(f"y{n}", ("rows", outputs)) for n in range(readers)],
        constants,
    )
    onnx.save(helper.make_model(made, opset_imports=[helper.make_opsetid("", 17)]), path)
    return path


def of_rank(rank: int, shape: tuple[int, int], noise: float = 0.0) -> np.ndarray:
    rng = np.random.default_rng(3)
    left, right = rng.normal(size=(shape[0], rank)), rng.normal(size=(rank, shape[1]))
    return np.asarray(left @ right + noise * rng.normal(size=shape))


# -- what it finds ---------------------------------------------------------------------------------


def test_weights_of_a_rank_have_it(tmp_path: Path, decided: None) -> None:
    found = ranks(product(tmp_path / "m.onnx", of_rank(8, (96, 64), noise=1e-3)))
    (layer,) = found.layers
    assert (found.feeds, found.macs) == (0, layer.macs)
    assert (layer.operator, layer.kernel, layer.outputs, layer.inputs) == ("MatMul", [], 64, 96)
    assert (layer.rank_99, layer.evbmf, layer.share) == (8, 8, 1.0)
    assert layer.rank_90 < 8
    beyond = dict(layer.spectrum)
    assert beyond[64] == 0
    assert beyond[1] > 0.5
    assert all(option.method == "svd" for option in layer.options)
    assert all((option.error < 1e-5) == (option.rank >= 8) for option in layer.options)


def test_data_says_which_directions_count(tmp_path: Path, decided: None) -> None:
    model = product(tmp_path / "m.onnx", np.random.default_rng(0).normal(size=(96, 64)))
    np.savez(tmp_path / "d.npz", x0=of_rank(2, (300, 96), noise=1e-4).astype(np.float32))
    alike, weighed = (ranks(model, data=data) for data in (None, str(tmp_path / "d.npz")))
    assert alike.layers[0].rank_99 > 50
    assert weighed.layers[0].rank_99 == 2
    assert alike.layers[0].evbmf == weighed.layers[0].evbmf == 0  # of noise, whatever is read
    # each row is a feed, and so many are taken
    assert weighed.feeds == low_rank_search.FIT_FEEDS
    errors = [layer.best[0.5].error for found in (alike, weighed) for layer in found.layers]
    assert errors[1] < 1e-5 < 1e-2 < errors[0]


def test_a_mean_that_a_bias_can_make_up_for_is_no_energy(tmp_path: Path, decided: None) -> None:
    weights = np.random.default_rng(0).normal(size=(96, 64))
    rows = 20.0 * np.ones(96) + np.random.default_rng(1).normal(size=(200, 96))
    np.savez(tmp_path / "d.npz", x0=rows.astype(np.float32))
    made = {
        bias: ranks(
            product(tmp_path / "m.onnx", weights, bias=bias), data=str(tmp_path / "d.npz")
        ).layers[0]
        for bias in (False, True)
    }
    assert made[False].rank_90 == 1
    assert made[True].rank_90 > 20


def test_layers_of_one_weight_are_one(tmp_path: Path, decided: None) -> None:
    model = product(tmp_path / "m.onnx", of_rank(8, (96, 64)), readers=2)
    rng = np.random.default_rng(0)
    first, second = np.zeros((2, 50, 96), np.float32)
    first[:, 0], second[:, 1] = rng.normal(size=(2, 50))
    np.savez(tmp_path / "d.npz", x0=first, x1=second)
    for data, rank in ((None, 8), (str(tmp_path / "d.npz"), 2)):
        found = ranks(model, data=data)
        (layer,) = found.layers
        assert layer.layers == 2
        assert (layer.macs, layer.share) == (found.macs, 1.0)
        assert layer.rank_99 <= rank
        assert layer.best[0.5].error < 1e-6


def test_digits(decided: None) -> None:
    found = ranks(CNN, data=str(DATA), threads=1)
    assert RanksRecord.model_validate_json(found.model_dump_json()) == found
    assert (found.schema_version, found.feeds, found.threads) == (1, 200, 1)
    assert found.methods == ["svd", "channel", "spatial", "tucker"]
    assert len(found.layers) == 11
    assert 0.9 < sum(layer.share for layer in found.layers) <= 1
    assert found.layers[-1].root == "logits"
    for layer in found.layers:
        full = min(layer.outputs, layer.inputs)
        assert 0 < layer.rank_90 <= layer.rank_99 <= full
        assert layer.evbmf < full
        assert layer.spectrum[-1][0] == full
        assert {option.method for option in layer.options} <= (
            {"channel", "spatial", "tucker"} if layer.kernel == [3, 3] else {"svd"}
        )
        assert all(option.pays and option.ms is not None for option in layer.options)
        best = [layer.best[ratio] for ratio in (0.75, 0.5, 0.25) if ratio in layer.best]
        assert best
        assert all(option in layer.options for option in best)
        assert [o.error for o in best] == sorted(o.error for o in best)
    wide = next(layer for layer in found.layers if layer.inputs == 288)
    tucker = next(option for option in wide.options if option.method == "tucker")
    assert len(tucker.channels) == 2
    assert tucker.macs == round(tucker.left * wide.macs)


def test_one_form_alone(decided: None) -> None:
    found = ranks(CNN, method="spatial")
    used = {option.method for layer in found.layers for option in layer.options}
    assert used == {"svd", "spatial"}
    with pytest.raises(UsageError, match="there are auto, svd"):
        ranks(CNN, method="qr")


def test_what_pays_is_measured(tmp_path: Path) -> None:
    """A layer of which a sixteenth of the work is left is faster, on any machine."""
    model = product(tmp_path / "m.onnx", of_rank(16, (1024, 1024)))
    (layer,) = ranks(model, threads=1, shapes={"x0": (256, 1024)}).layers
    assert layer.macs == 256 * 1024 * 1024
    thin = min(layer.options, key=lambda option: option.macs)
    assert thin.left < 0.1
    assert layer.ms is not None
    assert thin.ms is not None
    assert 0 < thin.ms < 0.5 * layer.ms


def option(left: float, error: float, pays: bool) -> RankOption:
    return RankOption(
        method="svd",
        rank=round(100 * left),
        channels=[round(100 * left)],
        left=left,
        macs=round(1000 * left),
        parameters=round(1000 * left),
        error=error,
        ms=left,
        pays=pays,
    )


def test_the_best_pays_if_anything_does() -> None:
    dear, fair, cheap = option(0.54, 0.1, False), option(0.4, 0.2, True), option(0.2, 0.5, True)
    best = ranks_module._best
    assert best([dear, fair, cheap], 0.5) == fair
    assert best([dear, cheap], 0.5) == cheap
    assert best([dear, option(0.3, 0.3, False)], 0.5) == dear
    assert best([dear], 0.25) is None
    assert ranks_plot.front([fair, dear, option(0.6, 0.3, True), cheap]) == [dear, fair, cheap]


# -- the command -----------------------------------------------------------------------------------


def test_json_is_the_record(decided: None) -> None:
    result = run(MLP, "--data", DATA, "--json")
    assert (result.exit_code, result.stderr) == (0, "")
    found = RanksRecord.model_validate_json(result.stdout)
    assert [layer.operator for layer in found.layers] == ["Gemm"] * 3
    stored = json.loads(result.stdout)
    schema = RanksRecord.model_json_schema(mode="serialization")
    assert stored.keys() == schema["properties"].keys()
    assert stored["layers"][0].keys() == schema["$defs"]["LayerRanks"]["properties"].keys()
    assert set(stored["layers"][0]["best"]) <= {"0.75", "0.5", "0.25"}


def test_the_screen(decided: None) -> None:
    result = run(CNN, "--data", DATA)
    assert (result.exit_code, result.stderr) == (0, "")
    lines = result.stdout.splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0].startswith("cnn.onnx   1.3 M MACs")
    assert lines[2].split() == ["layer", "ranks", "as", "MACs", "error", "ms", "pays"]
    screen = " ".join(result.stdout.split())
    assert "Conv 3x3, 16 x 144" in screen
    assert "3 more, " in screen
    assert "of what a layer gives on 200 feeds" in screen
    assert "less to do: 11 of 11 layers" in screen
    screen = " ".join(run(CNN).stdout.split())
    assert "without --data all that it may read counts alike" in screen
    assert "the squares of the layer's weights" in screen


def test_a_model_without_layers_says_so(tmp_path: Path) -> None:
    model, plot = tmp_path / "m.onnx", tmp_path / "f.svg"
    onnx.save(wrap(graph([node("Relu", ["x"], ["y"])], ["x"], ["y"])), model)
    np.savez(tmp_path / "d.npz", x=np.ones((2, 4), np.float32))
    for data in ([], ["--data", tmp_path / "d.npz"]):
        result = run(model, "--plot", plot, *data)
        assert (result.exit_code, result.stderr) == (0, "")
        assert "there are no layers in it that can be split" in result.stdout
        assert "there are no layers in it that can be split" in plot.read_text()


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--data", "nothing.npz"], "data nothing.npz: no such file"),
        (["--data", "image.npz"], "input 'image' is missing"),
        (["--shape", "image:1,1"], "image"),
        (["--shape", "image"], "--shape 'image': write NAME:"),
        (["--plot", "f.png"], "--plot f.png: what is drawn is SVG; call it f.svg"),
        (["--plot", "none/f.svg"], "none/f.svg: cannot be written: No such file"),
    ],
)
def test_mistakes_are_one_line(
    arguments: list[str], said: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    np.savez("image.npz", other=np.ones((2, 1, 8, 8), np.float32))
    assert said in refused(run(MLP, *arguments))
    assert [file.name for file in tmp_path.iterdir()] == ["image.npz"]


def test_what_is_no_model_or_method(tmp_path: Path) -> None:
    broken = tmp_path / "m.onnx"
    broken.write_bytes(b"no model")
    assert str(broken) in refused(run(broken))
    assert "none.onnx" in refused(run(tmp_path / "none.onnx"))
    result = run(MLP, "--method", "qr")
    assert (result.exit_code, result.stdout) == (2, "")


# -- the picture -----------------------------------------------------------------------------------


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name: None if name == "matplotlib" else found(name)
    )
    said = refused(run(MLP, "--plot", tmp_path / "f.svg"))
    assert said == "--plot needs matplotlib: pip install 'graphopt[plot]'"
    assert list(tmp_path.iterdir()) == []


def test_the_model_is_not_drawn_over(tmp_path: Path) -> None:
    model = tmp_path / "m.svg"
    model.write_bytes(MLP.read_bytes())
    assert refused(run(model, "--plot", model)) == f"--plot {model}: that is the model"
    assert model.read_bytes() == MLP.read_bytes()


def test_a_picture_is_whole_or_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, decided: None
) -> None:
    plot = tmp_path / "f.svg"
    result = run(MLP, "--data", DATA, "--plot", plot)
    assert (result.exit_code, result.stderr) == (0, "")
    assert "layer" in result.stdout
    before = plot.read_bytes()
    assert before.endswith(b"</svg>\n")

    def full(record: Any, path: Path) -> None:
        path.write_text("<svg>")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ranks_plot, "write", full)
    said = refused(run(MLP, "--plot", plot))
    assert said == f"{plot}: cannot be written: No space left on device"
    assert "data none.npz" in refused(run(MLP, "--data", "none.npz", "--plot", plot))
    assert plot.read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["f.svg"]


def layer(number: int, root: str) -> LayerRanks:
    options = [option(left, 0.1 / left / (number + 1), left < 0.5) for left in (0.8, 0.5, 0.2)]
    return LayerRanks(
        root=root,
        operator="Conv",
        kernel=[3, 3],
        layers=1 + number % 2,
        outputs=64,
        inputs=576,
        macs=1000,
        share=0.01 * (number + 1),
        ms=1.5,
        rank_90=10,
        rank_99=20,
        evbmf=5,
        spectrum=[(1, 0.5), (32, 0.1), (64, 0.0)],
        options=options,
        best={0.5: options[1], 0.75: options[0], 0.25: options[2]},
    )


def record(names: list[str]) -> RanksRecord:
    return RanksRecord(
        host=host(),
        model={"path": "folder/m.onnx", "bytes": 3},  # type: ignore[arg-type]
        threads=1,
        methods=["svd"],
        feeds=7,
        macs=100000,
        layers=[layer(number, name) for number, name in enumerate(names)],
        seconds=1.0,
    )


def test_a_record_is_drawn_alike_however_matplotlib_is_set_up(tmp_path: Path) -> None:
    import matplotlib

    found = record(["_first", "a$x^2$b", "<&>"])
    ranks_plot.write(found, tmp_path / "a.svg")
    with matplotlib.rc_context({"font.size": 30, "svg.hashsalt": None, "savefig.bbox": "tight"}):
        ranks_plot.write(found, tmp_path / "b.svg")
        assert matplotlib.rcParams["font.size"] == 30
    drawn = (tmp_path / "a.svg").read_text()
    assert drawn == (tmp_path / "b.svg").read_text()
    assert "dc:date" not in drawn
    for name in ("_first", "a$x^2$b", "&lt;&amp;&gt;", "m.onnx: 3 layers"):
        assert f">{name}" in drawn


def test_each_layer_has_a_line_and_points_that_say_what_pays() -> None:
    for number in (3, 40):
        figure = ranks_plot.figure(record([f"y{n}" for n in range(number)]))
        left, right = figure.axes[:2]
        assert (left.get_yscale(), right.get_yscale()) == ("log", "log")
        assert len(right.lines) == number
        assert len(left.lines) == 3 * number  # and two kinds of points
        line, paying, others = left.lines[:3]
        assert list(line.get_xdata()) == [0.8, 0.5, 0.2]
        assert list(paying.get_xdata()) == [0.2]
        assert list(others.get_xdata()) == [0.8, 0.5]
        assert list(right.lines[0].get_xdata()) == [1 / 64, 0.5]
        assert bool(figure.legends) == (number == 3)
        assert len(figure.axes) == (2 if number == 3 else 3)


def test_drawing_needs_no_pyplot(tmp_path: Path) -> None:
    (tmp_path / "r.json").write_text(record(["y"]).model_dump_json())
    program = (
        "import sys\nfrom pathlib import Path\nfrom graphopt.ranks import RanksRecord\n"
        "from graphopt.render import ranks_plot\n"
        "assert 'matplotlib' not in sys.modules\n"
        "found = RanksRecord.model_validate_json(Path('r.json').read_text())\n"
        "ranks_plot.write(found, Path('f.svg'))\n"
        "assert 'matplotlib.pyplot' not in sys.modules\n"
    )
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    call = [sys.executable, "-W", "error", "-c", program]
    subprocess.run(call, cwd=tmp_path, env=environment, check=True)


# -- tables ----------------------------------------------------------------------------------------


def drawn(found: RanksRecord, width: int) -> list[str]:
    stream = StringIO()
    show_ranks(found, Console(file=stream, width=width, markup=False, highlight=False))
    return stream.getvalue().splitlines()


@pytest.mark.parametrize("width", [72, 80, 120, 160])
def test_long_names_keep_their_ends(width: int) -> None:
    names = [
        f"/model/encoder/layers.{n}/attention/query/projection/MatMul_output_{n}" for n in "67"
    ]
    lines = drawn(record(names), width)
    assert max(map(len, lines)) <= width
    column = "".join(line[: lines[2].index("ranks")].replace(" ", "") for line in lines)
    assert "MatMul_output_7and1more" in column
    assert all((name in column) == (width > 80) for name in names)
    assert ("..." in column) == (width <= 80)
    heads = [place for place, line in enumerate(lines) if " dense " in line]
    assert len(heads) == 2
    assert heads[1] - heads[0] == 5  # dense, three splits and a gap, however long the name is


def test_layers_with_most_macs_come_first() -> None:
    lines = drawn(record([f"y{n}" for n in range(11)]), 80)
    shown = [line.split()[0] for line in lines if " dense " in line]
    assert shown == [f"y{n}" for n in range(10, 2, -1)]
    assert any(line.startswith("3 more, 6.0 % of MACs") for line in lines)


def test_the_end_of_a_name() -> None:
    assert text.tail("abcdefgh", 8) == "abcdefgh"
    assert text.tail("abcdefghi", 8) == "...efghi"
    assert text.tail("abcdefghi", 2) == ".."
    assert text.tail("abcdefghi", 0) == ""
    wide = text.tail("日本日本日本", 8)
    assert wide == "...日本"
    assert cell_len(wide) <= 8
