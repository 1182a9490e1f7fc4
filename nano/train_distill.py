"""Distil nano's transformer to the eight steps of the published sampler, and write its weights.

    python as_package.py nano.train_distill

The teacher walks from noise to a clip in guided steps. At each of the sampler's own noise levels the student learns to
predict, in one step, where that walk ends. Then it learns from its own mistakes: where the sampler, which noises afresh
whatever the student predicts, has brought it, the teacher takes over and shows where it should end.
"""

import argparse
import copy
from itertools import pairwise

import numpy as np
import torch

from ..model_loader.dit import DiT
from ..model_loader.load import save_part
from ..sampler.schedule import flow_sigmas
from . import preview
from .pixel_metric import nano_metric, weighted_square
from .train_dit import CONFIG, EVERYTHING, FIRST_FRAME, Examples, draw_mode, noised, to_bf16_linears
from .training import RUNS, WEIGHTS, bf16_matmuls, plain_attention, train

STEPS = 8
LATE = range(3, STEPS)  # the noise levels at which a state has enough of the student's doing in it to differ


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


@torch.no_grad()
def own_states(velocity, video, audio, sigmas, image_given=False, sound_given=False):
    """Return the (video, audio) that the distilled sampler shows its network at every one of `sigmas` but the last.

    velocity: the student's, function(video, audio) -> both velocities; given and returned like `walk`'s.
    """
    first, sound, states = video[:, :, :1].clone(), audio, []
    for sigma, following in pairwise(sigmas):
        states.append((video, audio))
        v_video, v_audio = velocity(video, audio)
        level = following.expand(len(video))
        video, _ = noised(video - sigma * v_video, level)
        audio = sound if sound_given else noised(audio - sigma * v_audio, level)[0]
        if image_given:
            video[:, :, :1] = first
    return states


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=640, help="eight to a walk of the teacher")
    parser.add_argument("--own-steps", type=int, default=1600, help="then so many from the student's own states")
    parser.add_argument("--clips", type=int, default=12000)
    parser.add_argument("--first", type=int, default=0, help="number of the first clip, as the teacher's")
    parser.add_argument("--guidance", type=float, default=3.5, help="the teacher's; 1 for none, at half the cost")
    parser.add_argument("--teacher-steps", type=int, default=1, help="Euler steps from one noise level to the next")
    options = parser.parse_args()
    examples, teacher = Examples(options.clips, options.first), load_teacher()
    metric = nano_metric(examples.video)
    student = copy.deepcopy(teacher).train().requires_grad_(True)
    levels, fine = flow_sigmas(STEPS), flow_sigmas(STEPS * options.teacher_steps)
    walks = {}  # the current one, under its kind and number

    def start_of(number, stream, share=1):
        """Return noise to start from with all that is given, for the 1 / `share` first clips of a batch."""
        rng = np.random.default_rng((stream, number))
        video, audio, text = (part[: len(part) // share] for part in examples.draw(rng, progress=1.0))
        image_given, sound_given = draw_mode(rng)
        start = levels[0].expand(len(video))
        x_video, _ = noised(video, start, FIRST_FRAME if image_given else None)
        x_audio, _ = noised(audio, start, EVERYTHING if sound_given else None)
        return (x_video, x_audio), text, (image_given, sound_given)

    def guided(text):
        def velocity(video, audio):
            with bf16_matmuls():
                return guided_velocity(teacher, video, audio, text, examples.empty, options.guidance)

        return velocity

    def teacher_walk(number):
        """Return text, what is given, and {level: (state, where the teacher's walk through it ends)}."""
        start, text, given = start_of(number, 61)
        *states, end = list(walk(guided(text), *start, fine, *given))[:: options.teacher_steps]
        return text, given, {level: (state, end) for level, state in enumerate(states)}

    def own_walk(number):
        """Do the same for the late levels of a walk of the student's, each with the teacher's end from there."""
        start, text, given = start_of(number, 62, share=2)

        def velocity(video, audio):
            with bf16_matmuls():
                return student(video, audio, text, attention=plain_attention)

        states = own_states(velocity, *start, levels, *given)
        ends = {level: list(walk(guided(text), *states[level], levels[level:], *given))[-1] for level in LATE}
        return text, given, {level: (states[level], ends[level]) for level in LATE}

    def lesson(step):
        """Return the walk that a step belongs to, kept while it serves, and the step's noise level."""
        own = step >= options.steps
        number, turn = divmod(step - options.steps if own else step, len(LATE) if own else STEPS)
        if (own, number) not in walks:
            walks.clear()
            walks[own, number] = own_walk(number) if own else teacher_walk(number)
        return walks[own, number], LATE[turn] if own else turn

    def loss_of_step(step):
        (text, (image_given, sound_given), pairs), level = lesson(step)
        (x_video, x_audio), (end_video, end_audio) = pairs[level]
        with bf16_matmuls():
            got_video, got_audio = student(x_video, x_audio, text, attention=plain_attention)
        # the error of the predicted clip, in units of velocity
        sigma = levels[level]
        wrong = got_video - (x_video - end_video) / sigma
        wrong_video = weighted_square(wrong[:, :, 1 if image_given else 0 :], metric)
        wrong_audio = (got_audio - (x_audio - end_audio) / sigma).square().mean()
        loss = wrong_video + (0.0 if sound_given else 0.5) * wrong_audio
        return loss, {"video": wrong_video.item(), f"video{level}": wrong_video.item()}

    student = train(
        "dit_student",
        student,
        loss_of_step,
        steps=options.steps + options.own_steps,
        peak_rate=4e-4,
        muon=student.block,
        warmup=30,
        ema=0.995,
        save_every=80,  # whole walks of either kind: eight and five steps
        weight_decay=0.0,
    )
    save_part(WEIGHTS / "nano_dit.safetensors", to_bf16_linears(student), "dit", CONFIG, "distill")
    preview.main()


if __name__ == "__main__":
    main()
