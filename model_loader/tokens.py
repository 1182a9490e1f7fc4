"""The packed sequence: video, then audio, then text tokens; patches, positions and rotary tables."""

from dataclasses import dataclass
from functools import lru_cache

import torch

from .config import PATCH

ROTARY_BASE = 10000.0  # MagiHuman, arXiv 2603.21986


@dataclass(frozen=True, slots=True)
class TokenLayout:
    """Sizes of one packed sequence, in tokens: video in (frame, row, column) order, then audio, then text."""

    frames: int
    rows: int
    columns: int
    audio: int
    text: int

    @classmethod
    def of(cls, video, audio, text):
        """Read the sizes off video [B,C,T,H,W], audio [B,L,Ca] and text [B,n,Ct]; ValueError where they do not fit."""
        frames, height, width = video.shape[2:]
        if height % PATCH[1] or width % PATCH[2]:
            raise ValueError(
                f"video latent of {height} x {width}: height and width must be even (32 pixels to a token); "
                "choose pixel sizes that are multiples of 32"
            )
        if not video.shape[0] == audio.shape[0] == text.shape[0]:
            raise ValueError(
                f"batch sizes differ: video {video.shape[0]}, audio {audio.shape[0]}, text {text.shape[0]}; "
                "give each clip its own audio latent and text features"
            )
        return cls(frames, height // PATCH[1], width // PATCH[2], audio.shape[1], text.shape[1])

    @property
    def frame(self):
        """Tokens of one latent frame."""
        return self.rows * self.columns

    @property
    def video(self):
        """Tokens of the video span."""
        return self.frames * self.frame

    @property
    def spans(self):
        """Lengths of the video, audio and text spans."""
        return self.video, self.audio, self.text


def patchify(video):
    """Cut a video latent [B,C,T,H,W] into tokens [B, T*H/2*W/2, 4C], channel slowest (C pT pH pW)."""
    b, c, t, h, w = video.shape
    pt, ph, pw = PATCH
    tokens = video.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw).permute(0, 2, 4, 6, 1, 3, 5, 7)
    return tokens.reshape(b, -1, c * pt * ph * pw)


def unpatchify(tokens, layout):
    """Join output tokens [B, T*H/2*W/2, 4C], channel fastest (pT pH pW C), to a video latent [B,C,T,H,W]."""
    pt, ph, pw = PATCH
    grid = tokens.reshape(tokens.shape[0], layout.frames, layout.rows, layout.columns, pt, ph, pw, -1)
    video = grid.permute(0, 7, 1, 4, 2, 5, 3, 6)
    return video.reshape(tokens.shape[0], video.shape[1], layout.frames * pt, layout.rows * ph, layout.columns * pw)


def coordinates(layout, positions):
    """Return every token's place: [N, 9] fp32 = index (t, h, w), own size (t, h, w), reference size (t, h, w).

    positions "v2": audio runs over (L-1)//4+1 latent frames, text tokens count up to -1 and share one place. "v1":
    audio runs over the T video frames, text over 2; a span of one token has no place there: ValueError.
    """
    frames, rows, columns = layout.frames, layout.rows, layout.columns
    grid = torch.cartesian_prod(torch.arange(frames), torch.arange(rows), torch.arange(columns)).reshape(-1, 3)
    video = torch.cat([grid, torch.tensor([frames, rows, columns] * 2).expand(len(grid), 6)], dim=1)
    if positions == "v2":
        audio = _line(layout.audio, start=0, reference=(layout.audio - 1) // 4 + 1)
        text = _line(layout.text, start=-layout.text, reference=1)
    else:
        audio = _line(layout.audio, start=0, reference=frames)
        text = _line(layout.text, start=0, reference=2)
    return torch.cat([video, audio, text]).float()


def _line(length, start, reference):
    if length == 1 and reference > 1:
        raise ValueError(
            f'positions "v1" spread a span of tokens over {reference} places, which one token cannot fill; '
            "give at least two audio latents and two text tokens"
        )
    index = torch.arange(start, start + length)
    rest = torch.tensor([0, 0, length, 1, 1, reference, 1, 1]).expand(length, 8)
    return torch.cat([index[:, None], rest], dim=1)


def rotary_sin_cos(coords, head_dim):
    """Turn coordinates [N, 9] into a rotary table [N, 6*(head_dim//8)] fp32: sines of t, h, w bands, then cosines."""
    index, size, reference = coords.split(3, dim=1)
    scale = torch.where(size == 1, 1.0, (reference - 1) / (size - 1).clamp(min=1))
    centre = (size - 1) / 2 * torch.tensor([0.0, 1.0, 1.0])  # time counts from the start, rows and columns do not
    angles = (((index - centre) * scale)[:, :, None] * rotary_bands(head_dim)).flatten(1)
    return torch.cat([angles.sin(), angles.cos()], dim=1)


def rotary_bands(head_dim):
    """Return the rotary frequencies of one axis, [head_dim // 8] fp32."""
    count = head_dim // 8
    return ROTARY_BASE ** -(torch.arange(count, dtype=torch.float32) / count)


@lru_cache(maxsize=4)
def rotary_table(layout, positions, head_dim, device):
    """Return `rotary_sin_cos` of a layout on `device`, cached because every step of a clip asks for the same one."""
    with torch.inference_mode(False):  # a table cached while sampling must still serve a training step
        return rotary_sin_cos(coordinates(layout, positions), head_dim).to(device)
