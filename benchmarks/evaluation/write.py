"""Writes the calibration and evaluation set of one model; run by build.py in its environment.

write.py NAME FOLDER TOKENIZER.json
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.evaluation import corpus, speech, text

Arrays = dict[str, NDArray[Any]]
Draw = Callable[[np.random.Generator, list[str], int], Arrays]

SIZE = 320
CALIBRATED_PHOTOS = (
    "skimage/data/astronaut.png",
    "skimage/data/coffee.png",
    "skimage/data/motorcycle_right.png",
    "skimage/data/retina.jpg",
    "sklearn/datasets/images/china.jpg",
)
EVALUATED_PHOTOS = (
    "matplotlib/mpl-data/sample_data/grace_hopper.jpg",
    "skimage/data/chelsea.png",
    "skimage/data/hubble_deep_field.jpg",
    "skimage/data/ihc.png",
    "skimage/data/rocket.jpg",
    "sklearn/datasets/images/flower.jpg",
)


def photos(rng: np.random.Generator, names: tuple[str, ...], each: int) -> NDArray[np.float32]:
    """Views of photos, half of them mirrored: float32 [n, 3, 320, 320] in 0..1."""
    views = []
    for name in names:
        photo = Image.open(corpus.site() / name).convert("RGB")
        for number in range(each):
            side = int(min(photo.size) * rng.uniform(0.45, 1.0))
            left, top = (int(rng.integers(0, full - side + 1)) for full in photo.size)
            view = photo.crop((left, top, left + side, top + side)).resize((SIZE, SIZE))
            pixels = np.asarray(view, np.float32)[:, :: -1 if number % 2 else 1]
            views.append(pixels.transpose(2, 0, 1) / 255)
    return np.stack(views).astype(np.float32)


def written(draw: Draw, calibrated: int, evaluated: int) -> tuple[Arrays, Arrays]:
    """Text images of a kind; words of the two sets come from different places."""
    words = corpus.words()
    half = len(words) // 2
    calibration = draw(np.random.default_rng(1), words[:half], calibrated)
    return {"x": calibration["x"]}, draw(np.random.default_rng(2), words[half:], evaluated)


def spoken() -> tuple[Arrays, Arrays]:
    """Eight recordings with their frames' labels, and one more to calibrate on (see build.py)."""
    evaluation: Arrays = {}
    for index in range(8):
        audio, label = speech.recording(np.random.default_rng(10 + index), 18)
        evaluation |= {f"audio{index}": audio, f"label{index}": label}
    return {"audio": speech.recording(np.random.default_rng(1), 40)[0]}, evaluation


def main(name: str, folder: Path, tokenizer: Path) -> None:
    rng = np.random.default_rng(0)
    if name == "ppocr_rec_v4":
        calibration, evaluation = written(text.lines, 60, 300)
    elif name == "ppocr_cls_v2":
        calibration, evaluation = written(text.directions, 60, 300)
    elif name == "ppocr_det_v4":
        calibration, evaluation = written(text.pages, 8, 20)
    elif name == "nudenet_yolov8n":
        calibration = {"images": photos(rng, CALIBRATED_PHOTOS, 4)}
        evaluation = {"x": photos(rng, EVALUATED_PHOTOS, 10)}
    elif name == "silero_vad_ifless_op18":
        calibration, evaluation = spoken()
    elif name == "magika_v3_3":
        calibration, evaluation = corpus.files(rng)
    elif name == "paraphrase_minilm_l3":
        calibration, evaluation = corpus.questions(rng, tokenizer)
    else:
        raise KeyError(f"there is no set for {name}")
    np.savez(folder / "calib.npz", **calibration)  # type: ignore[arg-type]
    np.savez(folder / "eval.npz", **evaluation)  # type: ignore[arg-type]


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), Path(sys.argv[3]))
