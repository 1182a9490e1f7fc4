"""The demo's plumbing on a real ComfyUI with stock nodes alone: start, follow, refuse, interrupt, die, clean up."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pack.launch import ROOT, LaunchError, demo
from pack.launch.client import Client, Interrupted, NodeError, PromptError
from pack.launch.server import Server

GRAPH = {
    "1": {"class_type": "EmptyImage", "inputs": {"width": 64, "height": 64, "batch_size": 25, "color": 255}},
    "2": {"class_type": "EmptyAudio", "inputs": {"duration": 1.0, "sample_rate": 44100, "channels": 2}},
    "3": {"class_type": "CreateVideo", "inputs": {"images": ["1", 0], "fps": 25, "audio": ["2", 0]}},
    "4": {
        "class_type": "SaveVideo",
        "inputs": {"video": ["3", 0], "filename_prefix": "stock", "format": "mp4", "codec": "h264"},
        "_meta": {"title": "Save it"},
    },
}


@pytest.fixture(scope="module")
def comfyui():
    folder = os.environ.get("COMFYUI_PATH")
    return folder or pytest.skip("COMFYUI_PATH is not set; run.py test sets it")


@pytest.fixture(scope="module")
def server(comfyui, tmp_path_factory):
    with Server(comfyui, tmp_path_factory.mktemp("output")) as server:
        yield server
    assert server.process.poll() is not None and not server.base.exists()


def test_workflow_becomes_an_mp4(server):
    seen = []
    outputs = Client(server.url, server.check_alive).run(GRAPH, lambda progress: seen.append(progress.node))
    clip = demo.clip_path(outputs, server.output)
    video, audio = demo.probe(clip)
    assert video == "video: h264, 64x64, 25 fps, 25 frames, 1.00 s"
    assert audio.startswith("audio: aac, 44100 Hz, 2 channels, 1.0")
    assert "Save it" in seen


def test_refused_workflow(server):
    graph = copy.deepcopy(GRAPH)
    graph["1"]["inputs"]["width"] = -5
    with pytest.raises(PromptError, match=r"EmptyImage \[1\]: Value -5 smaller than min of 1 \(width\)"):
        Client(server.url).queue(graph)


def test_failing_node(server):
    graph = {"1": {"class_type": "LoadImage", "inputs": {"image": "broken.png"}}}
    graph["2"] = {"class_type": "PreviewImage", "inputs": {"images": ["1", 0]}}
    (server.input / "broken.png").write_bytes(b"no picture")
    with pytest.raises(NodeError, match="LoadImage failed: .*broken.png"):
        Client(server.url).run(graph)


def test_interrupt_then_the_next_one_works(server):
    graph = copy.deepcopy(GRAPH)
    source = "1"
    for i in range(10, 20):  # ten slow nodes: there is time to stop between the first and the last
        size = {"width": 512 + 32 * (i % 2), "height": 512, "upscale_method": "lanczos", "crop": "disabled"}
        graph[str(i)] = {"class_type": "ImageScale", "inputs": {"image": [source, 0], **size}}
        source = str(i)
    graph["3"]["inputs"]["images"] = [source, 0]
    client = Client(server.url)
    queued = []

    def stop_once_it_runs(progress):
        if progress.node != "Waiting":
            client.interrupt(queued[0])

    with pytest.raises(Interrupted, match="Interrupted in"):
        client.run(graph, stop_once_it_runs, queued.append)
    assert demo.clip_path(client.run(GRAPH), server.output).is_file()


def test_server_that_cannot_start_says_why(comfyui, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONIOENCODING", "ascii")  # as little as a code page of Windows may have
    with pytest.raises(LaunchError, match="exit code 2(.|\n)*unrecognized arguments: --kein-schönes-Wort"):
        Server(comfyui, tmp_path, arguments=["--kein-schönes-Wort"]).__enter__()


WAITS_WITH_A_SERVER = """
import sys, time, as_package
as_package.load_pack()
from pack.launch.server import Server
with Server(sys.argv[1], sys.argv[2]) as server:
    print(server.process.pid, server.base, flush=True)
    time.sleep(600)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows ends a program without telling it")
def test_a_program_that_is_told_to_end_takes_its_server_with_it(comfyui, tmp_path):
    words = [sys.executable, "-c", WAITS_WITH_A_SERVER, comfyui, str(tmp_path / "output")]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as program:
        number, base = program.stdout.readline().split()
        os.kill(int(number), 0)  # it runs
        program.terminate()
        assert "KeyboardInterrupt" in program.communicate(timeout=60)[1]
    with pytest.raises(ProcessLookupError):
        os.kill(int(number), 0)
    assert not Path(base).exists()


def test_server_that_dies_says_why(server):  # the last test of this file: nobody can use the server after it
    server.process.kill()
    how = "exit code 1" if sys.platform == "win32" else "signal SIGKILL"
    with pytest.raises(LaunchError, match=f"{how}.*log"):
        Client(server.url, server.check_alive).run(GRAPH)
