"""Distil nano's transformer to the eight steps of the published sampler, and write its weights.

    python as_package.py nano.train_distill

At each of the sampler's own noise levels the student learns to predict, in one step, where the teacher's many steps
end: the teacher walks the remaining levels with guidance, the student meets that clip with one velocity.
"""

import argparse
import copy

import numpy as np
import torch

from ..model_loader.dit import DiT
from ..model_loader.load import save_part
from ..sampler.schedule import flow_sigmas
from . import preview
from .train_dit import CONFIG, EVERYTHING, FIRST_FRAME, Examples, draw_mode, noised
from .training import RUNS, WEIGHTS, train

STEPS = 8
# share of the training steps spent at each of the eight noise levels, noisiest first
LEVELS = np.array([2, 1, 1, 1, 1, 1, 1, 1]) / 9


def load_teacher():
    """Return the averaged weights of nano.train_dit, in eval mode."""
    teacher = DiT(CONFIG, dtype=torch.float32)
    teacher.load_state_dict(torch.load(RUNS / "dit_teacher.pt", weights_only=True)["average"])
    return teacher.eval().requires_grad_(False)


@torch.no_grad()
def guided_velocity(teacher, video, audio, text, empty, scale):
    """Return the teacher's velocities, pushed away from those for the empty prompt where `scale` is above 1."""
    velocity = teacher(video, audio, text)
    if scale == 1:
        return velocity
    without = teacher(video, audio, empty.expand(len(video), -1, -1))
    return tuple(w + scale * (v - w) for v, w in zip(velocity, without, strict=True))


@torch.no_grad()
def walk(teacher, video, audio, text, empty, scale, sigmas, image_given, sound_given):
    """Return where Euler steps along `sigmas` take both latents; what is given stays as it is."""
    first, sound = video[:, :, :1].clone(), audio.clone()
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        v_video, v_audio = guided_velocity(teacher, video, audio, text, empty, scale)
        video = video + (following - sigma) * v_video
        audio = sound if sound_given else audio + (following - sigma) * v_audio
        if image_given:
            video[:, :, :1] = first
    return video, audio


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--clips", type=int, default=2000)
    parser.add_argument("--guidance", type=float, default=1.0, help="the teacher's; 1 for none, at half the cost")
    parser.add_argument("--teacher-steps", type=int, default=1, help="Euler steps from one noise level to the next")
    options = parser.parse_args()
    examples, teacher = Examples(options.clips), load_teacher()
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    fine = flow_sigmas(STEPS * options.teacher_steps)  # every teacher-steps-th entry is a level of the sampler
    levels = flow_sigmas(STEPS)

    def loss_of_step(step):
        rng = np.random.default_rng((61, step))
        video, audio, text = examples.draw(rng)
        image_given, sound_given = draw_mode(rng)
        level = int(rng.choice(STEPS, p=LEVELS))
        sigma = levels[level]
        everyone = sigma.expand(len(video))
        x_video, _ = noised(video, everyone, FIRST_FRAME if image_given else None)
        x_audio, _ = noised(audio, everyone, EVERYTHING if sound_given else None)
        end_video, end_audio = walk(
            teacher,
            x_video.clone(),
            x_audio,
            text,
            examples.empty,
            options.guidance,
            fine[level * options.teacher_steps :],
            image_given,
            sound_given,
        )
        got_video, got_audio = student(x_video, x_audio, text)
        # the error of the predicted clip, in units of velocity
        wrong_video = (got_video - (x_video - end_video) / sigma)[:, :, 1 if image_given else 0 :].square().mean()
        wrong_audio = (got_audio - (x_audio - end_audio) / sigma).square().mean()
        loss = wrong_video + (0.0 if sound_given else 0.5) * wrong_audio
        return loss, {"video": wrong_video.item(), f"video{level}": wrong_video.item()}

    student = train(
        "dit_student",
        student,
        loss_of_step,
        steps=options.steps,
        peak_rate=6e-4,
        warmup=30,
        ema=0.995,
        save_every=100,
        weight_decay=0.0,
    )
    save_part(WEIGHTS / "nano_dit.safetensors", to_bf16_linears(student), "dit", CONFIG, "distill")
    preview.main()


def to_bf16_linears(dit):
    """Return the state dict in the published precision: bf16 linears; fp32 adapter, norms, final linears."""
    reference = DiT(CONFIG, dtype=torch.bfloat16, device="meta").state_dict()
    return {name: tensor.to(reference[name].dtype) for name, tensor in dit.state_dict().items()}


if __name__ == "__main__":
    main()
