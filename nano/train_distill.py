"""Distil nano's transformer to the eight steps of the published sampler, and write its weights.

    python as_package.py nano.train_distill

The teacher walks from noise to a clip in small guided steps. At each of the sampler's own noise levels the student
learns to predict, in one step, where that walk ends.
"""

import argparse
import copy

import numpy as np
import torch

from ..model_loader.dit import DiT
from ..model_loader.load import save_part
from ..sampler.schedule import flow_sigmas
from . import preview
from .train_dit import CONFIG, EVERYTHING, FIRST_FRAME, Examples, draw_mode, noised, to_bf16_linears
from .training import RUNS, WEIGHTS, bf16_matmuls, plain_attention, train

STEPS = 8


def load_teacher():
    """Return the averaged weights of nano.train_dit, in eval mode."""
    teacher = DiT(CONFIG, dtype=torch.float32)
    teacher.load_state_dict(torch.load(RUNS / "dit_teacher.pt", weights_only=True)["average"])
    return teacher.eval().requires_grad_(False)


def guided_velocity(teacher, video, audio, text, empty, scale):
    """Return the teacher's velocities, pushed away from those for the empty prompt where `scale` is above 1."""
    velocity = teacher(video, audio, text, attention=plain_attention)
    if scale == 1:
        return velocity
    without = teacher(video, audio, empty.expand(len(video), -1, -1), attention=plain_attention)
    return tuple(w + scale * (v - w) for v, w in zip(velocity, without, strict=True))


@torch.no_grad()
def walk(velocity, video, audio, sigmas, image_given=False, sound_given=False):
    """Yield (video, audio) at every one of `sigmas`, from the given noise to the end of Euler steps.

    velocity: function(video, audio) -> both velocities. What is given (the first frame, the sound) stays as it is.
    """
    first, sound = video[:, :, :1].clone(), audio
    yield video, audio
    for sigma, following in zip(sigmas[:-1].tolist(), sigmas[1:].tolist(), strict=True):
        v_video, v_audio = velocity(video, audio)
        video = video + (following - sigma) * v_video
        audio = sound if sound_given else audio + (following - sigma) * v_audio
        if image_given:
            video[:, :, :1] = first
        yield video, audio


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200, help="eight to a walk of the teacher")
    parser.add_argument("--clips", type=int, default=2400)
    parser.add_argument("--guidance", type=float, default=2.0, help="the teacher's; 1 for none, at half the cost")
    parser.add_argument("--teacher-steps", type=int, default=1, help="Euler steps from one noise level to the next")
    options = parser.parse_args()
    examples, teacher = Examples(options.clips), load_teacher()
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    levels, fine = flow_sigmas(STEPS), flow_sigmas(STEPS * options.teacher_steps)
    walks = {}  # of the current one: its number -> (text, image given, sound given, the latents at every level)

    def teacher_walk(number):
        rng = np.random.default_rng((61, number))
        video, audio, text = examples.draw(rng, progress=1.0)
        image_given, sound_given = draw_mode(rng)
        start = levels[0].expand(len(video))
        x_video, _ = noised(video, start, FIRST_FRAME if image_given else None)
        x_audio, _ = noised(audio, start, EVERYTHING if sound_given else None)

        def velocity(video, audio):
            with bf16_matmuls():
                return guided_velocity(teacher, video, audio, text, examples.empty, options.guidance)

        states = list(walk(velocity, x_video, x_audio, fine, image_given, sound_given))
        return text, image_given, sound_given, states[:: options.teacher_steps]

    def loss_of_step(step):
        number, level = divmod(step, STEPS)
        if number not in walks:
            walks.clear()
            walks[number] = teacher_walk(number)
        text, image_given, sound_given, states = walks[number]
        (x_video, x_audio), (end_video, end_audio) = states[level], states[-1]
        with bf16_matmuls():
            got_video, got_audio = student(x_video, x_audio, text, attention=plain_attention)
        # the error of the predicted clip, in units of velocity
        sigma = levels[level]
        wrong_video = (got_video - (x_video - end_video) / sigma)[:, :, 1 if image_given else 0 :].square().mean()
        wrong_audio = (got_audio - (x_audio - end_audio) / sigma).square().mean()
        loss = wrong_video + (0.0 if sound_given else 0.5) * wrong_audio
        return loss, {"video": wrong_video.item(), f"video{level}": wrong_video.item()}

    student = train(
        "dit_student",
        student,
        loss_of_step,
        steps=options.steps,
        peak_rate=8e-4,
        warmup=30,
        ema=0.995,
        save_every=80,
        weight_decay=0.0,
    )
    save_part(WEIGHTS / "nano_dit.safetensors", to_bf16_linears(student), "dit", CONFIG, "distill")
    preview.main()


if __name__ == "__main__":
    main()
