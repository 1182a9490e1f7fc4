"""A clip written as an mp4 while its frames come: H.264 and AAC, under its name only once it is whole."""

import json
import math
import os
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from itertools import cycle

import av
import numpy as np
import torch

from ..model_loader.core_vae import resample
from .sizes import FPS

CRF = range(1, 52)  # x264's qualities for 8-bit 4:2:0; its 0 is a lossless profile that browsers do not play
DEFAULT_CRF = 23  # x264's own
BT709, BT601 = 1, 6  # primaries and transfer, matrix: codes of ISO/IEC 23091-2
LIMITED = 1  # 16 to 235: libavutil's AVCOL_RANGE_MPEG
AAC_RATES = (96000, 88200, 64000, 48000, 44100, 32000, 24000, 22050, 16000, 12000, 11025, 8000, 7350)  # Hz, ISO 14496-3
WAITING = 2**26  # bytes of pictures that may wait for x264: 10 at 1080p; twice as many save little time
LAYOUTS = {1: "mono", 2: "stereo", 6: "5.1"}


def write_mp4(path, pieces, width, height, frames, audio=None, metadata=None, crf=DEFAULT_CRF):
    """Write `frames` pictures of width x height pixels, which come in `pieces`, with `audio` beside them.

    pieces: iterable of uint8 [n, height, width, 3] tensors on the CPU, RGB, 25 frames a second; none is kept. audio:
    None or {"waveform": float [B, C, samples], "sample_rate": Hz}, the first of the batch, cut to the pictures' length,
    at 48000 Hz where AAC lacks its rate. metadata: None or {name: JSON value}, tags of the file. crf: x264's constant
    rate factor, 1 (best, largest) to 51.

    Codecs, pixel format and names are those of ComfyUI's own video writer (x264, yuv420p), and so is the matrix of
    colours, BT.601's, which PyAV before 17 reads any file with; but the file says so, because Chromium takes 720
    lines and more for BT.709's where nothing is said. The file grows as `path`.part, which an exception, from
    `pieces` too, removes. ValueError for sides, channels or a crf it cannot write.
    """
    if crf not in CRF:
        raise ValueError(f"crf is {crf}; expected a whole number from {CRF[0]} (best) to {CRF[-1]} (smallest).")
    if width % 2 or height % 2:
        raise ValueError(f"the pictures are {width}x{height}; H.264 wants even sides. Crop or resize them first.")
    unfinished = path.with_name(path.name + ".part")
    size = (height, width, 3)
    slots = torch.empty(max(1, min(frames, WAITING // math.prod(size))), *size, dtype=torch.uint8)
    try:
        # use_metadata_tags keeps tags of any name; faststart moves the index to the front, for players on the web.
        options = {"movflags": "use_metadata_tags+faststart"}
        with av.open(str(unfinished), "w", format="mp4", options=options) as file:
            for name, value in (metadata or {}).items():
                file.metadata[name] = json.dumps(value)
            video = file.add_stream("h264", rate=FPS, options={"crf": str(crf)})
            video.width, video.height, video.pix_fmt = width, height, "yuv420p"
            tags = video.codec_context
            tags.color_range, tags.colorspace, tags.color_primaries, tags.color_trc = LIMITED, BT601, BT709, BT709
            sound = Soundtrack(file, audio, frames) if audio is not None else None
            written = 0

            def write(frame):
                nonlocal written
                picture = av.VideoFrame.from_ndarray(frame, format="rgb24")
                picture = picture.reformat(format="yuv420p", dst_colorspace=BT601)
                file.mux(video.encode(picture))
                written += 1
                if sound is not None:
                    sound.write_until(written)

            do_meanwhile(write, pieces, slots)
            assert written == frames, (written, frames)
            file.mux(video.encode(None))
            if sound is not None:
                sound.finish()
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def do_meanwhile(work, pieces, slots):
    """Call work(frame) for the frames of `pieces`, in order, in a thread, so that a card makes the next ones then.

    pieces: iterable of [n, H, W, 3]. slots: [m, H, W, 3], where as many wait as NumPy arrays [H, W, 3]; a ring, because
    frames that come and go one by one leave holes between the decoder's own memory. What `work` or `pieces` raises is
    raised once the call under way is done.
    """
    thread, waiting, place = ThreadPoolExecutor(1), deque(), cycle(slots)
    try:
        for piece in pieces:
            for frame in piece:
                if len(waiting) == len(slots):
                    waiting.popleft().result()
                waiting.append(thread.submit(work, next(place).copy_(frame).numpy()))
        for done in waiting:
            done.result()
    finally:
        thread.shutdown(cancel_futures=True)


class Soundtrack:
    """The sound of a file that is being written, encoded in step with the pictures so that neither waits in memory."""

    def __init__(self, file, audio, frames):
        audio = at_aac_rate(audio)
        self.rate = audio["sample_rate"]
        self.samples = audio["waveform"][0, :, : math.ceil(self.rate * frames / FPS)].float().cpu().numpy()
        if self.samples.shape[0] not in LAYOUTS:
            raise ValueError(f"the sound has {self.samples.shape[0]} channels; expected 1, 2 or 6. Mix it down first.")
        self.layout = LAYOUTS[self.samples.shape[0]]
        self.file, self.written = file, 0
        self.stream = file.add_stream("aac", rate=self.rate, layout=self.layout)

    def write_until(self, frames):
        """Write what sounds during the first `frames` pictures and is not written yet."""
        end = math.ceil(self.rate * frames / FPS)
        part = np.ascontiguousarray(self.samples[:, self.written : end])
        if part.shape[1]:
            frame = av.AudioFrame.from_ndarray(part, format="fltp", layout=self.layout)
            frame.sample_rate, frame.pts = self.rate, self.written
            self.file.mux(self.stream.encode(frame))
        self.written = end

    def finish(self):
        """Write what the encoder still holds."""
        self.file.mux(self.stream.encode(None))


def at_aac_rate(audio):
    """Return the AUDIO at a rate that AAC has: its own, or else 48000 Hz."""
    if audio["sample_rate"] in AAC_RATES:
        return audio
    samples = round(audio["waveform"].shape[-1] * 48000 / audio["sample_rate"])
    return {"waveform": resample(audio["waveform"], samples), "sample_rate": 48000}
