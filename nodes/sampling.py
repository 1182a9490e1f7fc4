"""The sampler: as one node, and as SAMPLER and SIGMAS for SamplerCustomAdvanced."""

import comfy.k_diffusion.sampling
import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
from comfy_api.latest import io

from ..sampler.schedule import DEFAULT_SHIFT, flow_sigmas
from ..sampler.steps import renoise_step
from .host import require_happyhorse, require_joint_latent

DISTILL_STEPS = 8


def sample_renoise(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    """Sample the way the distilled model was trained for: predict the clean latents, then noise them to the next level.

    A k-diffusion function: model(x, sigma) -> denoised; x packed latents [B,1,N] fp32; sigmas [steps + 1] falling to 0.
    Step noise comes from the seed the way core's `lcm` draws it.
    """
    extra_args = extra_args or {}
    noise_sampler = noise_sampler or comfy.k_diffusion.sampling.default_noise_sampler(x, seed=extra_args.get("seed"))
    for i in comfy.k_diffusion.sampling.trange(len(sigmas) - 1, disable=disable):
        denoised = model(x, sigmas[i].expand(x.shape[0]), **extra_args)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigmas[i], "sigma_hat": sigmas[i], "denoised": denoised})
        x = denoised
        if sigmas[i + 1] > 0:
            # sigma 0: the guider has taken the velocity off already
            x = renoise_step(x, x, noise_sampler(sigmas[i], sigmas[i + 1]), 0.0, sigmas[i + 1])
    return x


def _steps_input():
    return io.Int.Input(
        "steps",
        default=DISTILL_STEPS,
        min=1,
        max=100,
        tooltip="Forward passes; time grows with them. The distilled models (and nano) were trained for 8: fewer blur, "
        "more change little.",
    )


def _shift_input():
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


class Sampler(io.ComfyNode):
    """The eight-step sampler in one node."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseSampler",
            display_name="HappyHorse Sampler",
            category="HappyHorse",
            description="Makes picture and sound together: 8 steps, no guidance, for the distilled model and nano.",
            search_aliases=["happyhorse ksampler", "generate"],
            inputs=[
                io.Model.Input("model", tooltip="The model, from Load HappyHorse."),
                io.Conditioning.Input("positive", tooltip="The prompt, from HappyHorse Prompt or First Image."),
                io.Latent.Input("latent", tooltip="Size and length, from HappyHorse Empty Latent."),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=True,
                    tooltip="Number the noise is drawn from: the same seed and settings give the same clip, another "
                    "seed another take.",
                ),
                _steps_input(),
                _shift_input(),
            ],
            outputs=[
                io.Latent.Output(tooltip="Picture and sound. Connect to HappyHorse Save Video or HappyHorse Decode.")
            ],
        )

    @classmethod
    def execute(cls, model, positive, latent, seed, steps, shift):
        """Sample through core's guider, so that LoRA, previews, interrupt and memory management apply."""
        require_happyhorse(model)
        samples = require_joint_latent(latent)
        sampled = comfy.sample.sample_custom(
            model,
            comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
            cfg=1.0,
            sampler=comfy.samplers.KSAMPLER(sample_renoise),
            sigmas=flow_sigmas(steps, shift),
            positive=positive,
            negative=[],
            latent_image=samples,
            noise_mask=latent.get("noise_mask"),
            callback=latent_preview.prepare_callback(model, steps),
            disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
            seed=seed,
        )
        return io.NodeOutput({**latent, "samples": sampled})


class SamplerSelect(io.ComfyNode):
    """The sampler for SamplerCustomAdvanced."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseSamplerSelect",
            display_name="HappyHorse Sampler Select",
            category="HappyHorse/custom sampling",
            description="The 8-step sampler of the distilled model as a SAMPLER, for SamplerCustomAdvanced.",
            search_aliases=["happyhorse renoise"],
            inputs=[],
            outputs=[io.Sampler.Output(tooltip="Connect to SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls):
        """Wrap the sampling function."""
        return io.NodeOutput(comfy.samplers.KSAMPLER(sample_renoise))


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
            inputs=[_steps_input(), _shift_input()],
            outputs=[io.Sigmas.Output(tooltip="Connect to SamplerCustomAdvanced.")],
        )

    @classmethod
    def execute(cls, steps, shift):
        """Build the schedule."""
        return io.NodeOutput(flow_sigmas(steps, shift))
