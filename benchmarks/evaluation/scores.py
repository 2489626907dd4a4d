"""Scores of the models that `int8.py` quantizes: larger is better, with what is known per sample.

A metric keeps one row of numbers for every sample, and its value is a function of all rows. So
samples can be drawn again: the drop from one model to another gets a bootstrap interval in which
both are judged on the same samples (Efron and Tibshirani, An Introduction to the Bootstrap,
chapter 13), and a score that is no mean (F1, AUC, a correlation) is no exception.

This module needs numpy alone, since OpenVINO's own environment imports it too.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
Rows = NDArray[np.float64]
Run = Callable[[dict[str, Array]], Mapping[str, Array]]
Evaluation = Mapping[str, Array]

DRAWS = 2000
CONFIDENCE = 0.95
FRAME, CONTEXT, RATE = 512, 64, 16000
FRAMES_A_BLOCK = 31  # about a second, as long as neighbouring frames resemble each other
IGNORED = (0.2, 0.8)  # frames of which speech fills this much are neither
INK = 0.3  # the probability from which the detector takes a pixel for text
BLANK = 0


@dataclass(frozen=True)
class Metric:
    """`rows(run, evaluation)` has a row for every sample, `value(rows)` is the score.

    `run` takes the inputs by name and returns the outputs by name, in the model's order.
    """

    name: str
    sample: str
    rows: Callable[[Run, Evaluation], Rows]
    value: Callable[[Rows], float]

    def score(self, run: Run, evaluation: Evaluation) -> float:
        """The score of a model on the evaluation set."""
        return self.value(self.rows(run, evaluation))


@dataclass(frozen=True)
class Drop:
    """How much lower a score is than that of the reference, with its 95 % interval."""

    drop: float
    low: float
    high: float


def paired_drop(metric: Metric, reference: Rows, rows: Rows, seed: int = 0) -> Drop:
    """The drop from `reference` to `rows`, rows of the same samples, by percentiles of 2000 draws.

    Raises ValueError where the two are not of the same samples.
    """
    if reference.shape != rows.shape:
        raise ValueError(f"rows of {reference.shape} and {rows.shape} are not of the same samples")
    drop = metric.value(reference) - metric.value(rows)
    if np.array_equal(reference, rows, equal_nan=True):
        return Drop(0.0, 0.0, 0.0)
    rng = np.random.default_rng(seed)
    drops = np.empty(DRAWS)
    for index in range(DRAWS):
        drawn = rng.integers(0, len(rows), len(rows))
        drops[index] = metric.value(reference[drawn]) - metric.value(rows[drawn])
    tail = (1 - CONFIDENCE) / 2
    # A draw may hold one class only, or nothing that varies, of which there is no score.
    low, high = np.nanquantile(drops, [tail, 1 - tail])
    return Drop(float(drop), float(low), float(high))


def _first(outputs: Mapping[str, Array]) -> Array:
    return next(iter(outputs.values()))


def _accuracy(port: str, data: str, batch: int) -> Metric:
    """Share of the samples whose largest output is their `label`."""

    def rows(run: Run, evaluation: Evaluation) -> Rows:
        samples = evaluation[data]
        best = [
            _first(run({port: samples[start : start + batch]})).argmax(axis=1)
            for start in range(0, len(samples), batch)
        ]
        return np.array(np.concatenate(best) == evaluation["label"], np.float64)[:, None]

    return Metric("accuracy", "samples", rows, _mean)


def _mean(rows: Rows) -> float:
    return float(rows.mean())


def edit_distance(first: str, second: str) -> int:
    """Insertions, deletions and replacements that turn one text into the other (Levenshtein)."""
    row = list(range(len(second) + 1))
    for i, left in enumerate(first, 1):
        previous, row[0] = row[0], i
        for j, right in enumerate(second, 1):
            kept = previous + (left != right)
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, kept)
    return row[-1]


def read_line(classes: Array, characters: Array) -> str:
    """The text of the best class of every step, as CTC reads it: repeats once, no blanks."""
    kept = np.ones(len(classes), bool)
    kept[1:] = classes[1:] != classes[:-1]
    return "".join(characters[classes[kept & (classes != BLANK)]]).strip()


def _character_rows(run: Run, evaluation: Evaluation) -> Rows:
    """Errors and characters of every line."""
    images, texts, batch = evaluation["x"], evaluation["text"], 6
    rows = []
    for start in range(0, len(images), batch):
        found = _first(run({"x": images[start : start + batch]})).argmax(axis=2)
        for classes, text in zip(found, texts[start : start + batch], strict=True):
            line = read_line(classes, evaluation["characters"])
            rows.append((edit_distance(line, str(text)), len(str(text))))
    return np.array(rows, np.float64)


def _character_accuracy(rows: Rows) -> float:
    errors, characters = rows.sum(axis=0)
    return float(1 - errors / characters)


def _pixel_rows(run: Run, evaluation: Evaluation) -> Rows:
    """Pixels of every image that are text and found, only found, and only text."""
    rows = []
    for image, shrunk in zip(evaluation["x"], evaluation["shrink"].astype(bool), strict=True):
        found = _first(run({"x": image[None]}))[0, 0] > INK
        rows.append([(found & shrunk).sum(), (found & ~shrunk).sum(), (~found & shrunk).sum()])
    return np.array(rows, np.float64)


def _f1(rows: Rows) -> float:
    both, found, text = rows.sum(axis=0)
    return float(2 * both / (2 * both + found + text))


def _correlation_rows(run: Run, evaluation: Evaluation) -> Rows:
    """Moments of every image's best class scores and those that fp32 found."""
    rows = []
    for image, reference in zip(evaluation["x"], evaluation["ref"], strict=True):
        found = _first(run({"images": image[None].astype(np.float32)}))[0, 4:].max(axis=0)
        x, y = found.astype(np.float64), reference[4:].max(axis=0).astype(np.float64)
        rows.append([len(x), x.sum(), y.sum(), x @ x, y @ y, x @ y])
    return np.array(rows, np.float64)


def _correlation(rows: Rows) -> float:
    n, x, y, xx, yy, xy = rows.sum(axis=0)
    variances = (n * xx - x * x) * (n * yy - y * y)
    return float((n * xy - x * y) / np.sqrt(variances)) if variances > 0 else 0.0


def _frame_rows(run: Run, evaluation: Evaluation) -> Rows:
    """Blocks of frames: the probability of speech, and whether it was; NaN where ignored."""
    rows = []
    for key in sorted(key for key in evaluation if key.startswith("audio")):
        share = evaluation[key.replace("audio", "label")]
        frames = np.stack([_speech(run, evaluation[key]), np.where(share > 0.5, 1.0, 0.0)], axis=1)
        frames[(share >= IGNORED[0]) & (share <= IGNORED[1])] = np.nan
        padding = -len(frames) % FRAMES_A_BLOCK
        frames = np.concatenate([frames, np.full((padding, 2), np.nan)])
        rows.append(frames.reshape(-1, FRAMES_A_BLOCK, 2))
    return np.concatenate(rows)


def _speech(run: Run, audio: Array) -> Array:
    """The probability of speech in every frame; the model's state goes from frame to frame."""
    samples = audio.astype(np.float32) / 32767
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, CONTEXT), np.float32)
    found = []
    for start in range(0, len(samples), FRAME):
        frame = np.concatenate([context, samples[None, start : start + FRAME]], axis=1)
        outputs = run({"input": frame, "state": state, "sr": np.array(RATE, np.int64)})
        found.append(float(outputs["output"].ravel()[0]))
        state, context = outputs["stateN"], frame[:, -CONTEXT:]
    return np.array(found)


def _auc(rows: Rows) -> float:
    """How often a frame of speech is rated above one without (Mann-Whitney), ties as half."""
    rated, is_speech = rows.reshape(-1, 2).T
    speech, other = rated[is_speech == 1], np.sort(rated[is_speech == 0])
    if not len(speech) or not len(other):
        return float("nan")
    below = np.searchsorted(other, speech, "left") + np.searchsorted(other, speech, "right")
    return float(below.sum() / (2 * len(speech) * len(other)))


def _embedded(run: Run, ids: Array, mask: Array) -> Array:
    """Unit vectors, means of the hidden states over the tokens of each text."""
    found, batch = [], 16
    for start in range(0, len(ids), batch):
        part = slice(start, start + batch)
        outputs = run({"input_ids": ids[part], "attention_mask": mask[part]})
        hidden = next(value for value in outputs.values() if value.ndim == 3)
        weights = mask[part, :, None].astype(np.float32)
        mean = (hidden.astype(np.float32) * weights).sum(axis=1) / weights.sum(axis=1)
        found.append(mean / np.linalg.norm(mean, axis=1, keepdims=True))
    return np.concatenate(found)


def _rank_rows(run: Run, evaluation: Evaluation) -> Rows:
    """1 / the rank of every question's own text among all."""
    asked = _embedded(run, evaluation["q_ids"], evaluation["q_mask"])
    texts = _embedded(run, evaluation["d_ids"], evaluation["d_mask"])
    likeness = asked @ texts.T
    ranks = 1 + (likeness > np.diag(likeness)[:, None]).sum(axis=1)
    return np.array(1 / ranks, np.float64)[:, None]


METRICS = {
    "ppocr_rec_v4": Metric("character accuracy", "lines", _character_rows, _character_accuracy),
    "ppocr_cls_v2": _accuracy("x", "x", 6),
    "ppocr_det_v4": Metric("pixel F1", "images", _pixel_rows, _f1),
    "nudenet_yolov8n": Metric(
        "correlation of class scores with fp32", "images", _correlation_rows, _correlation
    ),
    "silero_vad_ifless_op18": Metric("AUC of frames", "seconds", _frame_rows, _auc),
    "magika_v3_3": _accuracy("bytes", "bytes", 32),
    "paraphrase_minilm_l3": Metric("mean reciprocal rank", "questions", _rank_rows, _mean),
    **{f"digits_{name}": _accuracy("image", "image", 60) for name in ("mlp", "cnn", "vit", "gru")},
}
"""The metric of every model of the benchmark, by the model's name."""
