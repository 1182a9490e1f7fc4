"""Sound that drives a clip, and a clip that goes on, with nano on a real server."""

import av
import numpy as np
from pack.launch.demo import clip_path


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
