"""Weight files on disk: every way to name one, and what of it is read into memory."""

import json
import sys

import pytest
import torch
from pack.model_loader.checkpoint import Checkpoint
from safetensors.torch import save_file

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(2)}


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


@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux where a file is mapped")
def test_reading_needs_no_second_copy(tmp_path):
    save_file({"big": torch.zeros(1 << 22), "small": torch.ones(3)}, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "m.safetensors")
    big = checkpoint.read("big")
    mapped = [line.split() for line in open("/proc/self/maps") if line.rstrip().endswith("m.safetensors")]
    ranges = [[int(end, 16) for end in fields[0].split("-")] for fields in mapped]
    assert any(start <= big.data_ptr() < stop for start, stop in ranges)


def test_tensors_of_every_dtype_and_alignment(tmp_path):
    """Written in this order the fp32 tensor lies at an odd address."""
    tensors = {
        "empty": torch.zeros(0, 3),
        "odd": torch.arange(3, dtype=torch.uint8),
        "fp8": torch.arange(5.0).to(torch.float8_e4m3fn),
        "fp32": torch.arange(4.0).view(2, 2),
        "number": torch.tensor(7.0),
    }
    header, content = {}, b""
    for name, tensor in tensors.items():
        raw = tensor.reshape(-1).view(torch.uint8).numpy().tobytes()
        dtype = {torch.uint8: "U8", torch.float8_e4m3fn: "F8_E4M3", torch.float32: "F32"}[tensor.dtype]
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [len(content), len(content + raw)]}
        content += raw
    text = json.dumps(header).encode()
    (tmp_path / "m.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + content)
    checkpoint = Checkpoint.open(tmp_path / "m.safetensors")
    for name, tensor in tensors.items():
        found = checkpoint.read(name)
        assert found.dtype == tensor.dtype and found.shape == tensor.shape
        assert torch.equal(found.float(), tensor.float())


def test_writing_to_a_tensor_leaves_the_file_as_it_is(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors")
    Checkpoint.open(tmp_path / "m.safetensors").read("a").add_(1)
    assert_whole(Checkpoint.open(tmp_path / "m.safetensors"))
