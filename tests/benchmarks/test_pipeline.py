"""What `run.py speed` measures with: model files of random numbers, the pipeline's graph, seconds of every node."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from pack.benchmarks import model_files, pipeline
from pack.benchmarks.model_files import RandomWriter, headers_of, write_models
from pack.launch.client import Progress
from pack.model_loader.checkpoint import Checkpoint
from pack.model_loader.layouts import as_published
from safetensors.torch import save_file

LINEAR = "block.layers.0.mlp.down_proj.weight"
COMPONENT = {
    "state_dict": {
        LINEAR: [[48, 64], "bfloat16"],
        "block.layers.0.mlp.pre_norm.weight": [[64], "float32"],
        "decoder.0.weight_g": [[8, 1, 1], "float32"],
        "decoder.0.weight_v": [[8, 4, 4], "float32"],
    }
}


@pytest.fixture
def small(monkeypatch, tmp_path):
    """Let every file be of the small component above; return a function that writes them and returns one's path."""
    manifest = {"components": dict.fromkeys({part for _, part in model_files.FILES.values()}, COMPONENT)}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr(model_files, "MANIFEST", tmp_path / "manifest.json")
    monkeypatch.setattr(model_files, "VALUES", 1000)  # fewer than a weight has, so that it takes several pieces

    def write(precision):
        write_models(tmp_path, precision, RandomWriter, ["distill", "t5gemma"])
        return tmp_path / "diffusion_models" / "distill.safetensors"

    return write


@pytest.mark.parametrize("precision", ["bf16", "int8", "fp8"])
def test_random_files_keep_the_size_of_what_passes_a_layer(small, precision):
    checkpoint = as_published(Checkpoint.open(small(precision)))
    weight = checkpoint.read(LINEAR).float()
    assert weight.isfinite().all() and weight.std() == pytest.approx(1 / 8, rel=0.1) and weight[:, 0].std() > 0
    assert torch.equal(checkpoint.read("decoder.0.weight_g"), torch.ones(8, 1, 1))
    assert checkpoint.read("decoder.0.weight_v").std() == pytest.approx(1 / 4, rel=0.3)
    assert not checkpoint.read("block.layers.0.mlp.pre_norm.weight").any()  # 1 + w
    stored = headers_of(COMPONENT, precision)[0][LINEAR].dtype
    assert Checkpoint.open(small(precision)).headers[LINEAR].dtype == stored
    assert (small(precision).parent.parent / "text_encoders" / "tokenizer.json").is_file()


def test_files_of_another_time_are_used_again(small):
    path = small("int8")
    written = path.stat().st_mtime_ns
    assert small("int8").stat().st_mtime_ns == written
    assert small("bf16").stat().st_mtime_ns > written  # of another size


@pytest.mark.parametrize(
    ("name", "theirs"),
    [("t5gemma.safetensors", b"half a download"), ("t5gemma.safetensors", None), ("tokenizer.json", b"{}")],
    ids=["unreadable", "a model", "a tokenizer"],
)
def test_files_of_somebody_else_are_never_written_over(small, tmp_path, name, theirs):
    path = tmp_path / "text_encoders" / name
    path.parent.mkdir()
    path.write_bytes(theirs) if theirs else save_file({"weight": torch.ones(3)}, path)
    before = path.read_bytes()
    with pytest.raises(ValueError, match=rf"{name}: is no file of random numbers and stays as it is"):
        small("int8")
    assert path.read_bytes() == before and not (tmp_path / "diffusion_models" / "distill.safetensors").exists()


def test_a_full_disk_is_told_before_anything_is_written(small, monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: SimpleNamespace(free=100))
    with pytest.raises(ValueError, match=r"needs 0\.0 GB, its disk has 0\.0 GB free. Make room, or name a folder"):
        small("int8")
    assert not (tmp_path / "diffusion_models" / "distill.safetensors").exists()


def test_the_graph_is_what_was_asked_for():
    plain = pipeline.hurried(pipeline.pipeline("1080p", 3.0), "int8")
    assert plain["9"]["inputs"]["model"] == "1080p_sr.safetensors" and plain["3"]["inputs"]["seconds"] == 3.0
    assert plain["1"]["inputs"]["weight_dtype"] == plain["9"]["inputs"]["weight_dtype"] == "int8"
    assert not [node for node in plain.values() if node["class_type"] == "HappyHorseSpeed"]
    asked, whole = (graph["2"]["inputs"]["text"] for graph in (plain, pipeline.pipeline("1080p", 3.0)))
    assert whole.startswith(asked) and 0.4 < len(asked) / len(whole) < 0.6  # nano's tokenizer cuts words smaller
    fast = pipeline.hurried(pipeline.pipeline("540p", 5.0), "fp8_e4m3fn_fast", "fp8", compiled=True)
    for sampler, loader in (("4", "1"), ("10", "9")):
        speed = fast[fast[sampler]["inputs"]["model"][0]]
        assert speed["class_type"] == "HappyHorseSpeed" and speed["inputs"]["model"] == [loader, 0]
        assert speed["inputs"]["attention"] == "fp8" and speed["inputs"]["compile"] is True
    again = pipeline.another_clip(fast)
    assert again["4"]["inputs"]["seed"] != fast["4"]["inputs"]["seed"] and again["2"] != fast["2"]
    assert again["1"] == fast["1"] and again["9"] == fast["9"] and again["40"] == fast["40"]


def test_mistakes_are_told_at_once(capsys):
    for words in (["--seconds", "16"], ["--seconds", "five"], ["--attention", "fast"], ["--weight-dtype", "fp4"]):
        with pytest.raises(SystemExit):
            pipeline.parser().parse_args(words)
        assert words[0] in capsys.readouterr().err


def test_seconds_belong_to_the_node_that_ran(monkeypatch):
    clock = iter([0.0, 1.0, 3.0, 10.0, 14.0])
    monkeypatch.setattr(pipeline.time, "monotonic", lambda: next(clock))
    seen = [Progress("Waiting"), Progress("HappyHorseLoadCheckpoint"), Progress("HappyHorseSampler")]
    seen += [Progress("HappyHorseSampler", 1, 8), Progress("HappyHorseSaveVideo")]

    def run(graph, on_progress, on_notice):
        for progress in seen:
            on_progress(progress)

    seconds = pipeline.timed(SimpleNamespace(run=run), {})
    assert seconds == {
        "Waiting": 1.0,
        "HappyHorseLoadCheckpoint": 2.0,
        "HappyHorseSampler": 7.0,
        "HappyHorseSaveVideo": 4.0,
    }
    again = {"Waiting": 0.5, "HappyHorseSampler": 6.0, "HappyHorseSaveVideo": 3.0}
    lines = list(pipeline.rows("1080p", [seconds, again]))
    assert lines[2:] == [
        "| opening files | 2.0 | 0.0 |",
        "| first pass, 256p, 8 steps | 7.0 | 6.0 |",
        "| decoding and saving | 4.0 | 3.0 |",
        "| all | 14.0 | 9.5 |",
    ]


def test_a_computer_without_a_card_is_told_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr(pipeline, "uses_card", lambda packages: False)
    monkeypatch.setattr(pipeline.sys, "platform", "linux")
    with pytest.raises(SystemExit, match="no graphics card here.*run.py bench --cpu"):
        pipeline.main(["--folder", str(tmp_path / "models")])
    assert not (tmp_path / "models").exists()
