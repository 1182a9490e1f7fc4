"""Read a written clip back and tell what it shows and sounds like: colours, kind, contacts, tones, mouth, loudness.

Nothing here knows how the clip was made; it sees pixels and samples only, as a viewer would.
"""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from .world import COLOURS, FLOOR, FPS, PITCHES, SIZE, SYLLABLE_SECONDS, VOWELS, timbre

NAMES = tuple(COLOURS)
PALETTE = np.array([COLOURS[name] for name in NAMES], float)
FAR = 70.0  # RGB distance from the ground that makes a pixel part of the thing
SHADES = {"ball": 1.0, "face": 1.0, "cube": 0.82}  # the front of a cube is this much darker than its colour


@dataclass(frozen=True, slots=True)
class Observation:
    """What a clip shows; times are seconds from its start, `mouth` and `loudness` one value a frame.

    vowels: what is said ("aoi"), empty where no face is shown.
    """

    kind: str | None
    colour: str | None
    background: str
    contacts: np.ndarray
    tones: np.ndarray
    mouth: np.ndarray
    loudness: np.ndarray
    vowels: str = ""


def read_clip(path):
    """Return frames uint8 [F,H,W,3], mono float32 samples, sample rate and frames a second of an mp4 (needs PyAV)."""
    import av

    with av.open(str(path)) as container:
        video = container.streams.video[0]
        rate, fps = container.streams.audio[0].rate, video.average_rate or Fraction(FPS)
        frames, sound = [], []
        for frame in container.decode(video, container.streams.audio[0]):
            if isinstance(frame, av.VideoFrame):
                frames.append(frame.to_ndarray(format="rgb24"))
            else:
                sound.append(frame.to_ndarray().mean(0))
    return np.stack(frames), np.concatenate(sound), rate, float(fps)


def nearest(colour, shade=1.0):
    """Return the name of the palette colour nearest to an RGB triple (0-255), the palette darkened by `shade`."""
    return NAMES[int(((PALETTE * shade - colour) ** 2).sum(1).argmin())]


def masks(frames):
    """Return (ground colour, mask [F,80,96] of the thing above the floor) of frames uint8 [F,96,96,3]."""
    sky = frames[:, :FLOOR].astype(float)
    edge = np.concatenate([sky[:, :, :8].reshape(-1, 3), sky[:, :, -8:].reshape(-1, 3), sky[:, :6].reshape(-1, 3)])
    ground = np.median(edge, axis=0)
    return ground, np.sqrt(((sky - ground) ** 2).sum(-1)) > FAR


def extents(mask):
    """Return per frame (area, left, right, top, bottom) of a mask; rows and columns of under 3 pixels are skipped."""
    rows, columns = mask.sum(2) >= 3, mask.sum(1) >= 3
    area = mask.sum((1, 2))
    first = lambda hits: np.where(hits.any(1), hits.argmax(1), 0)  # noqa: E731
    last = lambda hits: np.where(hits.any(1), hits.shape[1] - hits[:, ::-1].argmax(1), 0)  # noqa: E731
    return area, first(columns), last(columns), first(rows), last(rows)


def find_contacts(bottom, shown):
    """Return the times (seconds) at which the thing's lower edge, in pixel rows, arrives at the floor."""
    down = shown & (bottom >= FLOOR - 3)
    arrived = down[1:] & ~down[:-1]  # a thing that lies there from the beginning has not arrived
    return (np.flatnonzero(arrived) + 1) / FPS


def find_tones(sound, rate):
    """Return the times (seconds) at which a sound sets in: its 10 ms level leaps by 10 dB over the 60 ms before."""
    hop = rate // 100
    level = np.sqrt((sound[: len(sound) // hop * hop].reshape(-1, hop) ** 2).mean(1))
    floor = max(0.02, 0.12 * level.max(initial=0))
    times, last = [], -10
    for i, now in enumerate(level):
        before = level[max(0, i - 6) : i].min(initial=now if i else 0)
        if now > floor and now > 3.2 * before and i - last > 12:
            times.append(i / 100)
            last = i
    return np.array(times)


def find_vowels(loudness, sound, rate):
    """Return what a voice says, "aoi": a vowel for each SYLLABLE_SECONDS of it, the one whose harmonics are most alike.

    loudness: one value a frame.
    """
    spoken = np.flatnonzero(loudness > max(0.01, 0.12 * loudness.max()))
    if not len(spoken):
        return ""
    vowels = ""
    for number in range(round(len(spoken) / FPS / SYLLABLE_SECONDS)):
        middle = spoken[0] / FPS + (number + 0.6) * SYLLABLE_SECONDS  # the first fifth is the m
        part = sound[int((middle - 0.06) * rate) : int((middle + 0.06) * rate)]
        spectrum = np.abs(np.fft.rfft(part * np.hanning(len(part)), 8192))
        near = np.abs(np.fft.rfftfreq(8192, 1 / rate)[:, None] - PITCHES["face"] * np.arange(1, 20)) < 40
        heard = np.where(near, spectrum[:, None], 0).max(0)
        vowels += max(VOWELS, key=lambda v: np.dot(timbre(v), heard) / np.linalg.norm(timbre(v)))
    return vowels


def observe(frames, sound, rate):
    """Return the Observation of frames uint8 [F,96,96,3] with mono samples at `rate` Hz."""
    assert frames.shape[1:] == (SIZE, SIZE, 3), frames.shape
    ground, mask = masks(frames)
    area, left, right, top, bottom = extents(mask)
    shown = area > 150
    count = len(frames)
    samples = rate / FPS
    loudness = np.array(
        [np.sqrt(np.mean(sound[int(i * samples) : int((i + 1) * samples)] ** 2) + 1e-12) for i in range(count)]
    )
    if shown.sum() < count / 4:
        nothing = np.zeros(0)
        return Observation(None, None, nearest(ground), nothing, find_tones(sound, rate), np.zeros(count), loudness)
    width, height = (right - left)[shown], (bottom - top)[shown]
    fill = area[shown] / np.maximum(width * height, 1)
    kind = "face" if np.median(width) > 44 else "cube" if np.median(fill) > 0.88 else "ball"
    pixels = frames[:, :FLOOR][mask & shown[:, None, None]]
    colour = nearest(np.median(pixels, axis=0), SHADES[kind])
    mouth = np.zeros(count)
    if kind == "face":
        middle = int(np.median((top + bottom)[shown]) / 2)
        inner = frames[:, middle + 2 : FLOOR, int(np.median(left[shown])) + 4 : int(np.median(right[shown])) - 4]
        mouth = (inner.max(-1) < 100).sum((1, 2)).astype(float)
    contacts = np.zeros(0) if kind == "face" else find_contacts(bottom, shown)
    vowels = find_vowels(loudness, sound, rate) if kind == "face" else ""
    return Observation(kind, colour, nearest(ground), contacts, find_tones(sound, rate), mouth, loudness, vowels)


def matched(contacts, tones, within=0.08):
    """Return how many contacts have a tone of their own within `within` seconds."""
    left, count = list(tones), 0
    for contact in contacts:
        near = min(left, key=lambda tone: abs(tone - contact), default=None)
        if near is not None and abs(near - contact) <= within + 1e-9:
            left.remove(near)
            count += 1
    return count


def pearson(a, b):
    """Return the correlation of two equally long series; 0 where one of them does not move."""
    return 0.0 if min(np.std(a), np.std(b)) < 1e-9 else float(np.corrcoef(a, b)[0, 1])
