"""The whole pipeline through ComfyUI on this computer's own card, at full size: seconds of every stage.

    python3 run.py speed --size 1080p --weight-dtype fp8_e4m3fn_fast --attention fp8

Nothing needs to be downloaded: the model files are written first, in the full size, of random numbers, which a card
multiplies as fast as trained ones. The clip is noise. All other words go to ComfyUI, such as --lowvram.
"""

import argparse
import datetime
import importlib.util
import itertools
import json
import os
import re
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

from ..launch import LaunchError
from ..launch.client import Client
from ..launch.comfyui import FETCHED
from ..launch.environment import uses_card
from ..launch.server import Server, interrupt_when_told_to_end
from ..launch.terminal import StatusLine
from .measure import RESULTS, head, line
from .model_files import RandomWriter, write_models

ROOT = Path(__file__).parent.parent
WORKFLOW = ROOT / "workflows" / "api" / "text_to_1080p.json"
SIZES = ("256p", "540p", "1080p")
PRECISIONS = {  # of the files for every weight_dtype
    "bf16": "bf16", "int8": "int8", "int8_fast": "int8", "fp8_e4m3fn": "fp8", "fp8_e4m3fn_fast": "fp8"
}  # fmt: skip
ATTENTIONS = ("default", "fp8", "int8", "sage", "flash")  # of HappyHorse Speed
SECONDS = (0.2, 15.0)  # of HappyHorse Empty Latent
STAGES = {
    "HappyHorseLoadCheckpoint": "opening files",
    "HappyHorseEncodePrompt": "prompt",
    "HappyHorseSampler": "first pass, 256p, 8 steps",
    "HappyHorseSuperResolution": "super-resolution, {size}, 5 steps",
    "HappyHorseSaveVideo": "decoding and saving",
}
OPENING = {"HappyHorseLoadModel", "HappyHorseEmptyLatent", "HappyHorseSpeed"}  # counted with the first of them


def pipeline(size, seconds, vae="turbo_vae"):
    """Return the API graph of text to a clip of `size`, with the files of `write_models`."""
    graph = json.loads(WORKFLOW.read_text(encoding="utf-8"))
    names = {"model": "distill", "text_encoder": "t5gemma", "video_vae": vae, "audio_vae": "sd_audio"}
    graph["1"]["inputs"] |= {part: f"{name}.safetensors" for part, name in names.items()}
    graph["3"]["inputs"]["seconds"] = seconds
    if size == "256p":
        graph["5"]["inputs"]["latent"] = graph["10"]["inputs"]["latent"]
        del graph["9"], graph["10"]
    else:
        graph["9"]["inputs"]["model"] = f"{size}_sr.safetensors"
        graph["10"]["inputs"]["size"] = size
    return graph


def hurried(graph, weight_dtype, attention="default", compiled=False):
    """Return a `pipeline` with this weight_dtype, and HappyHorse Speed behind its transformers if it is to do more."""
    for node in list(graph):
        inputs = graph[node]["inputs"]
        if "text" in inputs:  # of which nano's tokenizer makes twice as many tokens as T5Gemma's
            inputs["text"] = inputs["text"][: len(inputs["text"]) // 2]
        if "weight_dtype" in inputs:
            inputs["weight_dtype"] = weight_dtype
        if "model" in inputs and isinstance(inputs["model"], list) and (attention != "default" or compiled):
            speed = {"model": inputs["model"], "attention": attention, "compile": compiled, "step_cache": 0.0}
            graph[f"{node}0"] = {"class_type": "HappyHorseSpeed", "inputs": speed}
            inputs["model"] = [f"{node}0", 0]
    return graph


def another_clip(graph):
    """Return the graph for another prompt and other seeds: what is loaded stays, everything else runs again."""
    graph = json.loads(json.dumps(graph))
    for node in graph.values():
        if "seed" in node["inputs"]:
            node["inputs"]["seed"] += 1
        if "text" in node["inputs"]:
            node["inputs"]["text"] += "."
    return graph


def timed(client, graph, on_progress=lambda progress: None, on_notice=lambda node, text: None):
    """Run a graph; return {title of a node: seconds}, those of equal title together, without those that are cached."""
    marks = []

    def seen(progress):
        if not marks or marks[-1][0] != progress.node:
            marks.append((progress.node, time.monotonic()))
        on_progress(progress)

    client.run(graph, seen, on_notice=on_notice)
    marks.append(("", time.monotonic()))
    seconds = {}
    for (node, start), (_, end) in itertools.pairwise(marks):
        seconds[node] = seconds.get(node, 0.0) + end - start
    return seconds


def rows(size, runs):
    """Yield the table's lines of some runs, each as `timed` gives it."""
    yield from head("", *("first run s", "again s")[: len(runs)])
    for node, stage in STAGES.items():
        together = [node, *(OPENING if node == "HappyHorseLoadCheckpoint" else ())]
        seconds = [sum(run.get(part, 0.0) for part in together) for run in runs]
        if any(seconds):
            yield line(stage.format(size=size), *(f"{number:.1f}" for number in seconds))
    yield line("all", *(f"{sum(run.values()):.1f}" for run in runs))


def measure(server, graph):
    """Run a graph on a Server, then one for another clip; return what `timed` gives of both, and tell on the way."""
    client, runs = Client(server.url, server.check_alive), []
    for which, graph_of_run in (("First run", graph), ("Again", another_clip(graph))):
        status = StatusLine()
        runs.append(timed(client, graph_of_run, partial(_show, status, which), _print_remarks))
        status.done(which)
    return runs


def _show(status, which, progress):
    status.show(f"{which}: {progress}")


def _print_remarks(node, text):
    for remark in text.splitlines()[1:]:
        print(f"Note: {remark}")


def seconds_of_a_clip(word):
    """Return the number of seconds that a word of the command line gives; ValueError where no clip can have them."""
    seconds = float(word)
    if not SECONDS[0] <= seconds <= SECONDS[1]:
        raise ValueError(word)
    return seconds


def parser():
    """Return the parser of the command line."""
    words = argparse.ArgumentParser(prog="run.py speed", description=__doc__.split("\n\n")[0])
    words.add_argument("--size", choices=SIZES, default="540p", help="of the finished clip (%(default)s)")
    words.add_argument("--seconds", type=seconds_of_a_clip, default=5.0, help="of the clip, 0.2 to 15 (%(default)s)")
    words.add_argument("--weight-dtype", choices=PRECISIONS, default="int8", help="as in Load HappyHorse (%(default)s)")
    words.add_argument("--attention", choices=ATTENTIONS, default="default", help="HappyHorse Speed's (%(default)s)")
    words.add_argument("--compile", action="store_true", help="as in HappyHorse Speed")
    words.add_argument("--folder", type=Path, help="where the files go (27 to 81 GB), and stay for another time")
    return words


def why_not():
    """Return why this computer cannot be measured, or None."""
    packages = Path(importlib.util.find_spec("torch").origin).parents[1]
    if uses_card(packages) or sys.platform == "darwin":
        return None
    return (
        "there is no graphics card here that PyTorch can use; a processor would take hours. `run.py bench --cpu` "
        "measures what one can do."
    )


def run(options, words, temporary):
    """Start ComfyUI with `words` more, write the files, make both clips; return its system_stats and `measure`'s."""
    names = ["distill", *([] if options.size == "256p" else [f"{options.size}_sr"]), "t5gemma", "turbo_vae", "sd_audio"]
    models = (options.folder or temporary).resolve()
    models.mkdir(parents=True, exist_ok=True)
    graph = hurried(pipeline(options.size, options.seconds), options.weight_dtype, options.attention, options.compile)
    words = ["--extra-model-paths-config", str(paths_file(models, temporary)), *words]
    with Server(Path(os.environ.get("COMFYUI_PATH", FETCHED)), temporary / "output", words) as server:
        about = Client(server.url).request("/system_stats")  # words that it does not take end it before gigabytes
        write_models(models, PRECISIONS[options.weight_dtype], RandomWriter, names)
        return about, measure(server, graph)


def main(arguments=None):
    """Measure what the command line asks for, print the table and write it into benchmarks/results."""
    options, words = parser().parse_known_args(arguments)
    if reason := why_not():
        sys.exit(f"speed: {reason}")
    as_before = interrupt_when_told_to_end()
    try:
        with tempfile.TemporaryDirectory(prefix=".random-models-", dir=ROOT, ignore_cleanup_errors=True) as temporary:
            about, runs = run(options, words, Path(temporary))
    except (ValueError, OSError, LaunchError) as error:
        sys.exit(f"speed: {error}")
    except KeyboardInterrupt:
        sys.exit("\nspeed: stopped; what it wrote is removed" + " but for --folder." * (options.folder is not None))
    finally:
        as_before()
    card = re.sub(r"^\w+:\d+ | :.*$", "", about["devices"][0]["name"])
    version, today = about["system"]["comfyui_version"], datetime.date.today()
    asked = [f"attention {options.attention}", *["compiled layers"] * options.compile, *words]
    lines = [
        f"# The whole pipeline in ComfyUI {version}, {card}, torch {about['system']['pytorch_version']}, {today}",
        "",
        f"{options.seconds:g} seconds at 16:9, random weights, {options.weight_dtype}, {', '.join(asked)}",
        "",
        *rows(options.size, runs),
    ]
    print("\n".join(lines))
    name = re.sub(r"[^A-Za-z0-9]+", "-", f"pipeline {options.size} {options.weight_dtype} {card}").strip("-").lower()
    file = RESULTS / f"{name}-{today}.md"
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written to {file}")


def paths_file(models, folder):
    """Write what tells ComfyUI of the models' folders; return the file."""
    places = {name: name for name in ("diffusion_models", "text_encoders", "vae")}
    file = folder / "paths.yaml"
    file.write_text(json.dumps({"random": {"base_path": str(models), **places}}))  # JSON is YAML
    return file


if __name__ == "__main__":
    main()
