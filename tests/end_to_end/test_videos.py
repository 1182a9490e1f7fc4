"""A video of one's own, through the server: changed by a prompt, and given a sound."""

import json
from pathlib import Path

import numpy as np
import pytest
from pack.launch.demo import clip_path
from pack.launch.workflows import WORKFLOWS, twin_path
from pack.nano.measure import find_tones, matched, observe, pearson, read_clip

EXAMPLE = WORKFLOWS / "input" / "happyhorse_nano_clip.mp4"
SPEAKER = EXAMPLE.with_name("happyhorse_nano_speaker.mp4")


def made_by(name, client, server, **sampler):
    twin = json.loads(twin_path(name).read_text(encoding="utf-8"))
    for node in twin.values():
        node["inputs"] |= sampler if node["class_type"] == "HappyHorseSampler" else {}
    return read_clip(clip_path(client.run(twin), Path(server.output)))


@pytest.fixture(scope="module")
def example():
    """The example's frames, what it shows at nano's size, and when its ball is heard."""
    frames, sound, rate, _ = read_clip(EXAMPLE)
    return frames, observe(frames[:, ::2, ::2], sound, rate), find_tones(sound, rate)


def test_the_example_is_what_its_notes_say(example):
    frames, seen, tones = example
    assert frames.shape == (50, 192, 192, 3) and (seen.colour, seen.background) == ("red", "blue") and len(tones) == 3


def test_video_to_video_changes_the_ball_and_keeps_its_time(client, server, example):
    frames, sound, rate, _ = made_by("nano_video_to_video", client, server)
    seen = observe(frames, sound, rate)
    assert (seen.colour, seen.background) == ("green", "blue")
    assert matched(example[2], find_tones(sound, rate)) == 3
    anew, its_sound, _, _ = made_by("nano_video_to_video", client, server, denoise=1.0)
    assert matched(example[2], find_tones(its_sound, rate)) < 3


@pytest.mark.parametrize("seed", [1, 2])
def test_a_video_gets_a_sound_that_fits_and_stays_as_it_was(client, server, example, seed):
    frames, sound, rate, _ = made_by("nano_sound_for_a_video", client, server, seed=seed)
    assert frames.shape == (49, 192, 192, 3)
    assert np.abs(frames.astype(float) - example[0][:49]).mean() < 3, "written once more by H.264, nothing else"
    assert matched(example[2], find_tones(sound, rate)) >= 2


def test_a_speaker_gets_other_words(client, server):
    before, old_sound, rate, _ = read_clip(SPEAKER)
    frames, sound, new_rate, _ = made_by("nano_lip_sync_a_video", client, server)
    said, seen = observe(before[:49, ::2, ::2], old_sound, rate), observe(frames, sound, new_rate)
    assert (seen.kind, seen.colour, seen.background) == (said.kind, said.colour, said.background)
    assert pearson(seen.mouth, seen.loudness) > 0.7 > 0.5 > pearson(seen.mouth, said.loudness[:49])
    assert np.abs(frames.astype(float) - before[:49, ::2, ::2]).mean() < 10, "most of the old picture is there"
