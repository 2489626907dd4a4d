"""Accuracy of a digits model on the 540 evaluation images.

    python models/digits/score.py MODEL.onnx
    graphopt optimize IN.onnx OUT.onnx --metric models/digits/score.py:accuracy

The file needs nothing else of this repository but the evaluation.npz beside it, because
`--metric` loads it by path.
"""

import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Run = Callable[[dict[str, Array]], Mapping[str, Array]]

BATCH = 60


def accuracy(run: Run) -> float:
    """Share of the evaluation images whose largest logit is their label, 0..1.

    `run` takes {"image": float32 [n, 1, 8, 8]} and returns {"logits": [n, 10]}.
    """
    with np.load(Path(__file__).resolve().parent / "evaluation.npz") as data:
        image, label = data["image"], data["label"]
    correct = 0
    for start in range(0, len(label), BATCH):
        batch = slice(start, start + BATCH)
        logits = run({"image": image[batch]})["logits"]
        correct += int((logits.argmax(axis=1) == label[batch]).sum())
    return correct / len(label)


def score(model: Path) -> float:
    """Accuracy of an ONNX file in onnxruntime on the CPU."""
    import onnxruntime as ort

    session = ort.InferenceSession(str(model), providers=["CPUExecutionProvider"])
    names = [output.name for output in session.get_outputs()]
    return accuracy(lambda feed: dict(zip(names, session.run(names, feed), strict=True)))


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    print(f"{score(Path(sys.argv[1])):.4f}")
