"""Speech-like audio whose voiced frames are known: a formant synthesiser, and noise over it.

Syllables are a fricative, a stop or a nasal and then a vowel: glottal pulses along a falling and
wavering pitch through a cascade of resonators that glide from one vowel to the next (Klatt,
Software for a cascade/parallel formant synthesizer, JASA 1980). Words are parted by pauses; over
all of it lies noise of several colours, hum and clicks, which are not speech.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.signal import butter, lfilter, sosfilt

Array = NDArray[Any]

RATE = 16000
FRAME = 512
STEP = 80  # samples for which the resonators stand still: 5 ms
# Hz, of a man's voice: Peterson and Barney, JASA 1952.
VOWELS = np.array(
    [
        [270, 2290, 3010],
        [390, 1990, 2550],
        [530, 1840, 2480],
        [660, 1720, 2410],
        [730, 1090, 2440],
        [570, 840, 2410],
        [440, 1020, 2240],
        [300, 870, 2240],
        [640, 1190, 2390],
        [490, 1350, 1690],
    ],
    np.float64,
)
NASAL = np.array([280.0, 1100.0, 2100.0])
BANDWIDTHS = np.array([70.0, 100.0, 150.0, 220.0, 300.0])
HIGHER = np.array([3500.0, 4500.0])


class Voice:
    """One speaker: pitch in Hz, and how long the vocal tract is against a man's."""

    def __init__(self, rng: np.random.Generator) -> None:
        self.rng = rng
        self.pitch = rng.uniform(95, 230)
        self.tract = 1 + 0.17 * (self.pitch > 160) + rng.uniform(-0.04, 0.04)

    def word(self, syllables: int) -> Array:
        """A word of so many syllables, float64 in about -1..1."""
        parts = []
        pitch = self.pitch * self.rng.uniform(0.95, 1.25)
        for _ in range(syllables):
            parts += [self.consonant(pitch), self.vowel(pitch)]
            pitch *= self.rng.uniform(0.86, 1.02)
        return np.concatenate(parts)

    def consonant(self, pitch: float) -> Array:
        kind = self.rng.choice(["fricative", "stop", "nasal", "none"], p=[0.3, 0.35, 0.2, 0.15])
        if kind == "nasal":
            return 0.4 * self._voiced(pitch, NASAL, NASAL, self.rng.uniform(0.05, 0.09))
        if kind == "fricative":
            low = self.rng.uniform(2000, 4200)
            band = butter(2, [low, min(7600, low * 2)], "band", fs=RATE, output="sos")
            noise = self.rng.normal(0, 1, int(RATE * self.rng.uniform(0.06, 0.12)))
            return 0.12 * sosfilt(band, noise) * np.hanning(len(noise)) ** 0.5
        if kind == "stop":
            burst = self.rng.normal(0, 1, int(RATE * self.rng.uniform(0.008, 0.03)))
            burst *= np.exp(-np.arange(len(burst)) / 100)
            return np.concatenate([np.zeros(int(RATE * self.rng.uniform(0.02, 0.05))), 0.3 * burst])
        return np.zeros(0)

    def vowel(self, pitch: float) -> Array:
        first, second = VOWELS[self.rng.integers(len(VOWELS), size=2)]
        if self.rng.random() < 0.6:
            second = first + 0.15 * (second - first)  # most vowels stay nearly where they are
        return self._voiced(pitch, first, second, self.rng.uniform(0.09, 0.22))

    def _voiced(self, pitch: float, first: Array, second: Array, seconds: float) -> Array:
        steps = max(4, int(seconds * RATE / STEP))
        length = steps * STEP
        time = np.arange(length) / RATE
        hertz = pitch * (1 - 0.08 * time / time[-1] + 0.015 * np.sin(2 * np.pi * 5.5 * time))
        hertz *= 1 + 0.01 * np.repeat(self.rng.normal(0, 1, steps), STEP)  # jitter
        phase = np.cumsum(hertz) / RATE
        pulses = np.diff(np.floor(phase), prepend=0.0)
        # Glottal flow falls by 12 dB an octave, and the lips give 6 of them back.
        source = lfilter([1.0], [1.0, -0.96], pulses + self.rng.normal(0, 0.003, length))
        sound = self._resonated(source - source.mean(), first, second, steps)
        rise = int(0.015 * RATE)
        shape = np.ones(length)
        shape[:rise], shape[-rise:] = np.linspace(0, 1, rise), np.linspace(1, 0, rise)
        loudest = np.abs(sound).max()
        return self.rng.uniform(0.5, 1.0) * shape * sound / max(loudest, 1e-9)

    def _resonated(self, source: Array, first: Array, second: Array, steps: int) -> Array:
        """The source through five resonators that glide from `first` to `second`."""
        sound = source.reshape(steps, STEP)
        share = np.linspace(0, 1, steps)[:, None]
        formants = self.tract * (first + share * (second - first))
        every = np.concatenate([formants, np.tile(self.tract * HIGHER, (steps, 1))], axis=1)
        every = np.minimum(every, 7600)
        for index, bandwidth in enumerate(BANDWIDTHS):
            radius = np.exp(-np.pi * bandwidth / RATE)
            state, out = np.zeros(2), np.empty_like(sound)
            for step in range(steps):
                b = 2 * radius * np.cos(2 * np.pi * every[step, index] / RATE)
                gain = [1 - b + radius**2]
                out[step], state = lfilter(gain, [1, -b, radius**2], sound[step], zi=state)
            sound = out
        return sound.ravel()


def noise(rng: np.random.Generator, length: int) -> Array:
    """What is not speech, of deviation 1: coloured noise that swells, hum, and clicks."""
    colour = rng.uniform(-0.5, 0.97)
    found = lfilter([1.0], [1.0, -colour], rng.normal(0, 1, length))
    time = np.arange(length) / RATE
    found *= 1 + 0.5 * np.sin(2 * np.pi * rng.uniform(0.05, 0.6) * time + rng.uniform(0, 6))
    hum = sum(np.sin(2 * np.pi * rng.choice([50, 60]) * n * time) / n for n in (1, 2, 3, 5))
    found = found / found.std() + rng.uniform(0, 0.7) * hum
    clicks = np.zeros(length)
    clicks[rng.integers(0, length, max(1, length // 8000))] = rng.uniform(4, 20)
    found += lfilter([1.0], [1.0, -1.6 * 0.98, 0.98**2], clicks)
    return np.asarray(found / found.std())


def recording(rng: np.random.Generator, seconds: float) -> tuple[Array, Array]:
    """int16 samples, and the share of speech in every frame of 512, float64 0..1."""
    length = int(seconds * RATE) // FRAME * FRAME
    clean, speaks = np.zeros(length), np.zeros(length)
    voice = Voice(rng)
    at = int(rng.uniform(0.3, 1.5) * RATE)
    while True:
        spoken = voice.word(int(rng.integers(1, 5)))
        if at + len(spoken) >= length:
            break
        clean[at : at + len(spoken)] += spoken
        speaks[at : at + len(spoken)] = 1
        pause = rng.uniform(0.02, 0.08) if rng.random() < 0.7 else rng.uniform(0.5, 1.6)
        if pause < 0.1:
            speaks[at + len(spoken) : at + len(spoken) + int(pause * RATE)] = 1
        at += len(spoken) + int(pause * RATE)
    level = clean[speaks == 1].std() / 10 ** (rng.uniform(5, 20) / 20)
    mixed = clean + level * noise(rng, length)
    samples = 0.7 * mixed / np.abs(mixed).max() * rng.uniform(0.4, 1)
    return (samples * 32767).astype(np.int16), speaks.reshape(-1, FRAME).mean(axis=1)
