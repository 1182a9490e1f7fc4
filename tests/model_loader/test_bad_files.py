"""Files that are not what they should be: each is refused with its name, the tensor, and what to do."""

import json
import pickle
import struct

import pytest
import torch
from pack.model_loader.checkpoint import Checkpoint, CheckpointError
from pack.model_loader.load import load_dit, load_text_encoder, load_video_vae, published_tensors
from safetensors.torch import save, save_file

TENSORS = {"a": torch.arange(6.0).view(2, 3), "b": torch.ones(4, dtype=torch.bfloat16), "c": torch.zeros(2)}
WHOLE = save(TENSORS)


class Bomb:
    """A pickled object that leaves a file behind where it is loaded without care."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def header(**tensors):
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def torch_file(folder, content):
    torch.save(content, folder / "written")
    return (folder / "written").read_bytes()


def index(weight_map):
    return json.dumps({"weight_map": weight_map}).encode()


def refusal(load, path, **options):
    with pytest.raises(CheckpointError) as caught:
        load(path, **options)
    return str(caught.value)


FOUR_BYTES = {"dtype": "F32", "shape": [2], "data_offsets": [0, 4]}
NEW_DTYPE = {"dtype": "F4", "shape": [2], "data_offsets": [0, 1]}
FIRST, SECOND = (f"model-0000{i}-of-00002.safetensors" for i in (1, 2))
FAULTS = {  # what is wrong -> {name: content}, the path that is opened, what the message must say
    "empty": ({"m.safetensors": b""}, "m.safetensors", "0 bytes, too short.*Download it again"),
    "empty pickle": ({"m.ckpt": b""}, "m.ckpt", "the file is empty.*Download it again"),
    "empty folder": ({"weights/readme": b""}, "weights", r"found 0 files \(none\)"),
    "no such file": ({}, "m.safetensors", "no such file or folder"),
    "unknown kind": ({"m.txt": b"?"}, "m.txt", "unknown kind of file"),
    "two files": ({"w/a.safetensors": WHOLE, "w/b.safetensors": WHOLE}, "w", r"found 2 files \(a.safetensors, b"),
    "truncated": ({"m.safetensors": WHOLE[:-9]}, "m.safetensors", "cut off in [bc]. Download it again"),
    "truncated in its header": ({"m.safetensors": WHOLE[:40]}, "m.safetensors", "too short for its own header"),
    "too long": ({"m.safetensors": WHOLE + b"0"}, "m.safetensors", "something follows its last tensor, [abc]"),
    "no header": ({"m.safetensors": struct.pack("<Q", 4) + b"{{{{"}, "m.safetensors", "unreadable safetensors header"),
    "a list": ({"m.safetensors": struct.pack("<Q", 2) + b"[]"}, "m.safetensors", "unreadable safetensors header"),
    "no tensors": ({"m.safetensors": struct.pack("<Q", 2) + b"{}"}, "m.safetensors", "holds no tensors"),
    "wrong length": ({"m.safetensors": header(x=FOUR_BYTES) + b"0000"}, "m.safetensors", "last tensor: x; .*4 bytes"),
    "unknown dtype": ({"m.safetensors": header(x=NEW_DTYPE) + b"0"}, "m.safetensors", "last tensor: x; .*F4"),
    "a web page": ({"m.safetensors": b"<!doctype html>"}, "m.safetensors", "is a web page.*Download the file itself"),
    "a Git LFS pointer": (
        {"m.safetensors": b"version https://git-lfs.github.com/spec/v1"}, "m.safetensors", "LFS pointer.*git lfs pull",
    ),
    "GGUF renamed": ({"m.safetensors": b"GGUF\3\0\0\0" + bytes(90)}, "m.safetensors", "a GGUF file.*to .gguf"),
    "safetensors renamed": ({"m.ckpt": WHOLE}, "m.ckpt", "a safetensors file.*Rename it to .safetensors"),
    "index of nothing": ({"w/model.safetensors.index.json": b"{}"}, "w", "w/model.safetensors.index.json: not a shard"),
    "index of lists": ({"model.safetensors.index.json": index([])}, "model.safetensors.index.json", "not a shard"),
    "index that escapes": (
        {"w/model.safetensors.index.json": index({"a": "../secret.safetensors"}), "secret.safetensors": WHOLE},
        "w", r"index.json: places a outside its folder \(../secret.safetensors\)",
    ),
    "index that promises": (
        {f"w/{FIRST}": WHOLE, "w/model.safetensors.index.json": index({"z": FIRST})},
        "w", f"first: z, expected in {FIRST}",
    ),
    "shard missing": ({f"w/{FIRST}": WHOLE}, "w", rf"w: 1 of 2 shards are missing \(first: {SECOND}\). Download"),
    "shard cut off": ({f"w/{FIRST}": WHOLE, f"w/{SECOND}": save({"d": TENSORS["c"]})[:-1]}, "w", f"w/{SECOND}: .*in d"),
    "tensor twice": ({f"w/{FIRST}": WHOLE, f"w/{SECOND}": WHOLE}, "w", f"w/{SECOND}: [abc] is in {FIRST} too"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_bad_file_is_named_with_its_tensor(tmp_path, fault):
    files, opened, told = FAULTS[fault]
    for name, content in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=told) as caught:
        Checkpoint.open(tmp_path / opened)
    assert opened.rpartition("/")[2] in str(caught.value)


@pytest.mark.parametrize("wrap", [lambda bomb: {"ema_state_dict": {"a": torch.ones(1), "b": bomb}}, lambda bomb: bomb])
def test_a_pickle_that_runs_code_is_not_opened(tmp_path, wrap):
    trace = tmp_path / "exploded"
    (tmp_path / "zip.ckpt").write_bytes(torch_file(tmp_path, wrap(Bomb(trace))))
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(wrap(Bomb(trace)), protocol=2))
    for name in ("zip.ckpt", "plain.ckpt"):
        told = refusal(Checkpoint.open, tmp_path / name)
        assert f"{name}: holds more than plain tensors (" in told and "could run code" in told
        assert "Use a .safetensors file" in told
    assert "io.open" in refusal(Checkpoint.open, tmp_path / "zip.ckpt")
    assert not trace.exists()


@pytest.mark.parametrize("content", [torch.ones(3), {"epoch": 3}, None])
def test_pickles_without_tensors(tmp_path, content):
    torch.save(content, tmp_path / "m.pth")
    assert "m.pth: holds no named tensors" in refusal(Checkpoint.open, tmp_path / "m.pth")


def test_pickles_that_are_cut_off_or_in_disguise(tmp_path):
    whole = torch_file(tmp_path, {"a": torch.ones(5000)})
    (tmp_path / "m.pth").write_bytes(whole[:9000])
    assert "m.pth: cut off, or not a torch checkpoint" in refusal(Checkpoint.open, tmp_path / "m.pth")
    (tmp_path / "m.safetensors").write_bytes(whole)
    assert "is a torch checkpoint, whatever its name says. Rename it to .ckpt" in refusal(
        Checkpoint.open, tmp_path / "m.safetensors"
    )


def test_a_file_that_shrinks_after_it_was_opened(tmp_path):
    save_file(TENSORS, tmp_path / "m.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "m.safetensors")
    (tmp_path / "m.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="m.safetensors: a cannot be read any more"):
        checkpoint.read("a")


WAN21 = {"decoder.middle.0.residual.0.gamma": torch.ones(4, 1, 1, 1), "encoder.conv1.weight": torch.ones(4, 3, 3, 3, 3)}
LLM = {"model.layers.0.self_attn.q_proj.weight": torch.ones(4, 4)}


@pytest.mark.parametrize(
    ("load", "tensors", "told"),
    [
        (load_dit, LLM, r"not a part of this model \(first tensor: model.layers.0.self_attn.q_proj.weight\)"),
        (load_dit, WAN21, "looks like a wan_vae file, but its size cannot be read"),
        (load_video_vae, WAN21, "looks like a wan_vae file, but its size cannot be read"),
        (load_text_encoder, {"encoder.embed_tokens.weight": torch.ones(4, 4)}, "not a part of this model"),
    ],
)
def test_another_model_is_named(tmp_path, load, tensors, told):
    save_file(tensors, tmp_path / "m.safetensors")
    with pytest.raises(CheckpointError, match=rf"/m.safetensors: {told}"):
        load(tmp_path / "m.safetensors")


def test_renamed_tensors_are_missing_under_their_own_names(tmp_path, dit):
    tensors = published_tensors("dit", dit.state_dict(), dit.config)
    tensors["block.layers.2.attention.to_out.weight"] = tensors.pop("block.layers.2.attention.linear_proj.weight")
    save_file(tensors, tmp_path / "distill.safetensors")
    told = refusal(load_dit, tmp_path / "distill.safetensors")
    assert "distill.safetensors: 1 tensors missing (first: block.layers.2.attention.linear_proj.weight)" in told
