"""The verify command on folders that are right, wrong, strange, empty or missing."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pack.verify.__main__ import main
from pack.verify.case import GOLDEN, Case, checks_of
from safetensors.torch import load, save_file

ROOT = Path(__file__).resolve().parents[2]
GOOD = "sampler_sde"


@pytest.fixture
def folder(tmp_path):
    for suffix in (".json", ".safetensors"):
        shutil.copy(GOLDEN / f"{GOOD}{suffix}", tmp_path)
    return tmp_path


def edit_tensors(folder, change):
    tensors = load((folder / f"{GOOD}.safetensors").read_bytes())  # not mapped: Windows would not let it be written
    change(tensors)
    save_file(tensors, folder / f"{GOOD}.safetensors")


def edit_config(folder, **changes):
    path = folder / f"{GOOD}.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def run(folder, capsys):
    code = main([str(folder)])
    return code, capsys.readouterr().out


def test_a_good_folder_passes_with_a_line_a_tensor(folder, capsys):
    (folder / "README.md").write_text("what the cases are")
    code, out = run(folder, capsys)
    lines = out.splitlines()
    assert code == 0 and lines[-1] == "5 passed, 0 failed"
    assert len({line.rindex("ok") for line in lines if line.endswith("ok")}) == 1
    assert [line.split()[:2] for line in lines[1:-1]] == [[GOOD, f"out.case{n}.prev"] for n in range(5)]


def test_the_command_line_itself(folder):
    command = [sys.executable, str(ROOT / "as_package.py"), "verify"]
    good = subprocess.run([*command, str(folder)], capture_output=True, text=True, cwd=folder)
    assert good.returncode == 0 and "5 passed, 0 failed" in good.stdout, good.stderr
    missing = subprocess.run([*command, str(folder / "nowhere")], capture_output=True, text=True, cwd=folder)
    assert missing.returncode == 2 and "nowhere is not a folder" in missing.stderr


def test_a_corrupted_tensor_fails_and_the_rest_passes(folder, capsys):
    edit_tensors(folder, lambda tensors: tensors["out.case3.prev"].view(-1)[0].add_(1e-3))
    code, out = run(folder, capsys)
    assert code == 1 and "4 passed, 1 failed" in out
    assert [line.split()[1] for line in out.splitlines() if line.endswith("FAIL")] == ["out.case3.prev"]


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_golden_that_is_not_finite_fails(folder, capsys, value):
    edit_tensors(folder, lambda tensors: tensors["out.case0.prev"].view(-1)[0].fill_(value))
    assert run(folder, capsys)[0] == 1


def test_a_missing_input_fails_with_its_name_and_other_cases_still_run(folder, capsys):
    for suffix in (".json", ".safetensors"):
        shutil.copy(GOLDEN / f"sampler_sr_init{suffix}", folder)
    edit_tensors(folder, lambda tensors: tensors.pop("in.noise2"))
    code, out = run(folder, capsys)
    assert code == 1 and "has no tensor in.noise2" in out
    assert out.count("no check covers this tensor") == 3
    assert out.count("sampler_sr_init") == 3 == sum(" ok" in line for line in out.splitlines() if "sr_init" in line)


def test_an_output_that_nobody_checks_fails(folder, capsys):
    edit_tensors(folder, lambda tensors: tensors.update({"out.unheard_of": torch.ones(2)}))
    code, out = run(folder, capsys)
    assert code == 1 and "out.unheard_of" in out and "no check covers this tensor" in out


def test_an_output_that_only_the_json_lists_fails(folder, capsys):
    edit_config(folder, cases_idx_theta=[[0, 1.0], [0, 0.0], [1, 1.0], [3, 0.5]])
    edit_tensors(folder, lambda tensors: tensors.pop("out.case4.prev"))
    code, out = run(folder, capsys)
    assert code == 1 and "out.case4.prev" in out


def test_another_shape_fails_with_both_shapes(folder, capsys):
    edit_tensors(folder, lambda tensors: tensors.update({"out.case0.prev": torch.ones(1, 8)}))
    code, out = run(folder, capsys)
    assert code == 1 and "shape [1, 8, 2, 3, 4], expected [1, 8]" in out


@pytest.mark.parametrize("name", ["notes.txt", "weights.pt", "alone.safetensors", "deeper"])
def test_an_unknown_file_fails(folder, capsys, name):
    if name == "deeper":
        (folder / name).mkdir()
    elif name.endswith(".safetensors"):
        save_file({"out.a": torch.ones(1)}, folder / name)
    else:
        (folder / name).write_text("?")
    code, out = run(folder, capsys)
    assert code == 1 and name.split(".")[0] in out and "5 passed, 1 failed" in out


def test_an_unknown_kind_fails_and_the_known_ones_are_named(folder, capsys):
    edit_config(folder, kind="telepathy")
    code, out = run(folder, capsys)
    assert code == 1 and "unknown kind 'telepathy'" in out and "sampler_sde" in out


@pytest.mark.parametrize("text", ["{", "[1]", "{}", '{"kind": null}', '{"kind": ["dit"]}'])
def test_a_json_that_is_no_case_fails(folder, capsys, text):
    (folder / f"{GOOD}.json").write_text(text)
    code, out = run(folder, capsys)
    assert code == 1 and "0 passed, 1 failed" in out


def test_a_truncated_tensor_file_fails(folder, capsys):
    path = folder / f"{GOOD}.safetensors"
    path.write_bytes(path.read_bytes()[:-100])
    code, out = run(folder, capsys)
    assert code == 1 and "not readable as safetensors" in out


def test_a_json_without_tensors_fails(folder, capsys):
    (folder / f"{GOOD}.safetensors").unlink()
    code, out = run(folder, capsys)
    assert code == 1 and "is missing beside it" in out


def test_an_empty_folder_is_not_a_pass(tmp_path, capsys):
    assert run(tmp_path, capsys)[0] == 1


def test_weights_are_found_in_the_folder_and_missing_ones_are_named(folder):
    edit_config(folder, weights="toy_weights")
    case = Case.read(folder / f"{GOOD}.json")
    with pytest.raises(ValueError, match="weights toy_weights.safetensors are neither in .* nor in .*golden"):
        case.weights()
    save_file({"a": torch.ones(3)}, folder / "toy_weights.safetensors")
    (folder / "toy_weights.json").write_text('{"kind": "dit_weights"}')
    assert torch.equal(case.weights()["a"], torch.ones(3))


def test_numbered_tensors_keep_their_order():
    tensors = {f"noise.{number:02d}": torch.full((1,), float(number)) for number in reversed(range(120))}
    found = Case("long", {"kind": "sampler_latent"}, tensors, ".").under("noise.")
    assert [tensor.item() for tensor in found.values()] == list(range(120))


def test_relative_rms_decides_where_it_is_asked_for(folder):
    case = Case.read(folder / f"{GOOD}.json")
    golden = case["out.case0.prev"]
    near, far = case.check_rms("out.case0.prev", golden * 1.01), case.check_rms("out.case0.prev", golden * 1.03)
    assert near.ok and near.relative_rms == pytest.approx(0.01, rel=1e-3) and near.max_abs_error > 0.02
    assert not far.ok


def test_a_case_that_compares_nothing_fails():
    case = Case("empty", {"kind": "nothing"}, {}, ".")
    (check,) = checks_of(case, {"nothing": lambda case: iter(())})
    assert not check.ok and "nothing to compare" in check.message
