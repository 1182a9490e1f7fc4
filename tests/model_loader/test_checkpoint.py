"""Weight files on disk: what opens, and what is said about files that are missing, cut off, unsafe or no such thing."""

import json
import pickle
import struct

import pytest
import torch
from pack.model_loader.checkpoint import Checkpoint, CheckpointError
from safetensors.torch import save_file

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(2)}


class Bomb:
    """A pickled object that leaves a file behind where it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def write_shards(folder, index=True, count=3):
    folder.mkdir(exist_ok=True)
    names = [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for name, key in zip(names, TENSORS, strict=True):
        save_file({key: TENSORS[key]}, folder / name)
    if index:
        weight_map = dict(zip(TENSORS, names, strict=True))
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def assert_whole(checkpoint):
    assert {name: (h.shape, h.dtype) for name, h in checkpoint.headers.items()} == {
        name: (tuple(t.shape), t.dtype) for name, t in TENSORS.items()
    }
    assert all(torch.equal(checkpoint.read(name), tensor) for name, tensor in TENSORS.items())


def test_single_file_and_its_folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors", {"happyhorse.part": "dit"})
    for path in (tmp_path / "model.safetensors", tmp_path):
        checkpoint = Checkpoint.open(path)
        assert_whole(checkpoint)
        assert checkpoint.metadata["happyhorse.part"] == "dit"


@pytest.mark.parametrize("index", [True, False])
def test_shards_by_folder_by_index_and_by_any_shard(tmp_path, index):
    folder = write_shards(tmp_path / "distill", index)
    assert_whole(Checkpoint.open(folder))
    assert_whole(Checkpoint.open(folder / "model-00002-of-00003.safetensors"))
    if index:
        assert_whole(Checkpoint.open(folder / "model.safetensors.index.json"))
    assert Checkpoint.open(folder).label.endswith("/distill")


@pytest.mark.parametrize("content", [TENSORS, {"ema_state_dict": TENSORS, "step": 3}, {"state_dict": TENSORS}])
def test_pickles_of_tensors(tmp_path, content):
    for name, new in (("model.ckpt", True), ("Wan2.2_VAE.pth", True), ("old.pt", False)):
        torch.save(content, tmp_path / name, _use_new_zipfile_serialization=new)
        assert_whole(Checkpoint.open(tmp_path / name))


def test_safetensors_go_before_a_pickle_of_the_same_folder(tmp_path):
    save_file(TENSORS, tmp_path / "model.safetensors")
    (tmp_path / "model.ckpt").write_bytes(b"never read")
    assert_whole(Checkpoint.open(tmp_path))


def test_reading_needs_no_second_copy(tmp_path):
    save_file({"big": torch.zeros(1 << 22), "small": torch.ones(3)}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "m.safetensors")
    address = checkpoint.read("big").data_ptr()
    mapped = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith("m.safetensors")]
    ranges = [[int(end, 16) for end in fields[0].split("-")] for fields in mapped]
    assert any(start <= address < stop for start, stop in ranges)


def refusal(path):
    with pytest.raises(CheckpointError) as caught:
        Checkpoint.open(path)
    return str(caught.value)


def test_missing_and_unknown(tmp_path):
    assert "no such file or folder" in refusal(tmp_path / "nowhere.safetensors")
    (tmp_path / "notes.txt").write_text("?")
    assert "unknown kind of file" in refusal(tmp_path / "notes.txt")
    (tmp_path / "empty").mkdir()
    assert "found 0 (none)" in refusal(tmp_path / "empty")
    for name in ("one", "two"):
        save_file(TENSORS, tmp_path / "empty" / f"{name}.safetensors")
    assert "found 2 (one.safetensors, two.safetensors)" in refusal(tmp_path / "empty")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "0 bytes, too short"),
        (b"<html>404</html>", "too short for its own header"),
        (struct.pack("<Q", 4) + b"{{{{", "unreadable safetensors header"),
        (struct.pack("<Q", 2) + b"[]", "unreadable safetensors header"),
        (struct.pack("<Q", 8) + b'{"a": 1}', "unreadable safetensors header"),
        (struct.pack("<Q", 2) + b"{}", "holds no tensors"),
    ],
)
def test_broken_safetensors(tmp_path, content, message):
    (tmp_path / "m.safetensors").write_bytes(content)
    told = refusal(tmp_path / "m.safetensors")
    assert told.startswith("m.safetensors: ") and message in told and told.endswith("Download it again.")


def test_truncated_safetensors(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors")
    whole = (tmp_path / "m.safetensors").read_bytes()
    (tmp_path / "m.safetensors").write_bytes(whole[:-5])
    assert f"{len(whole) - 5} bytes, but its header describes {len(whole)}" in refusal(tmp_path / "m.safetensors")


def test_incomplete_shards(tmp_path):
    folder = write_shards(tmp_path / "base")
    (folder / "model-00002-of-00003.safetensors").unlink()
    for path in (folder, folder / "model-00001-of-00003.safetensors"):
        assert "1 of 3 shards are missing (first: model-00002-of-00003.safetensors)" in refusal(path)


def test_index_that_promises_too_much(tmp_path):
    folder = write_shards(tmp_path / "base")
    save_file({"b": TENSORS["b"]}, folder / "model-00001-of-00003.safetensors")
    assert "1 tensors of model.safetensors.index.json are in no shard (first: a)" in refusal(folder)


@pytest.mark.parametrize("text", ["{", "[]", '{"weight_map": []}', '{"weight_map": {"a": 1}}', "{}"])
def test_index_that_is_none(tmp_path, text):
    (tmp_path / "model.safetensors.index.json").write_text(text)
    assert "not a shard index" in refusal(tmp_path)


def test_index_that_points_outside(tmp_path):
    save_file(TENSORS, tmp_path / "secret.safetensors")
    folder = write_shards(tmp_path / "base")
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"a": "../secret.safetensors"}}))
    assert "names a shard outside its folder" in refusal(folder)


@pytest.mark.parametrize("wrap", [lambda bomb: {"ema_state_dict": {"a": torch.ones(1), "b": bomb}}, lambda bomb: bomb])
def test_a_pickle_that_runs_code_is_not_opened(tmp_path, wrap):
    trace = tmp_path / "exploded"
    torch.save(wrap(Bomb(trace)), tmp_path / "zip.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(wrap(Bomb(trace)), protocol=2))
    for name in ("zip.ckpt", "plain.ckpt"):
        assert "could run code" in refusal(tmp_path / name)
    assert not trace.exists()


@pytest.mark.parametrize(
    ("content", "message"),
    [(torch.ones(3), "no named tensors"), ({"epoch": 3}, "no named tensors"), (None, "no named tensors")],
)
def test_pickles_without_tensors(tmp_path, content, message):
    torch.save(content, tmp_path / "m.pth")
    assert message in refusal(tmp_path / "m.pth")


def test_broken_pickles(tmp_path):
    torch.save({"a": torch.ones(5000)}, tmp_path / "m.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "m.pth").read_bytes()[:9000])
    assert "cut off, or not a torch checkpoint" in refusal(tmp_path / "cut.pth")
    (tmp_path / "empty.pth").touch()
    assert "the file is empty" in refusal(tmp_path / "empty.pth")
    (tmp_path / "page.pth").write_text("<html>404</html>")
    assert "no torch checkpoint at all" in refusal(tmp_path / "page.pth")
