"""nano's world: procedural 96x96 clips of a ball, a cube or a face on a coloured ground, with the sound they make.

A scene is drawn from a seed, rendered to frames and sound by closed formulas, and knows its own truth (colours, contact
frames, mouth opening), so that training needs no files and evaluation needs no labels.
"""

from dataclasses import dataclass

import numpy as np

SIZE = 96  # pixels, both sides
FPS = 25
SAMPLE_RATE = 51200  # Hz; 2048 samples a frame, the hop of the audio VAE
HOP = SAMPLE_RATE // FPS
FLOOR = 80  # pixel row on which things land

COLOURS = {
    "red": (214, 40, 40),
    "green": (40, 160, 64),
    "blue": (36, 72, 216),
    "yellow": (248, 220, 40),
    "purple": (136, 44, 176),
    "orange": (248, 132, 24),
    "cyan": (56, 204, 224),
    "white": (242, 242, 242),
}  # sRGB, 0-255
KINDS = ("ball", "cube", "face")
# vowel -> mouth (half width, half height when open, as parts of the head's radius), formants 1 and 2 in Hz, loudness
VOWELS = {
    "a": ((0.42, 0.40), (800, 1250), 1.0),
    "e": ((0.46, 0.26), (500, 1900), 0.8),
    "i": ((0.50, 0.16), (300, 2300), 0.6),
    "o": ((0.28, 0.34), (480, 850), 0.9),
    "u": ((0.18, 0.22), (320, 650), 0.7),
}
SYLLABLES = tuple("m" + vowel for vowel in VOWELS)
GRAVITY = 520.0  # pixels/s^2
RESTITUTION = 0.80  # speed kept at a contact
DWELL = 0.10  # seconds that a thing stays on the floor, squashed, at a contact: two or three frames, or nobody sees it
SYLLABLE_SECONDS = 9 / FPS
# Hz; multiples of 25, so that a steady tone repeats in every frame and is the same latent in every frame
PITCHES = {"ball": 225, "cube": 875, "face": 150}


@dataclass(frozen=True, slots=True)
class Scene:
    """One clip before it is rendered; lengths in pixels, times in seconds."""

    kind: str
    colour: str
    background: str
    radius: float
    x: float
    drop: float  # height of the thing's lowest point above the floor at t = 0
    bounces: int | None  # contacts before it lies still; None: it keeps bouncing
    syllables: tuple[str, ...]
    start: float  # when the first syllable begins
    pitch: float  # Hz: tone of a contact, or the voice


def draw_scene(rng, kind=None, colour=None, background=None, bounces="any", syllables=None):
    """Draw a Scene; what is given is kept, the rest comes from `rng` (numpy Generator). The two colours differ."""
    kind = kind or KINDS[rng.integers(3)]
    colours = list(COLOURS)
    colour = colour or rng.choice([c for c in colours if c != background])
    background = background or rng.choice([c for c in colours if c != colour])
    if bounces == "any":
        bounces = [None, None, 1, 2, 3][rng.integers(5)]
    if syllables is None:
        syllables = tuple(rng.choice(SYLLABLES, size=rng.integers(1, 5)))
    face = kind == "face"
    return Scene(
        kind=str(kind),
        colour=str(colour),
        background=str(background),
        radius=float(rng.uniform(27, 31) if face else rng.uniform(12, 16)),
        x=float(rng.uniform(42, 54) if face else rng.uniform(26, 70)),
        drop=float(rng.uniform(26, 46)),
        bounces=None if face else bounces,
        syllables=tuple(syllables) if face else (),
        start=float(rng.integers(2, 7) / FPS),
        pitch=float(PITCHES[kind]),
    )


def contacts(scene, seconds):
    """Return when a ball or cube arrives at the floor (seconds, ascending) within the clip; empty for a face."""
    if scene.kind == "face":
        return np.zeros(0)
    times, speed = [], np.sqrt(2 * GRAVITY * scene.drop)
    time = speed / GRAVITY
    while time < seconds and len(times) < (scene.bounces or 99) and speed > 40:
        times.append(time)
        speed *= RESTITUTION
        time += DWELL + 2 * speed / GRAVITY
    return np.array(times)


def heights(scene, seconds, times):
    """Return the height of the thing's lowest point above the floor (pixels) at each of `times` (seconds)."""
    height = np.maximum(scene.drop - GRAVITY / 2 * times**2, 0.0)
    speed = np.sqrt(2 * GRAVITY * scene.drop)
    hits = contacts(scene, seconds)
    for number, hit in enumerate(hits):
        speed *= RESTITUTION
        after = times >= hit
        since = np.maximum(times - hit - DWELL, 0.0)
        flight = speed * since - GRAVITY / 2 * since**2
        last = scene.bounces is not None and number + 1 == scene.bounces
        height = np.where(after, 0.0 if last else np.maximum(flight, 0.0), height)
    return height


def mouth(scene, times):
    """Return the opening envelope in [0,1] and the vowel index of the syllable spoken at each of `times` (seconds)."""
    opening, vowel = np.zeros_like(times), np.zeros(times.shape, dtype=int)
    for number, syllable in enumerate(scene.syllables):
        phase = (times - scene.start - number * SYLLABLE_SECONDS) / SYLLABLE_SECONDS
        inside = (phase >= 0) & (phase < 1)
        # lips closed for the first fifth (the m), then open and close again
        shape = np.sin(np.pi * np.clip((phase - 0.2) / 0.8, 0, 1)) ** 0.7
        opening = np.where(inside, shape, opening)
        vowel = np.where(inside, list(VOWELS).index(syllable[1]), vowel)
    return opening, vowel


def render_frames(scene, frames, scale=1, first=0):
    """Return `frames` frames at 25 fps, from frame `first` on, as float32 RGB [F,H,W,3] in [0,1].

    H = W = 96 * scale, a whole number: the same scene, drawn larger. Edges are antialiased over one pixel.
    """
    times, seconds = (first + np.arange(frames)) / FPS, (first + frames) / FPS
    y, x = (np.mgrid[0 : SIZE * scale, 0 : SIZE * scale].astype(np.float32) + 0.5) / scale
    ground = np.array(COLOURS[scene.background], np.float32) / 255
    skin = np.array(COLOURS[scene.colour], np.float32) / 255
    picture = np.broadcast_to(ground, (frames, *x.shape, 3)).copy()
    picture[:, FLOOR * scale :] *= 0.72

    def paint(distance, colour):
        cover = np.clip(0.5 - distance * scale, 0, 1)[..., None]
        np.copyto(picture, picture + cover * (np.asarray(colour, np.float32) - picture))

    if scene.kind == "face":
        paint_face(scene, times, x, y, skin, paint)
        return picture.clip(0, 1)
    height, hits = heights(scene, seconds, times), contacts(scene, seconds)
    since = np.min(np.abs(times[:, None] - hits[None] - DWELL / 2), axis=1, initial=9.0)
    squash = 1 - 0.25 * np.clip(1 - (2 * since / DWELL) ** 2, 0, 1)
    rx, ry = scene.radius / squash, scene.radius * squash
    rx, ry = rx[:, None, None], ry[:, None, None]
    cy = (FLOOR - height)[:, None, None] - ry
    shadow = (1 - height / 90)[:, None, None]
    paint((((x - scene.x) / (scene.radius * shadow)) ** 2 + ((y - FLOOR - 3) / 2.5) ** 2 - 1) * 2, ground * 0.45)
    if scene.kind == "ball":
        radial = np.sqrt(((x - scene.x) / rx) ** 2 + ((y - cy) / ry) ** 2)
        paint((radial - 1) * ry, skin)
        glint = np.hypot(x - scene.x + 0.35 * rx, y - cy + 0.4 * ry) - 0.22 * scene.radius
        paint(glint, skin + 0.6 * (1 - skin))
    else:
        top = 0.5 * ry  # the upper quarter of the block is its lit top face
        paint(np.maximum(np.abs(x - scene.x) - rx, np.abs(y - cy) - ry), skin * 0.82)
        paint(np.maximum(np.abs(x - scene.x) - rx, np.abs(y - cy + ry - top / 2) - top / 2), skin + 0.35 * (1 - skin))
    return picture.clip(0, 1)


def paint_face(scene, times, x, y, skin, paint):
    """Paint a head with two eyes and a mouth that follows the syllables; `paint(distance, colour)` draws one shape."""
    r, cx, cy = scene.radius, scene.x, 46.0
    still = np.zeros((len(times), 1, 1), np.float32)
    paint(np.hypot(x - cx, y - cy) - r + still, skin)
    for side in (-1, 1):
        paint(np.hypot(x - cx - side * 0.36 * r, y - cy + 0.30 * r) - 0.12 * r + still, (0.06, 0.06, 0.08))
    opening, vowel = mouth(scene, times)
    sizes = np.array([VOWELS[v][0] for v in VOWELS])[vowel]
    wide = (r * (0.30 + opening * (sizes[:, 0] - 0.30)))[:, None, None]
    tall = (r * np.maximum(opening * sizes[:, 1], 0.03))[:, None, None]
    radial = np.sqrt(((x - cx) / wide) ** 2 + ((y - cy - 0.42 * r) / tall) ** 2)
    paint((radial - 1) * np.minimum(wide, tall), (0.06, 0.06, 0.08))


def render_sound(scene, frames):
    """Return the clip's sound as float32 mono [frames*2048] at 51200 Hz, peak at most 0.8.

    A contact sounds from the start of the frame nearest to it: at 25 frames a second nothing finer can be seen.
    """
    t = np.arange(frames * HOP) / SAMPLE_RATE
    sound = np.zeros_like(t)
    if scene.kind == "face":
        return voice(scene, t).astype(np.float32)
    decay = 0.09 if scene.kind == "ball" else 0.06
    for number, hit in enumerate(contacts(scene, frames / FPS)):
        since = np.maximum(t - round(hit * FPS) / FPS, 0)
        ring = np.exp(-since / decay) * np.minimum(since / 0.004, 1)
        tone = np.sin(2 * np.pi * scene.pitch * t) + 0.3 * np.sin(4 * np.pi * scene.pitch * t)
        sound += 0.6 * 0.92**number * ring * tone / 1.3
    return np.clip(sound, -0.8, 0.8).astype(np.float32)


def timbre(vowel):
    """Return how strong the voice's harmonics 1 to 19 are in an open vowel: [19], under its two formants."""
    number = np.arange(1, 20)
    first, second = (np.exp(-(((number * PITCHES["face"] - f) / 160) ** 2)) for f in VOWELS[vowel][1])
    return first + 0.5 * second + 0.10 / number


def voice(scene, t):
    """Return the spoken syllables at times `t` (seconds): a buzz of harmonics, the vowel's timbre over a hum."""
    opening, vowel = mouth(scene, t)
    index = (t - scene.start) / SYLLABLE_SECONDS
    speaking = (index >= 0) & (index < len(scene.syllables))
    phase = np.where(speaking, index - np.floor(index), 0)
    edge = np.clip(np.minimum(phase, 1 - phase) / 0.06, 0, 1) * speaking
    gains = np.array([timbre(v) for v in VOWELS])[vowel]
    loudness = np.array([VOWELS[v][2] for v in VOWELS])[vowel]
    sound = np.zeros_like(t)
    for k in range(1, 20):
        hum = 0.25 * (k == 1) + 0.06 * (k == 2)
        strength = opening * loudness * gains[:, k - 1] + (1 - opening) * hum
        sound += np.sin(2 * np.pi * k * scene.pitch * t + 0.7 * k * k) * strength
    return np.clip(0.28 * edge * sound, -0.8, 0.8)
