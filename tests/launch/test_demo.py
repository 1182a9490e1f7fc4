"""The demo fills any version of its workflow, and its doors say what is wrong before they do anything."""

import copy
import os
import subprocess
import sys
from pathlib import Path

import pytest
from pack.launch import ROOT, LaunchError, demo

GRAPH = {
    "a": {"class_type": "HappyHorseEncodePrompt", "inputs": {"text": "old", "clip": ["x", 1]}},
    "b": {"class_type": "HappyHorseSampler", "inputs": {"seed": 0, "model": ["x", 0]}},
    "c": {"class_type": "HappyHorseFirstImage", "inputs": {"image": ["d", 0]}},
    "d": {"class_type": "LoadImage", "inputs": {"image": "old.png"}},
}


def test_fill_finds_inputs_by_name_and_leaves_links_alone():
    filled = demo.fill(copy.deepcopy(GRAPH), {"text": "new", "seed": 5, "image": "new.png"})
    assert filled["a"]["inputs"] == {"text": "new", "clip": ["x", 1]}
    assert filled["b"]["inputs"]["seed"] == 5
    assert filled["c"]["inputs"]["image"] == ["d", 0]
    assert filled["d"]["inputs"]["image"] == "new.png"


def test_fill_names_the_input_that_the_workflow_lacks():
    with pytest.raises(LaunchError, match="`seconds`"):
        demo.fill(copy.deepcopy(GRAPH), {"seconds": 2.0})


@pytest.mark.parametrize("name, image", [("nano_t2v", False), ("nano_i2v", True)])
def test_own_workflows_have_every_input_of_the_demo(name, image):
    import json

    graph = json.loads((demo.WORKFLOWS / f"{name}.json").read_text(encoding="utf-8"))
    values = {"text": "A cube", "seconds": 1.0, "seed": 3} | ({"image": "first.png"} if image else {})
    filled = demo.fill(graph, values)
    for key, value in values.items():
        assert value in [node["inputs"].get(key) for node in filled.values()]


def test_a_file_that_is_no_picture_is_told(tmp_path):
    broken = tmp_path / "broken.png"
    broken.write_text("nonsense")
    with pytest.raises(LaunchError, match="broken.png: not a readable picture"):
        demo.check_picture(broken)
    with pytest.raises(LaunchError, match="gone.png: no such picture"):
        demo.check_picture(tmp_path / "gone.png")
    demo.check_picture(ROOT / "workflows" / "input" / "happyhorse_nano_face.png")


@pytest.mark.parametrize("text", ["40", "0", "-1", "nan"])
def test_impossible_lengths_are_refused_before_a_server_starts(text, capsys):
    with pytest.raises(SystemExit):
        demo.parser().parse_args(["--seconds", text])
    assert "expected 0.2 to 15" in capsys.readouterr().err


def test_clip_path_wants_an_mp4():
    outputs = {"1": {"text": ["note"]}, "2": {"images": [{"filename": "a_1.mp4", "subfolder": "x", "type": "output"}]}}
    assert demo.clip_path(outputs, Path("out")) == Path("out/x/a_1.mp4")
    with pytest.raises(LaunchError, match="without an mp4"):
        demo.clip_path({"1": {"images": [{"filename": "a.png", "subfolder": ""}]}}, Path("out"))


def run_py(*words, **variables):
    command = [sys.executable, ROOT / "run.py", *words]
    return subprocess.run(command, capture_output=True, text=True, env={**os.environ, **variables}, timeout=60)


@pytest.mark.parametrize("command", ["demo", "comfyui", "test", "verify", "train", "evaluate", "bench"])
def test_every_command_explains_itself(command):
    result = run_py(command, "--help")
    assert result.returncode == 0 and f"run.py {command}" in result.stdout
    assert f"run.py {command}" in run_py("--help").stdout or command in run_py("--help").stdout


@pytest.mark.parametrize(
    "words, message",
    [
        (("dmeo",), "no command `dmeo`"),
        (("demo", "--second", "x"), "invalid seconds value"),
        (("demo", "one", "two"), "unrecognized arguments"),
        (("verify",), "needs a folder"),
        (("train", "nobody"), "needs the name of a part"),
    ],
)
def test_mistakes_are_told_before_anything_is_set_up(words, message):
    result = run_py(*words)
    assert result.returncode != 0 and message in result.stderr


def test_wrong_comfyui_path_is_told(tmp_path):
    result = run_py("test", COMFYUI_PATH=str(tmp_path))
    assert result.returncode == 1 and "is no ComfyUI folder" in result.stderr
