"""Decoding in strips: which rows, that a local decoder's picture comes back, and fading at the seams."""

from itertools import pairwise

import pytest
import torch
from pack.sampler.media import to_frames
from pack.sampler.strips import OVERLAP, STRIP, decode_in_strips, strips


@pytest.mark.parametrize("rows", [1, 2, 16, 17, 20, 28, 29, 68, 256])
def test_strips_cover_every_row_and_share_the_overlap(rows):
    found = strips(rows)
    assert found[0][0] == 0 and found[-1][1] == rows and all(last - first <= STRIP for first, last in found)
    for (_, last), (first, _) in pairwise(found):
        assert last - first == OVERLAP
    assert all(last - first > OVERLAP for first, last in found[1:]), "a strip must add rows"


def enlarged(latent):
    """Decode every value of three channels to 16 x 16 pixels: 1 frame, then 4 and 4."""
    for t in range(latent.shape[2]):
        frame = latent[:, :3, t : t + 1].expand(-1, -1, 1 if t == 0 else 4, -1, -1)
        yield frame.repeat_interleave(16, 3).repeat_interleave(16, 4)


@pytest.mark.parametrize("rows", [8, 16, 30, 44])
def test_a_decoder_that_looks_at_no_other_row_gives_the_whole_picture(tmp_path, rows):
    latent = torch.rand(1, 48, 3, rows, 5, generator=torch.Generator().manual_seed(rows)) * 2 - 1
    pieces = list(decode_in_strips(enlarged, latent, tmp_path))
    assert [tuple(piece.shape) for piece in pieces] == [(n, 16 * rows, 80, 3) for n in (1, 4, 4)]
    assert torch.equal(torch.cat(pieces), torch.cat([to_frames(step[0]) for step in enlarged(latent)]))
    assert not list(tmp_path.iterdir())


def test_strips_that_disagree_fade_into_each_other(tmp_path):
    shades = iter((0.0, 1.0))

    def flat(latent):
        yield torch.full((1, 3, 1, 16 * latent.shape[3], 32), next(shades))

    (frames,) = decode_in_strips(flat, torch.zeros(1, 48, 1, 20, 2), tmp_path)
    column = frames[0, :, 0, 0].int()
    top, seam, bottom = column[: 12 * 16], column[12 * 16 : 16 * 16], column[16 * 16 :]
    assert (top == 127).all() and (bottom == 255).all()
    assert 127 < seam[0] < 131 and 251 < seam[-1] < 255 and (seam.diff() >= 0).all() and seam.diff().max() <= 2
