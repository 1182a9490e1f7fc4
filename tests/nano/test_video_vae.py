"""The step from frames to clips: an inflated VAE looks at the present only."""

import torch
from pack.model_loader.core_vae import VideoVAE, initialise
from pack.nano.train_video_vae import CONFIG, inflate


def test_an_inflated_vae_looks_at_the_present_only():
    torch.manual_seed(0)
    vae = initialise(VideoVAE(CONFIG)).vae
    clip = torch.randn(1, 3, 13, 32, 32)
    other = clip.clone()
    other[:, :, :5] = torch.randn(1, 3, 5, 32, 32)  # another past for the chunks after the second
    with torch.inference_mode():
        assert not torch.allclose(vae.encode(clip)[:, :, 2:], vae.encode(other)[:, :, 2:], atol=1e-4)
    inflate(vae)
    with torch.inference_mode():
        one, two = vae.encode(clip), vae.encode(other)
        torch.testing.assert_close(one[:, :, 2:], two[:, :, 2:], atol=1e-6, rtol=0)
        assert not torch.allclose(one[:, :, :2], two[:, :, :2], atol=1e-4)
        decoded = vae.decode(torch.cat([one[:, :, :2], two[:, :, 2:]], dim=2))
        torch.testing.assert_close(decoded, vae.decode(one), atol=1e-5, rtol=0)
