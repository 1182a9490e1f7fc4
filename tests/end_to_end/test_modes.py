"""Sound that drives a clip, a clip that goes on, and a clip enlarged, with nano on a real server."""

import av
import numpy as np
import pytest
from pack.launch.demo import clip_path
from pack.nano.measure import read_clip


def read(path):
    """Return an mp4's number of frames, its sound [n] from time 0, and the sound's rate."""
    with av.open(str(path)) as container:
        rate = container.streams.audio[0].rate
        frames = sum(1 for _ in container.decode(video=0))
        container.seek(0)
        sound = list(container.decode(audio=0))
    samples = np.concatenate([part.to_ndarray() for part in sound], axis=1)[0]
    return frames, samples[max(0, -sound[0].pts) :], rate


def test_a_clips_own_sound_drives_another_and_the_clip_goes_on(server, watch, graph):
    both = graph("nano_t2v")
    both["3"]["inputs"]["seconds"] = 1.0

    def add(name, class_type, **inputs):
        both[name] = {"class_type": class_type, "inputs": inputs}

    model, vaes = ["1", 0], {"vae": ["1", 2], "audio_vae": ["1", 3]}
    sampling = {"model": model, "positive": ["2", 0], "seed": 3, "steps": 0, "shift": 5.0}
    sound = {"images": ["first", 0], "audio": ["first", 1]}
    add("first", "HappyHorseDecode", latent=["4", 0], **vaes)
    add("soundtrack", "HappyHorseSoundtrack", latent=["3", 0], audio=["first", 1], audio_vae=["1", 3])
    add("driven", "HappyHorseSampler", latent=["soundtrack", 0], **sampling)
    add("5", "HappyHorseSaveVideo", latent=["driven", 0], **vaes, filename_prefix="driven")
    add("continue", "HappyHorseContinue", **sound, **vaes, seconds=0.48, overlap=5)
    add("next", "HappyHorseSampler", latent=["continue", 0], **sampling)
    add("second", "HappyHorseDecode", latent=["next", 0], **vaes)
    pair = {"images_1": ["first", 0], "audio_1": ["first", 1], "images_2": ["second", 0], "audio_2": ["second", 1]}
    add("join", "HappyHorseJoin", **pair, overlap=["continue", 1])
    add("long", "HappyHorseSaveVideo", images=["join", 0], audio=["join", 1], filename_prefix="long")
    heard = watch(both)
    assert any("takes the length of the soundtrack: 1.16 s" in notice for notice in heard.notices)
    driven_frames, driven_sound, rate = read(clip_path({"5": heard.outputs["5"]}, server.output))
    long_frames, long_sound, _ = read(clip_path({"long": heard.outputs["long"]}, server.output))
    assert driven_frames == 29 and long_frames == 37 and rate == 44100
    shared = slice(2000, 20 * 1764)
    likeness = np.corrcoef(driven_sound[shared], long_sound[shared])[0, 1]
    assert likeness > 0.98, "both files begin with the first clip's sound"


@pytest.mark.parametrize("first_stage", ["nano_t2v", "nano_i2v"])
def test_super_resolution_doubles_the_picture_and_leaves_the_sound(server, watch, graph, first_stage):
    both, enlarged = graph(first_stage), graph("nano_super_resolution")
    both["3"]["inputs"]["seconds"] = 0.4
    both["9"], both["20"] = enlarged["9"], enlarged["10"]
    both["20"]["inputs"] |= {"latent": ["4", 0], "positive": both["4"]["inputs"]["positive"], "vae": ["1", 2]}
    both["21"] = {"class_type": "HappyHorseSaveVideo", "inputs": {**both["5"]["inputs"], "latent": ["20", 0]}}
    heard = watch(both)
    assert any("192x192" in notice for notice in heard.notices)
    small, sound, *_ = read_clip(clip_path({"5": heard.outputs["5"]}, server.output))
    large, same_sound, *_ = read_clip(clip_path({"21": heard.outputs["21"]}, server.output))
    assert small.shape == (9, 96, 96, 3) and large.shape == (9, 192, 192, 3)
    assert np.array_equal(sound, same_sound)
    reduced = large.reshape(9, 96, 2, 96, 2, 3).mean((2, 4))
    assert np.corrcoef(reduced.ravel(), small.ravel())[0, 1] > 0.9
