"""The samplers: as one node, and as SAMPLER and SIGMAS for SamplerCustomAdvanced."""

import comfy.k_diffusion.sampling
import comfy.model_management
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io

from ..sampler.conditioning import AUDIO_SCALE, BASE_VIDEO_SCALE, BASE_VIDEO_SCALE_LATE
from ..sampler.schedule import DEFAULT_SHIFT, flow_sigmas
from ..sampler.sizes import PIXELS_PER_LATENT
from ..sampler.steps import UniPC, renoise_step
from .guidance import base_guider, guidance_inputs, unguided
from .host import require_generator, require_joint_latent, with_shift
from .memory import clip_remarks
from .notice import notice

DISTILL_STEPS, BASE_STEPS = 8, 32


def sample_renoise(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    """Sample the way the distilled model was trained for: predict the clean latents, then noise them to the next level.

    A k-diffusion function: model(x, sigma) -> denoised; x packed latents [B,1,N] fp32; sigmas [steps + 1] falling to 0.
    Step noise comes from the seed the way core's `lcm` draws it.
    """
    seed = (extra_args or {}).get("seed")
    noise_sampler = noise_sampler or comfy.k_diffusion.sampling.default_noise_sampler(x, seed=seed)

    def advance(i, x, denoised):
        if sigmas[i + 1] == 0:
            return denoised
        # sigma 0: the guider has taken the velocity off already
        return renoise_step(denoised, denoised, noise_sampler(sigmas[i], sigmas[i + 1]), 0.0, sigmas[i + 1])

    return _walk(model, x, sigmas, advance, extra_args, callback, disable)


def sample_unipc(model, x, sigmas, extra_args=None, callback=None, disable=None):
    """Sample with FlowUniPC, as the base and super-resolution models want it; arguments as `sample_renoise`, no noise.

    Each value of the packed latents is solved on its own, so one solver serves picture and sound.
    """
    solver = UniPC(sigmas)
    return _walk(model, x, sigmas, lambda i, x, denoised: solver.step(x, denoised), extra_args, callback, disable)


SAMPLERS = {"renoise": sample_renoise, "unipc": sample_unipc}


def _walk(model, x, sigmas, advance, extra_args, callback, disable):
    """Go through the noise levels: predict the clean latents, report them, advance(i, x, denoised) to the next."""
    for i in comfy.k_diffusion.sampling.trange(len(sigmas) - 1, disable=disable):
        denoised = model(x, sigmas[i].expand(x.shape[0]), **(extra_args or {}))
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = advance(i, x, denoised)
    return x


def run(guider, function, sigmas, noise, start, seed, noise_mask=None):
    """Sample joint latents through a guider of core's, with LoRA, previews, interrupt and memory management.

    function: one of SAMPLERS; noise, start: NestedTensor (video, audio); returns one like them.
    """
    sampled = guider.sample(
        noise,
        start,
        comfy.samplers.KSAMPLER(function),
        sigmas,
        denoise_mask=noise_mask,
        callback=latent_preview.prepare_callback(guider.model_patcher, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )
    return sampled.to(comfy.model_management.intermediate_device())


def remarks(model, start, denoise):
    """Return what to tell, in a list, of a clip that begins from the joint latents `start`: its size, or emptiness."""
    video, audio = start.unbind()
    shape = PIXELS_PER_LATENT * video.shape[4], PIXELS_PER_LATENT * video.shape[3], video.shape[2], audio.shape[2]
    empty = ["The latent is empty: with denoise below 1 the clip stays grey."] * (denoise < 1 and not video.any())
    return [*empty, *clip_remarks(model, *shape)]


def seed_input():
    """Return the seed's widget."""
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip="Number the noise is drawn from: the same seed and settings give the same clip, another seed another "
        "take.",
    )


def shift_input():
    """Return the schedule's shift."""
    return io.Float.Input(
        "shift",
        default=DEFAULT_SHIFT,
        min=0.1,
        max=20.0,
        step=0.1,
        tooltip="How long the schedule stays at high noise. The models were trained with 5; higher spends more steps "
        "on motion and layout, lower more on detail.",
        advanced=True,
    )


def denoise_input():
    """Return how much of the latent is made anew."""
    return io.Float.Input(
        "denoise",
        default=1.0,
        min=0.01,
        max=1.0,
        step=0.01,
        optional=True,
        tooltip="How much of the latent is made anew, for one from HappyHorse Encode. 1: everything. 0.2 to 0.4 keep "
        "the motion and the background; from 0.6 on little of either is left.",
    )


class Sampler(io.ComfyNode):
    """The sampler in one node."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseSampler",
            display_name="HappyHorse Sampler",
            category="HappyHorse",
            description="Makes picture and sound together, the way the model was trained: 8 steps without guidance for "
            "the distilled model and nano, 32 steps with guidance for base.",
            search_aliases=["happyhorse ksampler", "generate"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Model.Input("model", tooltip="The model, from Load HappyHorse."),
                io.Conditioning.Input("positive", tooltip="The prompt, from HappyHorse Prompt or First Image."),
                io.Latent.Input(
                    "latent", tooltip="Size and length, from Empty Latent, Soundtrack, Encode or Continue."
                ),
                seed_input(),
                io.Int.Input(
                    "steps",
                    default=0,
                    min=0,
                    max=100,
                    tooltip="Forward passes; time grows with them. 0: as the model was trained, 8 for the distilled "
                    "ones (and nano), 32 for base. Fewer blur, more change little.",
                ),
                shift_input(),
                io.Conditioning.Input(
                    "negative",
                    optional=True,
                    tooltip="What to avoid, from HappyHorse Negative Prompt. The base model needs it, the distilled "
                    "ones do not use it. A first image need not be given to it again.",
                ),
                *guidance_inputs(),
                denoise_input(),
            ],
            outputs=[
                io.Latent.Output(tooltip="Picture and sound. Connect to HappyHorse Save Video or HappyHorse Decode.")
            ],
        )

    @classmethod
    def execute(
        cls, model, positive, latent, seed, steps, shift, negative=None, guidance=BASE_VIDEO_SCALE,
        late_guidance=BASE_VIDEO_SCALE_LATE, audio_guidance=AUDIO_SCALE, denoise=1.0,
    ):  # fmt: skip
        """Choose guider, sampler and steps by the model's variant, and run them."""
        variant = require_generator(model).variant
        start = require_joint_latent(latent)
        model = with_shift(model, shift)
        if variant == "base":
            function, steps, told = sample_unipc, steps or BASE_STEPS, "FlowUniPC"
            guider = base_guider(model, positive, negative, guidance, late_guidance, audio_guidance)
        else:
            function, steps, guider = sample_renoise, steps or DISTILL_STEPS, unguided(model, positive)
            told = "distilled, without guidance" + (": negative is not used" if negative is not None else "")
        notice(cls, "\n".join([f"{steps} steps, {told}", *remarks(model, start, denoise)]))
        noise = comfy.sample.prepare_noise(start, seed, latent.get("batch_index"))
        sigmas = flow_sigmas(steps, shift, denoise)
        sampled = run(guider, function, sigmas, noise, start, seed, latent.get("noise_mask"))
        return io.NodeOutput({**latent, "samples": sampled})


class SamplerSelect(io.ComfyNode):
    """The samplers for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseSamplerSelect",
            display_name="HappyHorse Sampler Select",
            category="HappyHorse/custom sampling",
            description="The models' own samplers as a SAMPLER, for SamplerCustomAdvanced.",
            search_aliases=["happyhorse renoise", "happyhorse unipc", "flowunipc"],
            inputs=[
                io.Combo.Input(
                    "sampler_name",
                    options=list(SAMPLERS),
                    default="renoise",
                    optional=True,
                    tooltip="renoise: for the distilled model and nano, without guidance. unipc: FlowUniPC, for base "
                    "(with HappyHorse Guider) and for super-resolution.",
                )
            ],
            outputs=[io.Sampler.Output(tooltip="Connect to SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, sampler_name="renoise"):
        """Wrap the sampling function."""
        return io.NodeOutput(comfy.samplers.KSAMPLER(SAMPLERS[sampler_name]))


class Sigmas(io.ComfyNode):
    """The schedule for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseSigmas",
            display_name="HappyHorse Sigmas",
            category="HappyHorse/custom sampling",
            description="The noise levels the models were trained with, for SamplerCustomAdvanced: 8 steps for the "
            "distilled model, 32 for base.",
            search_aliases=["happyhorse scheduler", "happyhorse schedule"],
            inputs=[
                io.Int.Input(
                    "steps",
                    default=DISTILL_STEPS,
                    min=1,
                    max=100,
                    tooltip="Forward passes; time grows with them: 8 for the distilled model and nano, 32 for base, 5 "
                    "for super-resolution.",
                ),
                shift_input(),
                denoise_input(),
            ],
            outputs=[io.Sigmas.Output(tooltip="Connect to SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, steps, shift, denoise=1.0):
        """Build the schedule."""
        return io.NodeOutput(flow_sigmas(steps, shift, denoise))
