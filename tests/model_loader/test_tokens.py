"""Order of tokens and features, and positions of both styles, against loops written out from the specification."""

import pytest
import torch
from pack.model_loader.tokens import TokenLayout, coordinates, patchify, rotary_sin_cos, rotary_table, unpatchify

LAYOUT = TokenLayout(frames=3, rows=2, columns=4, audio=9, text=5)


def place(coords):
    """Return each token's (t, h, w) angle in bands of frequency 1."""
    index, size, reference = coords.split(3, dim=1)
    scale = torch.where(size == 1, torch.ones_like(size), (reference - 1) / (size - 1))
    return (index - torch.stack([0 * size[:, 0], (size[:, 1] - 1) / 2, (size[:, 2] - 1) / 2], dim=1)) * scale


def test_layout_reads_sizes_and_spans():
    layout = TokenLayout.of(torch.zeros(2, 48, 3, 4, 8), torch.zeros(2, 9, 64), torch.zeros(2, 5, 24))
    assert layout == LAYOUT and layout.spans == (24, 9, 5)


def test_layout_refuses_odd_sizes_and_mixed_batches():
    audio, text = torch.zeros(1, 9, 64), torch.zeros(1, 5, 24)
    with pytest.raises(ValueError, match="height and width must be even"):
        TokenLayout.of(torch.zeros(1, 48, 3, 5, 8), audio, text)
    with pytest.raises(ValueError, match="batch sizes differ: video 2, audio 1, text 1"):
        TokenLayout.of(torch.zeros(2, 48, 3, 4, 8), audio, text)


def test_patchify_orders_tokens_by_frame_row_column_and_features_channel_slowest():
    video = torch.randn(2, 48, 3, 4, 8)
    tokens = patchify(video)
    for t, y, x in ((0, 0, 0), (1, 0, 3), (2, 1, 2)):
        token = tokens[1, (t * 2 + y) * 4 + x]
        for c, dy, dx in ((0, 0, 0), (5, 1, 0), (47, 0, 1)):
            assert token[c * 4 + dy * 2 + dx] == video[1, c, t, 2 * y + dy, 2 * x + dx]


def test_unpatchify_reads_features_channel_fastest():
    tokens = torch.randn(2, 24, 192)
    video = unpatchify(tokens, LAYOUT)
    assert video.shape == (2, 48, 3, 4, 8)
    for t, y, x in ((0, 0, 0), (1, 0, 3), (2, 1, 2)):
        for c, dy, dx in ((0, 0, 0), (5, 1, 0), (47, 0, 1)):
            assert video[1, c, t, 2 * y + dy, 2 * x + dx] == tokens[1, (t * 2 + y) * 4 + x, (dy * 2 + dx) * 48 + c]


def test_video_is_centred_in_space_and_counts_frames_from_zero():
    places = place(coordinates(LAYOUT, "v2"))[:24].reshape(3, 2, 4, 3)
    assert places[:, 0, 0, 0].tolist() == [0, 1, 2]
    assert places[0, :, 0, 1].tolist() == [-0.5, 0.5]
    assert places[0, 0, :, 2].tolist() == [-1.5, -0.5, 0.5, 1.5]


def test_v2_audio_runs_at_four_frames_a_latent_and_text_stays_at_zero():
    places = place(coordinates(LAYOUT, "v2"))
    torch.testing.assert_close(places[24:33, 0], torch.arange(9) * 2 / 8)  # (9 - 1) // 4 = 2 over 8 steps
    assert places[33:].abs().max() == 0
    assert places[24:, 1:].abs().max() == 0


def test_v2_single_text_token_sits_at_minus_one():
    places = place(coordinates(TokenLayout(3, 2, 4, 9, 1), "v2"))
    assert places[-1].tolist() == [-1, 0, 0]


def test_v1_audio_spans_the_video_and_text_spans_two_places():
    places = place(coordinates(LAYOUT, "v1"))
    torch.testing.assert_close(places[24:33, 0], torch.arange(9) * 2 / 8)  # T - 1 = 2
    torch.testing.assert_close(places[33:, 0], torch.arange(5) / 4)
    longer = place(coordinates(TokenLayout(9, 2, 4, 9, 5), "v1"))
    torch.testing.assert_close(longer[72:81, 0], torch.arange(9.0))


@pytest.mark.parametrize("layout", [TokenLayout(3, 2, 4, 9, 1), TokenLayout(3, 2, 4, 1, 5)])
def test_v1_refuses_a_span_of_one_token(layout):
    with pytest.raises(ValueError, match="one token cannot fill"):
        coordinates(layout, "v1")


def test_v1_single_audio_latent_fits_a_single_frame():
    assert place(coordinates(TokenLayout(1, 2, 4, 1, 5), "v1"))[8, 0] == 0


def test_rotary_table_is_sines_then_cosines_of_t_h_w_bands():
    coords = coordinates(LAYOUT, "v2")
    table = rotary_sin_cos(coords, 32)
    bands = torch.tensor([10000 ** (-k / 4) for k in range(4)])
    angles = (place(coords)[:, :, None] * bands).flatten(1)
    torch.testing.assert_close(table, torch.cat([angles.sin(), angles.cos()], dim=1), rtol=0, atol=1e-6)


def test_a_table_cached_while_sampling_serves_training():
    layout = TokenLayout(2, 3, 5, 5, 7)
    with torch.inference_mode():
        table = rotary_table(layout, "v2", 16, torch.device("cpu"))
    assert not table.is_inference()
    assert rotary_table(layout, "v2", 16, torch.device("cpu")) is table
    assert rotary_table(layout, "v1", 16, torch.device("cpu")) is not table
