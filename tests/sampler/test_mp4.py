"""The mp4 writer: what is in the file, that frames are not kept, and what an unfinished one leaves behind."""

import subprocess
import sys
import threading
import weakref
from pathlib import Path
from types import SimpleNamespace

import av
import numpy as np
import pytest
import torch
from pack.sampler import mp4
from pack.sampler.media import eight_bit
from pack.sampler.mp4 import at_aac_rate, do_meanwhile, write_mp4

ROOT = Path(__file__).resolve().parents[2]


def shades(count, size=32):
    """Yield frames that grow lighter, 2 at a time."""
    for i in range(0, count, 2):
        yield torch.stack([torch.full((size, size, 3), 5 * j, dtype=torch.uint8) for j in range(i, min(i + 2, count))])


def tone(seconds, rate, channels=2):
    wave = 0.4 * torch.sin(2 * torch.pi * 440 * torch.arange(round(seconds * rate)) / rate)
    return {"waveform": wave.expand(1, channels, -1), "sample_rate": rate}


def read(path):
    """Return the frames' mean shades, the sound [C, samples], and each stream's seconds of a media file."""
    with av.open(str(path)) as container:
        seconds = {stream.type: float(stream.duration * stream.time_base) for stream in container.streams}
        shade = [frame.to_ndarray(format="rgb24").mean() for frame in container.decode(video=0)]
    with av.open(str(path)) as container:
        sound = [frame.to_ndarray() for frame in container.decode(audio=0)] if "audio" in seconds else None
    return shade, None if sound is None else np.concatenate(sound, axis=1), seconds


@pytest.mark.parametrize("rate", [44100, 22050, 48000, 51200])
def test_frames_and_sound_come_back_in_order_and_of_one_length(tmp_path, rate):
    write_mp4(tmp_path / "clip.mp4", shades(41), 32, 32, 41, tone(3, rate))
    shade, sound, seconds = read(tmp_path / "clip.mp4")
    assert np.abs(np.array(shade) - 5 * np.arange(41)).max() < 4
    assert seconds["video"] == pytest.approx(41 / 25) and abs(seconds["video"] - seconds["audio"]) < 1 / 25
    middle = sound[0, 8000:32000]
    crossings = ((middle[:-1] < 0) & (middle[1:] >= 0)).sum() / len(middle)
    assert crossings * (48000 if rate == 51200 else rate) == pytest.approx(440, rel=0.01)
    assert np.abs(middle).max() == pytest.approx(0.4, abs=0.05)


@pytest.mark.parametrize("waiting", [1, 5 * 2 * 32 * 32 * 3])
def test_pieces_are_asked_for_one_by_one_and_few_wait(tmp_path, monkeypatch, waiting):
    monkeypatch.setattr(mp4, "WAITING", waiting)
    alive, most = weakref.WeakSet(), 0

    def counted():
        nonlocal most
        for piece in shades(50):
            alive.add(piece)
            most = max(most, len(alive))
            yield piece

    write_mp4(tmp_path / "clip.mp4", counted(), 32, 32, 50)
    assert most <= (7 if waiting > 1 else 3), "those that wait, the one that came and the one that follows"


def test_the_next_piece_is_made_while_one_is_written(tmp_path, monkeypatch):
    """x264 is held until the third piece is asked for: without a thread that never comes."""
    asked, held = threading.Event(), []

    def hold(*arguments, **options):
        held.append(asked.wait(0 if held else 30))
        return av.VideoFrame.from_ndarray(*arguments, **options)

    def counted():
        for i, piece in enumerate(shades(8)):
            if i == 2:
                asked.set()
            yield piece

    monkeypatch.setattr(mp4, "av", SimpleNamespace(open=av.open, VideoFrame=SimpleNamespace(from_ndarray=hold)))
    write_mp4(tmp_path / "clip.mp4", counted(), 32, 32, 8)
    assert held == [True] * 8


def test_an_error_of_the_encoder_is_raised(tmp_path):
    with pytest.raises(ValueError, match="mistake"):
        do_meanwhile(lambda frame: int("mistake"), shades(2), torch.empty(1, 32, 32, 3, dtype=torch.uint8))
    with pytest.raises(FileNotFoundError):
        write_mp4(tmp_path / "missing" / "clip.mp4", shades(8), 32, 32, 8)
    assert not list(tmp_path.iterdir())


class Stop(BaseException):
    """As ComfyUI's interrupt is: not an Exception."""


@pytest.mark.parametrize("error", [Stop, ValueError])
def test_an_error_leaves_nothing_behind_and_an_old_file_untouched(tmp_path, error):
    def broken():
        yield from shades(10)
        raise error

    (tmp_path / "clip.mp4").write_bytes(b"old")
    with pytest.raises(error):
        write_mp4(tmp_path / "clip.mp4", broken(), 32, 32, 40, tone(1, 44100))
    assert (tmp_path / "clip.mp4").read_bytes() == b"old" and len(list(tmp_path.iterdir())) == 1


def test_a_killed_writer_leaves_no_file_that_looks_whole(tmp_path):
    code = (
        "import os, sys, time; sys.path.insert(0, sys.argv[1]); import as_package; as_package.load_pack()\n"
        "import torch; from pathlib import Path; from pack.sampler.mp4 import write_mp4\n"
        "def pieces():\n"
        "    for i in range(200):\n"
        "        yield torch.randint(0, 256, (1, 64, 64, 3), dtype=torch.uint8)\n"
        "    while not any(path.stat().st_size for path in Path(sys.argv[2]).iterdir()): time.sleep(0.01)\n"
        "    os.kill(os.getpid(), 9)\n"
        "write_mp4(Path(sys.argv[2]) / 'clip.mp4', pieces(), 64, 64, 400)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, ROOT, tmp_path], capture_output=True, text=True)
    assert done.returncode == (9 if sys.platform == "win32" else -9), done.stderr
    (left,) = tmp_path.iterdir()
    assert left.name == "clip.mp4.part" and left.stat().st_size > 0
    with pytest.raises(av.error.FFmpegError), av.open(str(left)) as container:
        list(container.decode(video=0))


def test_what_cannot_be_written_is_named(tmp_path):
    with pytest.raises(ValueError, match="the pictures are 33x32; H.264 wants even sides"):
        write_mp4(tmp_path / "clip.mp4", shades(2), 33, 32, 2)
    with pytest.raises(ValueError, match="the sound has 3 channels; expected 1, 2 or 6"):
        write_mp4(tmp_path / "clip.mp4", shades(2), 32, 32, 2, tone(1, 44100, channels=3))
    for crf in (0, 52, 22.5, float("nan")):
        with pytest.raises(ValueError, match=r"crf is .*; expected a whole number from 1 \(best\) to 51"):
            write_mp4(tmp_path / "clip.mp4", shades(2), 32, 32, 2, crf=crf)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("size", [64, 768])
def test_colours_are_those_that_the_file_names(tmp_path, size):
    """Luma and chroma by BT.601, and tags that say so, without which players take large pictures for BT.709's."""
    r, g, b = 200, 60, 30
    write_mp4(
        tmp_path / "clip.mp4", [torch.tensor([r, g, b], dtype=torch.uint8).expand(3, size, size, 3)], size, size, 3
    )
    with av.open(str(tmp_path / "clip.mp4")) as container:
        stream, frame = container.streams.video[0].codec_context, next(container.decode(video=0))
    assert (stream.colorspace, stream.color_primaries, stream.color_trc, stream.color_range) == (6, 1, 1, 1)
    y = 0.299 * r + 0.587 * g + 0.114 * b
    wanted = [16 + 219 / 255 * y, 128 + 224 / 255 * (b - y) / 1.772, 128 + 224 / 255 * (r - y) / 1.402]
    found = [np.frombuffer(plane, np.uint8)[plane.line_size * 8 + 8] for plane in frame.planes]
    assert np.abs(np.subtract(found, wanted, dtype=float)).max() < 1.5
    assert np.abs(frame.to_ndarray(format="rgb24")[8, 8].astype(int) - (r, g, b)).max() <= 3


def test_a_lower_crf_is_nearer_and_larger(tmp_path):
    picture = torch.randint(0, 256, (8, 8, 8, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))
    picture = picture.repeat_interleave(16, 1).repeat_interleave(16, 2)
    sizes, off = [], []
    for crf in (10, 23, 40):
        write_mp4(tmp_path / "clip.mp4", [picture], 128, 128, 8, crf=crf)
        sizes.append((tmp_path / "clip.mp4").stat().st_size)
        with av.open(str(tmp_path / "clip.mp4")) as container:
            frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        off.append(np.abs(frames - picture.numpy().astype(float)).mean())
    assert sizes == sorted(sizes, reverse=True) and off == sorted(off) and off[2] > 1.3 * off[0], (sizes, off)


def test_legal_rates_pass_and_others_become_48000():
    assert at_aac_rate(tone(1, 44100))["waveform"].shape == (1, 2, 44100)
    assert at_aac_rate(tone(1, 51200))["waveform"].shape == (1, 2, 48000)


def test_images_become_eight_bit_in_pieces():
    images = torch.linspace(-0.1, 1.1, 20 * 4 * 4 * 4).view(20, 4, 4, 4)
    pieces = list(eight_bit(images, 8))
    assert [len(piece) for piece in pieces] == [8, 8, 4]
    expected = (images[..., :3] * 255).clamp(0, 255).to(torch.uint8)
    assert torch.equal(torch.cat(pieces), expected)
