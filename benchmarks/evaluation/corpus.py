"""What installed packages bring: files of many types, and summaries with what they summarise."""

from __future__ import annotations

import ast
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import magika
import numpy as np
from numpy.typing import NDArray
from tokenizers import Tokenizer

Array = NDArray[Any]

LABELS = {
    "python": "py pyi",
    "pythonbytecode": "pyc",
    "c": "c",
    "cpp": "cpp",
    "fortran": "f f90",
    "javascript": "js",
    "html": "html",
    "css": "css",
    "markdown": "md",
    "rst": "rst",
    "latex": "tex",
    "txt": "txt",
    "shell": "sh",
    "batch": "bat",
    "json": "json",
    "ini": "ini",
    "toml": "toml",
    "xml": "xml",
    "yaml": "yaml yml",
    "csv": "csv",
    "po": "po",
    "ipynb": "ipynb",
    "svg": "svg",
    "png": "png",
    "jpeg": "jpg",
    "gif": "gif",
    "ico": "ico",
    "ttf": "ttf",
    "wav": "wav",
    "pdf": "pdf",
    "npy": "npy",
    "npz": "npz",
    "pickle": "pkl",
    "gzip": "gz",
    "bzip": "bz2",
    "xz": "xz",
    "zip": "zip whl",
    "elf": "so",
    "pebin": "exe",
}
"""Labels of magika, and the extensions that stand for one of them alone."""
EXTENSIONS = {extension: label for label, some in LABELS.items() for extension in some.split()}

PACKAGES = ("numpy", "scipy", "sklearn", "skimage", "matplotlib", "networkx")
EVALUATED, CALIBRATED = 35, 8  # files of a label at most


def site() -> Path:
    """Where packages are installed."""
    return Path(sysconfig.get_paths()["purelib"])


def files(rng: np.random.Generator) -> tuple[dict[str, Array], dict[str, Array]]:
    """Calibration and evaluation sets of magika: bytes int32 [n, 2048] and label."""
    folder = Path(magika.__file__).parent / "models" / "standard_v3_3"
    config = json.loads((folder / "config.min.json").read_text())
    labels = config["target_labels_space"]
    found: dict[str, list[Path]] = {}
    for root in (site(), Path(sysconfig.get_paths()["stdlib"])):
        for file in sorted(root.rglob("*.*")):
            label = EXTENSIONS.get(file.suffix[1:].lower())
            # An environment's packages lie within the standard library's folder on some systems.
            inside = root == site() or "site-packages" not in file.parts
            if inside and label in labels and file.is_file() and file.stat().st_size > 64:
                found.setdefault(label, []).append(file)
    calibration, evaluation, truth = [], [], []
    for label in sorted(found):
        chosen = [found[label][i] for i in rng.permutation(len(found[label]))]
        few = min(CALIBRATED, len(chosen) // 4)
        calibration += [features(file, config) for file in chosen[:few]]
        rest = chosen[few : few + EVALUATED]
        evaluation += [features(file, config) for file in rest]
        truth += [labels.index(label)] * len(rest)
    evaluated = {"bytes": np.stack(evaluation), "label": np.array(truth, np.int64)}
    return {"bytes": np.stack(calibration)}, evaluated


def features(file: Path, config: dict[str, Any]) -> Array:
    """The first and last bytes of a file without white space around, as magika reads them."""
    content = file.read_bytes()
    block, padding = config["block_size"], config["padding_token"]
    whole = len(content) <= block
    head = content[:block].strip() if whole else content[:block].lstrip()
    tail = content[-block:].strip() if whole else content[-block:].rstrip()
    first, last = head[: config["beg_size"]], tail[-config["end_size"] :]
    result = np.full(config["beg_size"] + config["end_size"], padding, np.int32)
    result[: len(first)] = np.frombuffer(first, np.uint8)
    if last:
        result[-len(last) :] = np.frombuffer(last, np.uint8)
    return result


def docstrings() -> Iterator[tuple[str, str]]:
    """The first line and the text under it of what numpy and its like document, once each."""
    seen: set[str] = set()
    for package in PACKAGES:
        for file in sorted((site() / package).rglob("*.py")):
            if "tests" in file.parts:
                continue
            for node in ast.walk(ast.parse(file.read_bytes())):
                if not isinstance(node, ast.FunctionDef | ast.ClassDef):
                    continue
                summary, _, rest = (ast.get_docstring(node) or "").partition("\n\n")
                # What comes before the first heading is prose.
                prose = re.split(r"\n[^\n]+\n-{3,}|\n\.\. |::", rest)[0]
                summary, prose = " ".join(summary.split()), " ".join(prose.split())
                fits = 25 < len(summary) < 110 and len(prose) > 150 and "----" not in prose[:80]
                if fits and summary not in seen and prose not in seen:
                    seen |= {summary, prose}
                    yield summary, prose


def words() -> list[str]:
    """Words of prose with letters that PP-OCR knows, in order."""
    prose = " ".join(text for _, text in docstrings())
    return [w for w in prose.split() if re.fullmatch(r"[A-Za-z0-9'.,:;()-]{1,14}", w)]


def questions(
    rng: np.random.Generator, tokenizer: Path
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Calibration and evaluation sets of the sentence encoder, token ids and masks, int64.

    Evaluation: q_ids, q_mask [256, 32] of summaries, and d_ids, d_mask [256, 96] of the texts that
    they summarise, in the same order.
    """
    encoder = Tokenizer.from_file(str(tokenizer))

    def encoded(texts: list[str], length: int) -> tuple[Array, Array]:
        encoder.enable_truncation(length)
        encoder.enable_padding(length=length)
        found = encoder.encode_batch(texts)
        ids, mask = ([getattr(f, what) for f in found] for what in ("ids", "attention_mask"))
        return np.array(ids, np.int64), np.array(mask, np.int64)

    pairs = list(docstrings())
    pairs = [pairs[i] for i in rng.permutation(len(pairs))[:456]]
    ids, mask = encoded([prose for _, prose in pairs[256:]], 96)
    q_ids, q_mask = encoded([summary for summary, _ in pairs[:256]], 32)
    d_ids, d_mask = encoded([prose for _, prose in pairs[:256]], 96)
    evaluation = {"q_ids": q_ids, "q_mask": q_mask, "d_ids": d_ids, "d_mask": d_mask}
    return {"input_ids": ids, "attention_mask": mask}, evaluation
