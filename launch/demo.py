"""`run.py demo`: a prompt becomes an mp4 on a ComfyUI of its own, with the built-in tiny model."""

import argparse
import json
import os
import shutil
import signal
import sys
import webbrowser
from pathlib import Path

from . import ROOT, LaunchError
from .client import Client, NodeError
from .server import Server
from .terminal import StatusLine

WORKFLOWS = ROOT / "workflows" / "api"
OUTPUT = ROOT / "output"
SHORTEST, LONGEST = 0.2, 15.0  # seconds, as HappyHorse Empty Latent takes them
PROMPT = "A red ball bounces on a blue floor"


def parser():
    """Return the command line of `run.py demo`."""
    command = argparse.ArgumentParser(
        prog="run.py demo",
        description="Turn a prompt into a clip with sound: start a ComfyUI without a window, run the built-in tiny "
        "model on it, write an mp4 into output/, stop the server. The tiny model knows balls and cubes that bounce, "
        "and faces that say ma, me, mi, mo and mu, in eight colours.",
    )
    command.add_argument("prompt", nargs="?", default=PROMPT, metavar="PROMPT", help='default: "%(default)s"')
    command.add_argument("--seconds", type=seconds, default=2.0, help="of the clip, 1 to 2 (default: %(default)s)")
    command.add_argument("--seed", type=int, default=1, help="another number gives another clip (default: %(default)s)")
    command.add_argument("--image", type=Path, metavar="FILE", help="a picture (png, jpg) to start from")
    command.add_argument("--open", action="store_true", help="show the clip when it is done")
    return command


def fill(graph, values):
    """Write `values` {input name: value} into every node of an API workflow that has that input unconnected; return it.

    Nodes are known by their inputs, so that ids may change whenever a workflow is saved again. LaunchError if nobody
    has an input of that name.
    """
    for name, value in values.items():
        nodes = [node for node in graph.values() if not isinstance(node["inputs"].get(name, []), list)]
        if not nodes:
            raise LaunchError(f"The workflow has no free input `{name}`. Was it changed? `git status` tells.")
        for node in nodes:
            node["inputs"][name] = value
    return graph


def clip_path(outputs, folder):
    """Return the path of the mp4 among a prompt's `outputs` {node id: {kind: [files]}}, in the output `folder`."""
    for kinds in outputs.values():
        for files in kinds.values():
            for file in files:
                if isinstance(file, dict) and str(file.get("filename", "")).endswith(".mp4"):
                    return folder / file.get("subfolder", "") / file["filename"]
    raise LaunchError(f"The workflow ended without an mp4; its outputs: {json.dumps(outputs)[:300]}")


def probe(path):
    """Return one line for each stream of a media file: what it is and how long, in seconds."""
    import av

    lines = []
    with av.open(str(path)) as container:
        for stream in container.streams:
            seconds = float(stream.duration * stream.time_base)
            if stream.type == "video":
                size = f"{stream.width}x{stream.height}, {float(stream.average_rate):g} fps, {stream.frames} frames"
            else:
                size = f"{stream.rate} Hz, {stream.channels} channels"
            lines.append(f"{stream.type}: {stream.codec_context.name}, {size}, {seconds:.2f} s")
    return lines


def seconds(text):
    """Return a clip's length from the command line; argparse reports what is out of the nodes' range."""
    value = float(text)
    if not SHORTEST <= value <= LONGEST:
        raise argparse.ArgumentTypeError(f"{text} is out of range; expected {SHORTEST} to {LONGEST} (nano: 1 to 2)")
    return value


def check_picture(path):
    """Raise LaunchError where `path` is not a picture that ComfyUI could open."""
    from PIL import Image, UnidentifiedImageError  # in .venv only, and `run.py demo --help` comes before .venv

    try:
        with Image.open(path) as picture:
            picture.verify()
    except FileNotFoundError:
        raise LaunchError(f"{path}: no such picture.") from None
    except (UnidentifiedImageError, OSError, SyntaxError) as error:
        raise LaunchError(f"{path}: not a readable picture ({error}). Give a png, jpg or webp file.") from None


def main():
    """Make one clip; exit with a message that helps if that fails."""
    options = parser().parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that the server is stopped then too
    try:
        make_clip(options)
    except LaunchError as error:
        sys.exit(f"\n{error}")
    except KeyboardInterrupt:
        sys.exit("\nStopped.")


def make_clip(options):
    """Run the workflow on a server of our own, with progress; print what to mind, the clip's path and streams."""
    workflow = WORKFLOWS / ("nano_i2v.json" if options.image else "nano_t2v.json")
    if not workflow.is_file():
        raise LaunchError(f"{workflow} is missing. Was it deleted? `git status` tells, `git checkout` brings it back.")
    graph = json.loads(workflow.read_text(encoding="utf-8"))
    values = {"text": options.prompt, "seconds": options.seconds, "seed": options.seed}
    if options.image:
        check_picture(options.image)
        values["image"] = options.image.name
    fill(graph, values)
    line = StatusLine()
    line.show("Starting ComfyUI")
    with Server(os.environ["COMFYUI_PATH"], OUTPUT) as server:
        line.done("ComfyUI is ready")
        if options.image:
            shutil.copy(options.image, server.input)
        line, told = StatusLine(), []
        client = Client(server.url, server.check_alive)
        needed = sorted({node["class_type"] for node in graph.values()})
        if lacking := [name for name in needed if not client.request(f"/object_info/{name}")]:
            raise LaunchError(f"ComfyUI could not load {', '.join(lacking)}. Its log:\n{server.log(100)}")
        try:
            outputs = client.run(
                graph, lambda now: line.show(str(now)), on_notice=lambda node, text: told.extend(text.splitlines()[1:])
            )
        except NodeError as error:
            raise NodeError(f"{error}\nThe last lines of ComfyUI's log:\n{server.log()}") from None
        line.done("Clip is ready")
    for remark in told:
        print(f"Note: {remark}")
    clip = clip_path(outputs, OUTPUT)
    print(clip, *(f"  {stream}" for stream in probe(clip)), sep="\n", flush=True)
    if options.open:
        webbrowser.open(clip.as_uri())


if __name__ == "__main__":
    main()
