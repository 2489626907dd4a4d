"""Lines and pages of text, rendered with noise, for the three models of PP-OCR.

Fonts are those that matplotlib brings (DejaVu and STIX in all their cuts), words come from the
docstrings of installed packages, and colours, sizes, blur, noise and inclination are drawn at
random. Images are float32 in -1..1, padded with 0 as PP-OCR pads them.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFilter, ImageFont

Array = NDArray[Any]

HEIGHT = 48
PAGE = 640
CUTS = (
    "DejaVuSans",
    "DejaVuSans-Bold",
    "DejaVuSans-Oblique",
    "DejaVuSerif",
    "DejaVuSerif-Bold",
    "DejaVuSerif-Italic",
    "DejaVuSansMono",
    "DejaVuSansMono-Bold",
    "DejaVuSansMono-Oblique",
    "STIXGeneral",
    "STIXGeneralBol",
    "STIXGeneralItalic",
    "STIXGeneralBolIta",
)
SHRINK = 0.4  # the ratio of Differentiable Binarization (Liao et al. 2020), section 3.4


def font(rng: np.random.Generator, size: int) -> ImageFont.FreeTypeFont:
    folder = Path(matplotlib.get_data_path()) / "fonts" / "ttf"
    return ImageFont.truetype(folder / f"{rng.choice(CUTS)}.ttf", size)


def phrase(rng: np.random.Generator, words: Sequence[str], longest: int) -> str:
    """One to four words that follow each other, or a number, of at most so many characters."""
    if rng.random() < 0.12:
        return f"{rng.integers(1, 10**6) / 100:.2f}"
    start, count = rng.integers(len(words) - 4), rng.integers(1, 5)
    while count > 1 and len(" ".join(words[start : start + count])) > longest:
        count -= 1
    return " ".join(words[start : start + count])[:longest].strip()


def _colours(rng: np.random.Generator) -> tuple[Array, Array]:
    """Paper and ink, far enough apart to be read."""
    dark, light = rng.uniform(0, 110, 3), rng.uniform(140, 255, 3)
    return (light, dark) if rng.random() < 0.75 else (dark, light)


def _spoiled(image: Image.Image, rng: np.random.Generator) -> Array:
    """The image with blur and noise, uint8."""
    if rng.random() < 0.4:
        image = image.filter(ImageFilter.GaussianBlur(rng.uniform(0.3, 1.7)))
    pixels = np.asarray(image, np.float64) + rng.normal(
        0, rng.uniform(2, 30), (*image.size[::-1], 3)
    )
    return pixels.clip(0, 255).astype(np.uint8)


def line(rng: np.random.Generator, text: str) -> Array:
    """The text alone, uint8 [48, width, 3]."""
    face = font(rng, int(rng.integers(13, 45)))  # small ones are enlarged
    left, top, right, bottom = face.getbbox(text)
    margins = (rng.integers(3, 12, 4) * face.size // 44).clip(1)
    size = (int(right - left + margins[:2].sum()), int(bottom - top + margins[2:].sum()))
    paper, ink = _colours(rng)
    image = Image.new("RGB", size, tuple(paper.astype(int)))
    at = (int(margins[0] - left), int(margins[2] - top))
    ImageDraw.Draw(image).text(at, text, tuple(ink.astype(int)), face)
    image = image.rotate(
        rng.uniform(-1.5, 1.5), Image.Resampling.BICUBIC, fillcolor=tuple(paper.astype(int))
    )
    return _spoiled(image.resize((max(8, size[0] * HEIGHT // size[1]), HEIGHT)), rng)


def padded(pixels: Array, width: int) -> Array:
    """uint8 [48, any width, 3] as float32 [3, 48, width]; squeezed if it is too wide."""
    if pixels.shape[1] > width:
        pixels = np.asarray(Image.fromarray(pixels).resize((width, HEIGHT)))
    result = np.zeros((3, HEIGHT, width), np.float32)
    result[:, :, : pixels.shape[1]] = scaled(pixels)
    return result


def scaled(pixels: Array) -> Array:
    """uint8 [h, w, 3] as float32 [3, h, w] in -1..1."""
    found: Array = (pixels.astype(np.float32) / 127.5 - 1).transpose(2, 0, 1)
    return found


def lines(rng: np.random.Generator, words: Sequence[str], count: int) -> dict[str, Array]:
    """Lines to read: x float32 [n, 3, 48, 320] and their text."""
    texts = [phrase(rng, words, 22) for _ in range(count)]
    return {"x": np.stack([padded(line(rng, t), 320) for t in texts]), "text": np.array(texts)}


def directions(rng: np.random.Generator, words: Sequence[str], count: int) -> dict[str, Array]:
    """Lines that stand upright or on their head: x float32 [n, 3, 48, 192] and label 0 or 1."""
    label = rng.integers(0, 2, count)
    images = []
    for turned in label:
        pixels = line(rng, phrase(rng, words, 16))
        images.append(padded(pixels[::-1, ::-1] if turned else pixels, 192))
    return {"x": np.stack(images), "label": label}


def pages(rng: np.random.Generator, words: Sequence[str], count: int) -> dict[str, Array]:
    """Pages of scattered lines: x float32 [n, 3, 640, 640] and shrink, uint8 [n, 640, 640].

    `shrink` marks every line's box moved inwards by area (1 - r^2) / perimeter, which is what the
    detector was trained to find.
    """
    drawn = [_page(rng, words) for _ in range(count)]
    return {"x": np.stack([x for x, _ in drawn]), "shrink": np.stack([s for _, s in drawn])}


def _page(rng: np.random.Generator, words: Sequence[str]) -> tuple[Array, Array]:
    paper, _ = _colours(rng)
    image = Image.new("RGB", (PAGE, PAGE), tuple(paper.astype(int)))
    draw = ImageDraw.Draw(image)
    shrunk = np.zeros((PAGE, PAGE), np.uint8)
    top = int(rng.integers(8, 40))
    while top < PAGE - 60:
        face, text = font(rng, int(rng.integers(14, 44))), phrase(rng, words, 24)
        left, above, right, below = map(int, face.getbbox(text))
        width, height = right - left, below - above
        if width < PAGE - 20:
            x = int(rng.integers(5, PAGE - width - 5))
            ink = 255 * (paper < 128) + rng.uniform(-60, 60, 3)
            draw.text((x - left, top - above), text, tuple(ink.clip(0, 255).astype(int)), face)
            inset = round(width * height * (1 - SHRINK**2) / (2 * (width + height)))
            inset = min(inset, (min(width, height) - 1) // 2)
            shrunk[top + inset : top + height - inset, x + inset : x + width - inset] = 1
        top += height + int(rng.integers(10, 50))
    return scaled(_spoiled(image, rng)), shrunk
