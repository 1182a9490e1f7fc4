"""The nano workflows on a real server: mp4 out, image to video, progress, previews, refusal, interrupt, stock nodes."""

import io
import json
import re

import av
import numpy as np
import pytest
from pack.launch import demo
from pack.launch.client import Interrupted, NodeError, PromptError
from pack.launch.demo import clip_path
from PIL import Image


def shortened(graph, seconds=0.4):
    for node in graph.values():
        if "seconds" in node["inputs"]:
            node["inputs"]["seconds"] = seconds
    return graph


def read(path):
    """Return an mp4's frames [F,H,W,3] uint8, sound [2,n], {kind: (codec, start, seconds, rate)} and metadata."""
    with av.open(str(path)) as container:
        about, metadata = {}, dict(container.metadata)
        for stream in container.streams:
            start, seconds = (float(ticks * stream.time_base) for ticks in (stream.start_time, stream.duration))
            rate = float(stream.average_rate) if stream.type == "video" else stream.rate
            about[stream.type] = (stream.codec_context.name, start, seconds, rate)
        frames = np.stack([frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)])
        container.seek(0)
        sound = np.concatenate([frame.to_ndarray() for frame in container.decode(audio=0)], axis=1)
    return frames, sound, about, metadata


def test_text_to_video(server, watch, graph):
    heard = watch(graph("nano_t2v"))
    assert heard.outputs["5"]["animated"] == [True]
    frames, sound, about, metadata = read(clip_path(heard.outputs, server.output))
    assert frames.shape == (49, 96, 96, 3) and sound.shape[0] == 2
    assert about["video"][0] == "h264" and about["video"][3] == 25
    assert about["audio"][0] == "aac" and about["audio"][3] == 44100
    assert about["video"][1] == about["audio"][1] == 0
    assert about["video"][2] == pytest.approx(49 / 25)
    assert abs(about["video"][2] - about["audio"][2]) <= 1 / 25
    assert frames.std() > 1 and np.abs(sound).max() > 0.001, "neither black nor silent"
    assert json.loads(metadata["prompt"])["2"]["inputs"]["text"] == "A red ball bounces on a blue floor"
    assert (8, 8) in heard.steps
    assert len(heard.previews) >= 4 and Image.open(io.BytesIO(heard.previews[-1])).format == "JPEG"


def test_models_are_read_once(watch, graph):
    first = shortened(graph("nano_t2v"))
    watch(first)
    again = shortened(graph("nano_t2v"))
    again["4"]["inputs"]["seed"] = 77
    heard = watch(again)
    assert set(heard.cached) == {"1", "2", "3"}


def test_image_to_video_starts_with_the_image(server, watch, graph):
    name = graph("nano_i2v")["7"]["inputs"]["image"]
    assert (server.input / name).is_file(), "the pack puts the template's image where Load Image finds it"
    frames, _, about, _ = read(clip_path(watch(shortened(graph("nano_i2v"))).outputs, server.output))
    assert frames.shape == (9, 96, 96, 3) and about.keys() == {"video", "audio"}
    image = np.asarray(Image.open(server.input / name).convert("RGB"), dtype=float)
    psnr = 10 * np.log10(255**2 / np.square(frames[0] - image).mean())
    assert psnr > 20, f"the first frame is at {psnr:.1f} dB of the image"


@pytest.mark.parametrize(
    ("node", "name", "value", "message"),
    [
        ("3", "seconds", 40.0, r"HappyHorseEmptyLatent \[3\]: Value 40.0 bigger than max of 15.0 \(seconds\)"),
        ("3", "size", "8K", r"HappyHorseEmptyLatent \[3\]: .*size is unknown; expected one of nano 96x96, 256p"),
        ("1", "model", "gone.safetensors", r"HappyHorseLoadCheckpoint \[1\]: .*gone.safetensors is not in models/diff"),
        (
            "1",
            "video_vae",
            "nano_audio_vae.safetensors",
            "built-in file for another input. Choose nano_video_vae",
        ),
        ("4", "steps", -1, r"HappyHorseSampler \[4\]: Value -1 smaller than min of 0 \(steps\)"),
        ("4", "model", ["1", 1], r"HappyHorseSampler \[4\]: Return type mismatch .*received_type\(CLIP\)"),
    ],
)
def test_a_bad_input_is_refused_before_it_runs(client, graph, node, name, value, message):
    bad = graph("nano_t2v")
    bad[node]["inputs"][name] = value
    with pytest.raises(PromptError, match=message):  # HTTP 400
        client.queue(bad)


def test_nodes_tell_what_is_outside_the_training(watch, graph):
    strange = shortened(graph("nano_t2v"))
    speakers = {f"speaker_{i}": "off" for i in (2, 3, 4)} | {"speaker_1": "on", "speaker_1.language": "Korean"}
    speakers |= {"speaker_1.description": "a yellow face", "speaker_1.line": "안녕"}
    text = {"description": "A red ball bounces on a blue floor. " * 100, "background_sound": "", **speakers}
    strange["builder"] = {"class_type": "HappyHorsePromptBuilder", "inputs": text}
    strange["2"]["inputs"]["text"] = ["builder", 0]
    strange["3"]["inputs"] |= {"size": "custom", "size.width": 416, "size.height": 320}
    strange["4"]["inputs"]["steps"] = 1
    told = watch(strange).notices  # the node's id stands before the text
    assert "builder806 words" in told
    assert any(re.match(r"2\d+ of 640 tokens\nThe prompt has .* reads the first 640", text) for text in told)
    assert any(text.startswith("3416x320, 9 frames\n416x320 is larger than the 256p") for text in told)


def test_a_program_hears_what_nodes_tell_and_the_log_keeps_it(client, server, graph):
    strange, told = shortened(graph("nano_t2v")), []
    strange["2"]["inputs"]["text"] = "A red dog bounces on a blue floor"
    client.run(strange, on_notice=lambda node, text: told.append((node, text)))
    (remark,) = [text.splitlines()[1] for node, text in told if node == "HappyHorseEncodePrompt"]
    assert "has not learnt: dog." in remark
    assert f"HappyHorse Prompt: {remark}" in server.log(100)


def test_the_demo_makes_a_clip_and_notes_what_to_mind(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("COMFYUI_PATH", str(server.comfyui))
    monkeypatch.setattr(demo, "OUTPUT", tmp_path)
    demo.make_clip(demo.parser().parse_args(["A red dog bounces on a blue floor", "--seconds", "0.4"]))
    said = capsys.readouterr().out.splitlines()
    (note,), (clip,) = [line for line in said if line.startswith("Note: ")], tmp_path.rglob("*.mp4")
    assert "has not learnt: dog." in note and str(clip) in said
    assert any("9 frames" in line for line in said) and any("44100 Hz" in line for line in said)


def test_a_fault_that_shows_while_it_runs_is_explained(client, graph):
    mixed = shortened(graph("nano_t2v"))
    mixed["5"]["inputs"]["vae"], mixed["5"]["inputs"]["audio_vae"] = ["1", 3], ["1", 2]
    with pytest.raises(NodeError, match="The video VAE input holds a HappyHorse audio VAE"):
        client.run(mixed)


def test_interrupt_stops_in_the_middle_and_the_next_prompt_works(server, client, watch, graph):
    long = graph("nano_t2v")
    long["4"]["inputs"].update(steps=100, seed=3)
    prompt, steps = [], []

    def stop(progress):
        steps.append(progress.step)
        if progress.step == 2 and steps.count(2) == 1:
            client.interrupt(prompt[0])

    with pytest.raises(Interrupted, match="HappyHorseSampler"):
        client.run(long, stop, prompt.append)
    assert 2 in steps and max(steps) < 50
    heard = watch(shortened(graph("nano_t2v"), 0.6))
    assert read(clip_path(heard.outputs, server.output))[0].shape[0] == 13


def test_stock_nodes_sample_decode_and_save(server, watch, graph):
    """SamplerCustomAdvanced with core's lcm, core's separate, decode, create and save, on our model and VAEs."""
    stock = shortened(graph("nano_t2v"))
    del stock["4"], stock["5"]

    def add(name, class_type, **inputs):
        stock[name] = {"class_type": class_type, "inputs": inputs}

    add("text", "CLIPTextEncode", clip=["1", 1], text="A green cube bounces on white")
    add("noise", "RandomNoise", noise_seed=1)
    add("guider", "BasicGuider", model=["1", 0], conditioning=["text", 0])
    add("sampler", "KSamplerSelect", sampler_name="lcm")
    add("sigmas", "BasicScheduler", model=["1", 0], scheduler="simple", steps=8, denoise=1.0)
    sources = {"noise": ["noise", 0], "guider": ["guider", 0], "sampler": ["sampler", 0], "sigmas": ["sigmas", 0]}
    add("sample", "SamplerCustomAdvanced", latent_image=["3", 0], **sources)
    add("separate", "LTXVSeparateAVLatent", av_latent=["sample", 0])
    add("images", "VAEDecode", samples=["separate", 0], vae=["1", 2])
    add("audio", "VAEDecodeAudio", samples=["separate", 1], vae=["1", 3])
    add("video", "CreateVideo", images=["images", 0], audio=["audio", 0], fps=25.0)
    add("save", "SaveVideo", video=["video", 0], filename_prefix="stock", format="auto", codec="auto")
    frames, sound, about, _ = read(clip_path(watch(stock).outputs, server.output))
    assert frames.shape == (9, 96, 96, 3) and about["audio"][3] == 44100
    assert abs(about["video"][2] - about["audio"][2]) <= 1 / 25
