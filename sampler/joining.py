"""Two clips to one: the second begins with the pictures and the sound that the first ends with."""

from .audio_windows import cross_fade
from .sizes import FPS
from .soundtrack import fit_sound

FADE_FRAMES = 1  # of the sound: 40 ms, long enough to hide the seam and too short to hear two voices


def join_sound(first, second, rate, frames, overlap):
    """Join the waveforms [..., n] of two clips at `rate` Hz: the first up to its last picture, then the second.

    frames: pixel frames of the two clips; overlap: how many they share. The seam is a cross-fade of one frame at the
    end of the shared ones. Returns exactly the samples of frames[0] + frames[1] - overlap pictures where rate / 25 is
    whole.
    """
    first, second = (fit_sound(sound, rate, count) for sound, count in zip((first, second), frames, strict=True))
    fade = FADE_FRAMES * rate // FPS
    return cross_fade(first, second[..., overlap * rate // FPS - fade :], fade, axis=-1)
