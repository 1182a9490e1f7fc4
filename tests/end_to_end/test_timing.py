"""`run.py speed` on a real server, with nano in the place of the full-size files: what it prints and what it writes."""

import os
import re

import pytest
from pack.benchmarks import pipeline
from pack.benchmarks.pipeline import ROOT


@pytest.fixture(autouse=True)
def as_if_there_were_a_card(monkeypatch):
    if "COMFYUI_PATH" not in os.environ:
        pytest.skip("COMFYUI_PATH is not set; run.py test sets it")
    monkeypatch.setattr(pipeline, "why_not", lambda: None)


def test_words_that_comfyui_does_not_take_are_told_before_gigabytes_are_written(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "write_models", lambda *about: 1 / 0)
    with pytest.raises(SystemExit, match="unrecognized arguments: --sise"):
        pipeline.main(["--sise", "1080p", "--folder", str(tmp_path)])


def test_two_clips_are_timed_node_by_node(graph, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(pipeline, "pipeline", lambda size, seconds: graph("nano_t2v"))
    monkeypatch.setattr(pipeline, "write_models", lambda folder, *about: (folder / "written").touch())
    monkeypatch.setattr(pipeline, "RESULTS", tmp_path)
    pipeline.main(["--size", "256p", "--folder", str(tmp_path / "models"), "--deterministic"])
    (file,) = tmp_path.glob("pipeline-256p-int8-*.md")
    title, _, about, _, head, _, *lines = file.read_text().splitlines()
    assert "ComfyUI 0." in title and about.endswith("random weights, int8, attention default, --deterministic")
    assert str(tmp_path) not in file.read_text()
    assert head.startswith("|  | first run s | again s |")
    seconds = {
        name: (float(first), float(again)) for name, first, again in (row.strip("| ").split(" | ") for row in lines)
    }
    assert list(seconds) == ["opening files", "prompt", "first pass, 256p, 8 steps", "decoding and saving", "all"]
    assert seconds["opening files"][1] == 0 < seconds["opening files"][0]  # only what another clip needs runs again
    assert all(sum(column[:-1]) == pytest.approx(column[-1], abs=0.3) for column in zip(*seconds.values(), strict=True))
    told = capsys.readouterr().out
    assert re.search(r"First run, \d", told) and lines[-1] in told and str(file) in told
    assert (tmp_path / "models" / "written").exists() and not list(ROOT.glob(".random-models-*"))
