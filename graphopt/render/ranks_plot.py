"""The picture of `ranks`: what layers lose at the MACs that they keep, and their spectra."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from graphopt.errors import UsageError
from graphopt.output import Target, output_errors
from graphopt.render import text

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from graphopt.ranks import LayerRanks, RankOption, RanksRecord

_NAMED: Final = 10  # layers: so many lines can be told apart by colours
_NAME: Final = 40  # characters in the legend
_LEAST: Final = 1e-6  # errors and shares of energy below this are drawn at the lower edge
_SETTINGS: Final[dict[Any, Any]] = {
    "svg.hashsalt": "graphopt",  # the same bytes for the same record
    "svg.fonttype": "none",  # names can be searched for, and need no font here
    "text.parse_math": False,  # names are not formulas
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
}


@contextlib.contextmanager
def plotter(path: Path | None, model: Path) -> Iterator[Callable[[RanksRecord], None]]:
    """A function that draws a record to `path`; that it can be written is checked now.

    Raises UsageError without matplotlib, for what is not called .svg, and OutputError.
    """
    if path is None:
        yield lambda record: None
        return
    if path.suffix.lower() != ".svg":
        raise UsageError(f"--plot {path}: what is drawn is SVG; call it {path.stem or 'ranks'}.svg")
    if path.resolve() == model.resolve():
        raise UsageError(f"--plot {path}: that is the model")
    if importlib.util.find_spec("matplotlib") is None:
        raise UsageError("--plot needs matplotlib: pip install 'graphopt[plot]'")
    with Target(path) as place:

        def save(record: RanksRecord) -> None:
            with output_errors(path):
                write(record, place.staged)
            place.commit([place.staged])

        yield save


def write(record: RanksRecord, path: Path) -> None:
    """Draw it as SVG; nothing in it depends on when, or on how matplotlib is set up."""
    import matplotlib

    with matplotlib.rc_context():
        matplotlib.rcdefaults()
        matplotlib.rcParams.update(_SETTINGS)
        figure(record).savefig(path, format="svg", metadata={"Date": None})


def figure(record: RanksRecord) -> Figure:
    """Errors over MACs on the left, energies over ranks on the right, both logarithmic."""
    from matplotlib.figure import Figure

    layers = record.layers
    found = Figure(figsize=(11, 5 + 0.2 * _legend_rows(layers)), layout="constrained")
    name = text.clean(Path(record.model.path).name)
    if not layers:
        found.suptitle(f"{name}: there are no layers in it that can be split")
        return found
    found.suptitle(f"{name}: {text.plural(len(layers), 'layer')}, wide lines have more MACs")
    left, right = found.subplots(1, 2)
    colours = _colours(len(layers))
    most = max(layer.share for layer in layers) or 1.0
    for layer, colour in zip(layers, colours, strict=True):
        style = {"color": colour, "linewidth": 0.7 + 2.0 * layer.share / most, "alpha": 0.85}
        _errors(left, layer, style)
        _energies(right, layer, style)
    seen = f"weighed by {text.plural(record.feeds, 'feed')}" if record.feeds else "of weights alone"
    left.set(xlabel="MACs that are left of the layer's", ylabel=f"error, {seen}")
    left.set(title="What layers lose (filled: it pays here)", xlim=(0, 1))
    right.set(xlabel="rank, of the full rank", ylabel=f"energy beyond it, {seen}")
    right.set(title="Spectra", xlim=(0, 1))
    for axes in (left, right):
        axes.set_yscale("log")
        axes.set_ylim(bottom=min(max(axes.get_ylim()[0], _LEAST), 0.09), top=1.1)
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("")
        axes.grid(alpha=0.25)
    _explain(found, [left, right], layers, colours)
    return found


def _errors(axes: Axes, layer: LayerRanks, style: dict[str, Any]) -> None:
    """What is lost at fewer and fewer MACs, in the form that loses least at each."""
    found = front(layer.options)
    x, y = [o.left for o in found], [max(o.error, _LEAST) for o in found]
    axes.plot(x, y, **style)
    for pays in (True, False):
        chosen = [place for place, option in enumerate(found) if option.pays == pays]
        axes.plot(
            [x[place] for place in chosen],
            [y[place] for place in chosen],
            linestyle="none",
            marker="o",
            markersize=4,
            color=style["color"],
            markerfacecolor=style["color"] if pays else "white",
        )


def front(options: Sequence[RankOption]) -> list[RankOption]:
    """The options that lose less than all that leave as few MACs, most MACs first."""
    found: list[RankOption] = []
    for option in sorted(options, key=lambda o: (o.left, o.error)):
        if not found or option.error < found[-1].error:
            found.append(option)
    return found[::-1]


def _energies(axes: Axes, layer: LayerRanks, style: dict[str, Any]) -> None:
    full = min(layer.outputs, layer.inputs)
    points = [(rank, share) for rank, share in layer.spectrum if rank < full]
    axes.plot([r / full for r, _ in points], [max(s, _LEAST) for _, s in points], **style)


def _legend_rows(layers: Sequence[LayerRanks]) -> int:
    return (len(layers) + 1) // 2 if len(layers) <= _NAMED else 0


def _colours(number: int) -> list[Any]:
    """Of few layers such as differ, of many from the first one to the last."""
    import matplotlib

    if number <= _NAMED:
        return [matplotlib.colormaps["tab10"](place) for place in range(number)]
    scale = matplotlib.colormaps["viridis"]
    return [scale(place / (number - 1)) for place in range(number)]


def _explain(
    found: Figure, axes: Sequence[Axes], layers: Sequence[LayerRanks], colours: Sequence[Any]
) -> None:
    """Names of a few layers, or a scale for many."""
    from matplotlib.cm import ScalarMappable
    from matplotlib.colors import Normalize
    from matplotlib.lines import Line2D

    if len(layers) > _NAMED:
        scale = ScalarMappable(Normalize(1, len(layers)), "viridis")
        found.colorbar(scale, ax=list(axes), label="layers, in order of computation")
        return
    names = [text.tail(text.clean(layer.root), _NAME) for layer in layers]
    lines = [Line2D([], [], color=colour) for colour in colours]
    found.legend(lines, names, loc="outside lower center", ncols=2, frameon=False)
