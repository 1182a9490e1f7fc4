"""Golden cases of the sampler: schedules, single steps, super-resolution's start, whole loops, both stages in a row."""

import torch

from ..sampler import conditioning, schedule, sizes, steps, super_resolution
from ..sampler.denoise import denoise_renoise, denoise_unipc

TOLERANCE = 5e-6


def toy_network(case, text, super_resolved):
    """Return the golden toy model as a velocity function; text: "context" (prompt) or "context_null" (negative)."""
    weights = case.under("toy.")
    context = weights[text][:, : weights[f"{text}_len"]].mean()

    def velocity(video, audio, sigma):
        video_velocity = torch.einsum("oc,bcthw->bothw", weights["Wv"], video)
        video_velocity = video_velocity + (context * weights["Bv"]).view(1, -1, 1, 1, 1)
        if super_resolved:
            video_velocity = video_velocity + (audio.mean() * weights["Bv"]).view(1, -1, 1, 1, 1)
        return video_velocity, audio @ weights["Wa"].T + context * weights["Ba"]

    return velocity


def recorded(velocity, calls):
    """Return `velocity`, noting every result in the list `calls`."""

    def recording(*arguments):
        calls.append(velocity(*arguments))
        return calls[-1]

    return recording


def recorded_noise(case):
    """Return noise(like) that hands out the case's recorded draws in order; ValueError if shapes come otherwise."""
    draws = iter(case.under("noise.").items())

    def noise(like):
        name, draw = next(draws, ("end", like[..., :0]))
        if draw.shape != like.shape:
            raise ValueError(f"noise.{name} has shape {list(draw.shape)}; our sampler draws {list(like.shape)} here")
        return draw

    return noise


def run_stage(case, super_resolved, step_count, latents, noise, *, image, driven=False, calls=None, on_step=None):
    """Run a published stage on `latents` (video, audio) with the case's toy network; returns (video, audio).

    calls: {"cond": list, "uncond": list} to note what the network answers; on_step: as in the loops.
    """
    video, audio = latents
    settings = case.config["spec"]["ec"]
    is_guided = (settings.get("sr_cfg_number", 1) if super_resolved else settings["cfg_number"]) == 2
    calls = {"cond": [], "uncond": []} if calls is None else calls
    velocity = recorded(toy_network(case, "context", super_resolved), calls["cond"])
    if is_guided:
        negative = recorded(toy_network(case, "context_null", super_resolved), calls["uncond"])
        frame_scales = conditioning.sr_video_scale(video.shape[2])
        video_scale = (lambda sigma: frame_scales) if super_resolved else conditioning.base_video_scale
        velocity = conditioning.guided(velocity, negative, video_scale)
    sigmas = schedule.flow_sigmas(step_count)
    if super_resolved or settings["cfg_number"] != 1:
        keep_audio = super_resolved or driven
        return denoise_unipc(velocity, video, audio, sigmas, image=image, keep_audio=keep_audio, on_step=on_step)
    # The published 8-step path overwrites a driving soundtrack like any audio; our nodes keep it (keep_audio=driven).
    return denoise_renoise(velocity, video, audio, sigmas, noise=noise, image=image, on_step=on_step)


def latent_checks(case):
    """One stage: every step's inputs, velocities and results."""
    spec = case.config["spec"]
    image = case["in.latent_image"] if spec.get("img") else None
    calls, taken = {"cond": [], "uncond": []}, []
    video, audio = run_stage(
        case,
        spec.get("sr", False),
        spec["steps"],
        (case["in.latent_video"], case["in.latent_audio"]),
        recorded_noise(case),
        image=image,
        driven=spec.get("a2v", False),
        calls=calls,
        on_step=taken.append,
    )
    for step in taken:
        found = {
            "x_in": step.video,
            "a_in": step.audio,
            "v_cfg": step.video_velocity,
            "va_cfg": step.audio_velocity,
            "x_next": step.next_video,
            "a_next": step.next_audio,
        }
        for name, results in calls.items():
            if len(calls["uncond"]) == len(taken):
                found[f"v_{name}"], found[f"va_{name}"] = results[step.index]
        for name, ours in found.items():
            yield case.check(f"out.step{step.index:02d}.{name}", ours, TOLERANCE)
    yield case.check("out.final_video", video, TOLERANCE)
    yield case.check("out.final_audio", audio, TOLERANCE)
    yield case.check("out.timesteps", schedule.flow_timesteps(spec["steps"]), 0)


def evaluate_checks(case):
    """The whole pipeline: sizes, noise, base stage, super-resolution, with the draws in their published order."""
    spec = case.config["spec"]
    asked = spec["args"]
    noise = recorded_noise(case)
    channels = spec["ec"]["z_dim"]
    driven = "in.ref_audio_latent" in case
    if driven:
        audio = case["in.ref_audio_latent"].transpose(1, 2)
    else:
        audio = noise(torch.empty(1, sizes.audio_length(asked["seconds"]), 64))
    height, width = sizes.latent_side(asked["br_height"]), sizes.latent_side(asked["br_width"])
    video = noise(torch.empty(1, channels, sizes.video_length(audio.shape[1]), height, width))
    yield case.check("out.br.latent_audio_init", audio, TOLERANCE)
    yield case.check("out.br.latent_video_init", video, TOLERANCE)

    def image(height, width):
        return case[f"in.image_latent_{16 * height}x{16 * width}"] if asked.get("image") else None

    base_image = image(height, width)
    video, audio = run_stage(case, False, asked["br_steps"], (video, audio), noise, image=base_image, driven=driven)
    yield case.check("out.br.latent_video_out", video, TOLERANCE)
    yield case.check("out.br.latent_audio_out", audio, TOLERANCE)
    if asked.get("sr_width"):
        height, width = sizes.latent_side(asked["sr_height"]), sizes.latent_side(asked["sr_width"])
        noise_level = spec["ec"].get("noise_value", super_resolution.NOISE_LEVEL)
        video, heard = super_resolution.start_super_resolution(
            video, audio, height, width, noise, noise_level=noise_level
        )
        yield case.check("out.sr.latent_video_init", video, TOLERANCE)
        yield case.check("out.sr.latent_audio_init", heard, TOLERANCE)
        video, heard = run_stage(case, True, asked["sr_steps"], (video, heard), noise, image=image(height, width))
        yield case.check("out.sr.latent_video_out", video, TOLERANCE)
        yield case.check("out.sr.latent_audio_out", heard, TOLERANCE)
    yield case.check("out.final_video", video, TOLERANCE)
    yield case.check("out.final_audio", audio, TOLERANCE)


def schedule_checks(case):
    """Sigmas and timesteps for several step counts, and the zero-SNR table."""
    shift = case.config["shift"]
    for count in case.config["ns"]:
        yield case.check(f"out.n{count}.sigmas", schedule.flow_sigmas(count, shift), 0)
        yield case.check(f"out.n{count}.timesteps", schedule.flow_timesteps(count, shift), 0)
    yield case.check("out.zerosnr_sigmas", schedule.zero_snr_signal_scales(), TOLERANCE)
    unshifted = schedule.flow_sigmas(1, shift=1.0).double()  # the range that every schedule warps
    yield case.check("out.init_sigma_max_min", unshifted, 0)


def sde_checks(case):
    """The SDE step at several step indices and angles."""
    sigmas = schedule.flow_sigmas(case.config["steps"]).tolist()
    for number, (index, theta) in enumerate(case.config["cases_idx_theta"]):
        noise = case[f"in.noise{number}"]
        ours = steps.sde_step(case["in.x"], case["in.velocity"], noise, sigmas[index], sigmas[index + 1], theta)
        yield case.check(f"out.case{number}.prev", ours, TOLERANCE)


def super_resolution_checks(case):
    """The latent that super-resolution starts from."""
    frames, height, width = case.config["size"]
    noise_level = case.config["noise_value"]
    upsampled = super_resolution.upsample_latent(case["in.br_latent_video"], height, width)
    yield case.check("out.upsampled", upsampled, TOLERANCE)
    yield case.check("out.sigma", schedule.zero_snr_signal_scales()[noise_level], TOLERANCE)
    noised = super_resolution.noised_latent(upsampled, case["in.noise"], noise_level)
    yield case.check("out.sr_latent", noised, TOLERANCE)


KINDS = {
    "sampler_latent": latent_checks,
    "sampler_evaluate": evaluate_checks,
    "sampler_schedules": schedule_checks,
    "sampler_sde": sde_checks,
    "sampler_sr_init": super_resolution_checks,
}
