"""The weights in the repository: small enough, whole, and of use."""

import math

import numpy as np
import torch
from pack.model_loader.load import load_audio_vae, load_dit, load_text_encoder, load_video_vae, tokenizer_json
from pack.nano import world
from pack.nano.cases import Case, InProcess
from pack.nano.training import WEIGHTS
from tokenizers import Tokenizer

MB = 10**6


def test_sizes():
    sizes = {path.name: path.stat().st_size for path in WEIGHTS.glob("*.safetensors")}
    parts = ("dit", "sr", "text_encoder", "video_vae", "audio_vae")
    assert set(sizes) == {f"nano_{part}.safetensors" for part in parts}
    assert max(sizes.values()) <= 8 * MB and sum(sizes.values()) <= 16 * MB


def test_the_transformer_has_every_kind_of_layer():
    config = load_dit(WEIGHTS / "nano_dit.safetensors").config
    middle = set(range(config.num_layers)) - set(config.expert_layers)
    assert config.expert_layers and middle and config.gelu7_layers and config.positions == "v2"


def test_video_vae_rebuilds_a_clip():
    vae = load_video_vae(WEIGHTS / "nano_video_vae.safetensors")
    scene = world.draw_scene(np.random.default_rng(81), kind="ball")
    pixels = torch.from_numpy(world.render_frames(scene, 13)).permute(3, 0, 1, 2)[None] * 2 - 1
    with torch.inference_mode():
        latent = vae.encode(pixels)
        error = (vae.decode(latent) - pixels) / 2
    assert latent.shape == (1, 48, 4, 6, 6) and 0.3 < latent.std() < 3
    assert -10 * math.log10(error.square().mean()) > 20


def test_audio_vae_rebuilds_a_sound():
    vae = load_audio_vae(WEIGHTS / "nano_audio_vae.safetensors")
    for kind in world.KINDS:
        sound = torch.from_numpy(world.render_sound(world.draw_scene(np.random.default_rng(82), kind=kind), 51))
        with torch.inference_mode():
            latent = vae.encode(sound[None, None].repeat(1, 2, 1))
            back = vae.decode(latent)[0]
        assert latent.shape == (1, 64, 51)
        for side in back:
            assert 10 * math.log10(sound.square().mean() / (side - sound).square().mean()) > 12


def test_text_encoder_survives_any_text():
    path = WEIGHTS / "nano_text_encoder.safetensors"
    tokenizer, encoder = Tokenizer.from_str(tokenizer_json(path)), load_text_encoder(path, dtype=torch.float32)
    for text in ("", "A red ball bounces", "xyzzy \u732b \U0001f40e \n\t %&", "word " * 300):
        ids = tokenizer.encode(text).ids
        assert ids and max(ids) < encoder.config.vocab_size
        assert encoder(torch.tensor([ids])).isfinite().all()


def test_same_seed_same_clip_another_seed_another():
    make = InProcess()
    scene = world.draw_scene(np.random.default_rng(83), kind="ball")
    cases = [Case(number, scene, "A red ball bounces on a blue floor") for number in (1, 1, 2)]
    (one, sound, rate), (same, same_sound, _), (other, _, _) = map(make, cases)
    assert one.shape == (49, 96, 96, 3) and rate == 44100 and np.isfinite(sound).all()
    assert np.array_equal(one, same) and np.array_equal(sound, same_sound)
    assert not np.array_equal(one, other)
