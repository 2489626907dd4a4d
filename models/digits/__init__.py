"""Four small trained classifiers of scikit-learn's 8x8 digits: `mlp`, `cnn`, `gru`, `vit`."""

from pathlib import Path

HERE = Path(__file__).resolve().parent

#: Accuracy on the 540 evaluation images that a model must reach to be stored, by name.
FLOORS = {"mlp": 0.97, "cnn": 0.99, "gru": 0.96, "vit": 0.94}


def path(name: str) -> Path:
    """The ONNX file of one of the models named in `FLOORS`; KeyError for any other name."""
    if name not in FLOORS:
        raise KeyError(f"no digits model is called {name!r}; there are {', '.join(FLOORS)}")
    return HERE / f"{name}.onnx"
