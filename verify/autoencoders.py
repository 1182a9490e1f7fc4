"""Golden cases of the three autoencoders: Turbo and Wan2.2 video, Oobleck audio with its resampling and windows."""

import math
import re

import torch

from ..model_loader.checkpoint import Checkpoint
from ..model_loader.config import STABLE_AUDIO, WAN22_LATENT_STD, OobleckConfig
from ..model_loader.core_vae import resample, stdev
from ..model_loader.detect import describe
from ..model_loader.detect_vae import turbo_config_from_json
from ..model_loader.load import fill
from ..sampler.audio_windows import encode_in_windows, merge_windows

EXACT = 0.0
FP32 = 5e-5
BF16 = 2e-2  # relative RMS
RESAMPLED = 44100 / 51200


def check_turbo(case):
    """Yield the checks of the Turbo decoder: windows of every length in fp32, one in bf16, one without windows."""
    config = turbo_config_from_json(case.config["cfg"])
    weights = Checkpoint.of_tensors(case.weights().tensors)
    decoders = {
        dtype: fill("turbo_vae", config, weights, "decoder.", dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    }
    for name in case.outputs:
        latent, _, what = name.removeprefix("out.").partition(".")
        if what == "decoded":
            yield case.check(name, decoders[torch.float32].decode(case[f"in.{latent}"]), FP32)
        elif what == "decoded_bf16":
            yield case.check_rms(name, decoders[torch.bfloat16].decode(case[f"in.{latent}"]), BF16)
        elif what == "decoder_first_chunk_all":
            decoder = decoders[torch.float32]
            whole = decoder.decode_window(decoder.denormalise(case[f"in.{latent}"]), first=True)
            yield case.check(name, whole, FP32)


def check_video_vae(case):
    """Yield the checks of the Wan2.2 VAE in fp32 and bf16: latents before and after normalising, pixels, statistics."""
    weights = Checkpoint.of_tensors(case.weights().tensors)
    found = describe(weights)
    vaes = {dtype: fill("wan_vae", found.config, weights, dtype=dtype) for dtype in (torch.float32, torch.bfloat16)}
    for name in case.outputs:
        half, what = re.fullmatch(r"out\.(bf16\.)?(.+)", name).groups()
        ours = _video_output(case, vaes[torch.bfloat16 if half else torch.float32], what)
        if ours is None:
            continue
        if what in ("mean", "std", "scale1_inv_std"):
            yield case.check(name, ours, EXACT)
        else:
            yield case.check_rms(name, ours, BF16) if half else case.check(name, ours, FP32)


def _video_output(case, vae, what):
    """Compute what an output's name asks for; None if the name says nothing to us."""
    mean, inverse_std = (statistic.flatten() for statistic in vae.statistics("cpu"))
    statistics = {"mean": mean, "scale1_inv_std": inverse_std, "std": torch.tensor(WAN22_LATENT_STD)}
    if what in statistics:
        return statistics[what]
    actions = {
        "_mu_unscaled": vae.encode_raw,
        "_latent": vae.encode,
        "_decoded_preclamp": vae.decode_raw,
        "_decoded_4d": lambda latent: vae.decode(latent.squeeze(0)),  # the pipeline drops the batch axis of one clip
        "_decoded": vae.decode,
    }
    for ending, action in actions.items():
        if what.endswith(ending):
            return action(case["in." + what.removesuffix(ending)])
    return None


def audio_vae(case):
    """Build the AudioVAE that a case's json describes, with the weights it names."""
    model = case.config["cfg"]["model"]
    encoder, latent = model["encoder"]["config"], model["latent_dim"]
    config = OobleckConfig(
        channels=encoder["channels"],
        latent_dim=latent,
        c_mults=tuple(encoder["c_mults"]),
        strides=tuple(encoder["strides"]),
        sample_rate=STABLE_AUDIO.sample_rate,
    )
    return fill("oobleck", config, Checkpoint.of_tensors(case.weights().tensors), dtype=torch.float32)


def check_audio(case):
    """Yield the checks of the audio VAE both ways, of the resampling to 44100 Hz, and of joining windows."""
    vae = audio_vae(case)
    for name in case.outputs:
        what = name.removeprefix("out.")
        ours = _audio_output(case, vae, what)
        if ours is not None:
            without_vae = what.startswith(("resample", "merged"))
            yield case.check(name, ours, FP32 if without_vae else peak_tolerance(case[name]))


def _audio_output(case, vae, what):
    """Compute what an output's name asks for; None if the name says nothing to us."""
    if encoded := re.fullmatch(r"encoded(.*)", what):
        waveform, noise = case[f"in.encode{encoded[1]}_wav"], case[f"in.encode{encoded[1]}_noise"]
        return vae.encode(waveform[None], noise)
    if moment := re.fullmatch(r"(encode.*_wav)\.(mean|scale|stdev)", what):
        mean, scale = vae.encode_raw(case[f"in.{moment[1]}"][None])
        return {"mean": mean, "scale": scale, "stdev": stdev(scale)}[moment[2]]
    if resampled := re.fullmatch(r"(resample.*)_out", what):
        waveform = case[f"in.{resampled[1]}_in"].T
        return resample(waveform, int(waveform.shape[-1] * RESAMPLED)).T
    if what in ("decoded_batched_call", "decoded_unbatched_call"):
        return vae.decode(case["in.latent"].transpose(1, 2))
    if what == "waveform_51200":
        return vae.decode(case["in.latent"].transpose(1, 2))[0].T
    if what == "waveform_44100":
        return vae.decode_for_playback(case["in.latent"].transpose(1, 2))[0].T
    if what == "merged":
        return merge_windows(list(case.under("in.merge.").values()), axis=1)
    return None


def check_soundtrack(case):
    """Yield the checks of a whole soundtrack: written out from its formula, cut, encoded in windows if it is long."""
    rate = STABLE_AUDIO.sample_rate
    waveform = soundtrack(case.config["wave"], case.config["n"], rate)
    if "in.wave_first4096" in case:
        yield case.check("in.wave_first4096", waveform[:4096], 1e-7)
    if case.config["seconds"] is not None:
        waveform = waveform[: case.config["seconds"] * rate]
    vae = audio_vae(case)
    draws = iter(case.under("noise.").values())
    latent = encode_in_windows(lambda part: vae.encode(part, next(draws)), waveform.expand(1, 2, -1))
    yield case.check("out.latent", latent, peak_tolerance(case["out.latent"]))


def soundtrack(wave, samples, rate):
    """Return the test sound, [samples] fp32: sines of slowly swelling amplitude, summed in float64."""
    time = torch.arange(samples, dtype=torch.float64) / rate
    total = torch.zeros_like(time)
    for amplitude, hertz, phase, swell in zip(wave["amp"], wave["freq_hz"], wave["phase"], wave["mod_hz"], strict=True):
        tone = amplitude * torch.sin(2 * math.pi * hertz * time + phase)
        total += tone * (0.5 + 0.5 * torch.sin(2 * math.pi * swell * time))
    return total.float()


def peak_tolerance(golden):
    """Return 5e-5, or 2e-5 of the tensor's peak where that is more.

    The audio VAE's sines amplify rounding with the signal, and torch's sine is not rounded alike on every processor:
    the goldens (Intel, fp32) lie up to 1.1e-4 from the same network in float64 at a peak of 9, and so does any fp32
    run on another processor, whatever its convolutions (measured on AMD: 1.14e-4 with and without oneDNN).
    """
    return max(FP32, 2e-5 * golden.abs().max().item())


KINDS = {
    "turbo": check_turbo,
    "vae": check_video_vae,
    "audio": check_audio,
    "audio_chunked": check_soundtrack,
}
