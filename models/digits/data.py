"""The digits data: one fixed split into training, calibration and evaluation.

scikit-learn's digits are 1797 grey images of 8x8 pixels. A stratified split with random_state 0
gives 1257 training and 540 evaluation images; the first 200 training images, without labels,
are the calibration set. Calibration and evaluation are stored beside this file, for use on the
command line; write them again with

    python models/digits/data.py
"""

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

EVALUATION_SIZE = 540
CALIBRATION_SIZE = 200


class Split(NamedTuple):
    """Images are float32 [n, 1, 8, 8] in 0..1, labels int64 [n] in 0..9."""

    train_image: NDArray[np.float32]
    train_label: NDArray[np.int64]
    calibration_image: NDArray[np.float32]
    evaluation_image: NDArray[np.float32]
    evaluation_label: NDArray[np.int64]


def split() -> Split:
    """The split, made from scikit-learn's copy of the digits (needs scikit-learn)."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    image = (digits.images / 16).astype(np.float32)[:, None]
    label = digits.target.astype(np.int64)
    train, evaluation = train_test_split(
        np.arange(len(label)), test_size=EVALUATION_SIZE, random_state=0, stratify=label
    )
    return Split(
        train_image=image[train],
        train_label=label[train],
        calibration_image=image[train[:CALIBRATION_SIZE]],
        evaluation_image=image[evaluation],
        evaluation_label=label[evaluation],
    )


def write(folder: Path) -> None:
    """Writes calibration.npz (image) and evaluation.npz (image, label) into `folder`."""
    data = split()
    np.savez_compressed(folder / "calibration.npz", image=data.calibration_image)
    np.savez_compressed(
        folder / "evaluation.npz", image=data.evaluation_image, label=data.evaluation_label
    )


if __name__ == "__main__":
    write(Path(__file__).resolve().parent)
