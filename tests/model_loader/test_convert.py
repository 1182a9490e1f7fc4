"""Conversion: every layout becomes one published file that loads the same, written piece by piece and whole or not."""

import json
import shutil
import weakref
from collections import namedtuple
from types import SimpleNamespace

import pytest
import torch
from layouts_on_disk import is_linear, split
from pack.model_loader import convert as module
from pack.model_loader.checkpoint import Checkpoint, CheckpointError, TensorHeader
from pack.model_loader.convert import convert
from pack.model_loader.layouts import as_published
from pack.model_loader.load import load_dit, load_text_encoder, load_video_vae, published_tensors, save_part
from pack.model_loader.safetensors_writer import SafetensorsWriter
from safetensors import safe_open
from safetensors.torch import load_file, save_file

SIZES = SimpleNamespace(
    hidden_size=64, head_dim=16, num_query_groups=2, expert_layers=(0, 3)
)  # of the tiny transformer


def published(network):
    return published_tensors("dit", network.state_dict(), network.config)


def write_sharded(tensors, path):
    path = path / "distill"
    path.mkdir()
    names, weight_map = list(tensors), {}
    for i in range(3):
        file = f"model-{i + 1:05}-of-00003.safetensors"
        save_file({name: tensors[name] for name in names[i::3]}, path / file)
        weight_map |= dict.fromkeys(names[i::3], file)
    (path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return path


def write_split(tensors, path):
    save_file(split(tensors, SIZES), path / "magi_human_distill.safetensors")
    return path / "magi_human_distill.safetensors"


def write_scaled(tensors, path):
    result = dict(tensors)
    for name in filter(is_linear, tensors):
        scale = tensors[name].abs().max() / 300
        result[name] = (tensors[name] / scale).to(torch.float8_e4m3fn)
        result[f"{name}.__fp8_scale"] = scale
    save_file(result, path / "distill_fp8.safetensors")
    return path / "distill_fp8.safetensors"


def write_pickle(tensors, path):
    torch.save({"state_dict": {f"model.{name}": tensor for name, tensor in tensors.items()}}, path / "distill.pt")
    return path / "distill.pt"


WRITERS = [write_sharded, write_split, write_scaled, write_pickle]


def assert_same(found, wanted):
    found, wanted = found.state_dict(), wanted.state_dict()
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def assert_within_half_a_step(stored, scale, meant):
    """e4m3fn has 3 bits after the leading one, and steps of 2^-9 below 2^-6."""
    step = torch.exp2((meant.abs() / scale).log2().floor().clamp_min(-6) - 3) * scale
    error = (stored.float() * scale - meant).abs()
    assert (error <= step / 2 * (1 + 1e-5)).all()
    assert stored.float().abs().max() == 448


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_bf16_loads_as_the_source_does(tmp_path, dit, write):
    source, target = write(published(dit), tmp_path), tmp_path / "new.safetensors"
    size = convert(source, target, "bf16")
    assert size == target.stat().st_size and not target.with_name("new.safetensors.part").exists()
    assert_same(load_dit(target), load_dit(source))
    assert load_file(target).keys() == published(dit).keys()
    metadata = Checkpoint.open(target).metadata
    assert metadata["happyhorse.variant"] == "distill" and json.loads(metadata["happyhorse.config"])
    assert metadata["happyhorse.source_headers_sha256"] == module.headers_sha256(Checkpoint.open(source))


@pytest.mark.parametrize("write", WRITERS, ids=lambda write: write.__name__)
def test_fp8_is_within_half_a_step_and_the_rest_is_exact(tmp_path, dit, write):
    source, target = write(published(dit), tmp_path), tmp_path / "new.safetensors"
    convert(source, target, "fp8")
    meant, stored = published(load_dit(source, dtype=torch.float32)), load_file(target)
    linears = [name.removesuffix(".weight") for name in meant if is_linear(name)]
    assert stored.keys() == meant.keys() | {f"{layer}.weight_scale" for layer in linears}
    for name, tensor in meant.items():
        if is_linear(name):
            scale = stored[f"{name}_scale"]
            assert stored[name].dtype == torch.float8_e4m3fn and scale.dtype == torch.float32 and scale.shape == ()
            assert_within_half_a_step(stored[name], scale, tensor)
        else:
            assert stored[name].dtype == torch.float32 and torch.equal(stored[name], tensor), name
    quantised = json.loads(Checkpoint.open(target).metadata["_quantization_metadata"])
    assert quantised["layers"] == {layer: {"format": "float8_e4m3fn"} for layer in linears}
    loaded = published(load_dit(target, dtype=torch.float32))
    assert all(
        torch.equal(loaded[f"{n}.weight"], stored[f"{n}.weight"].float() * stored[f"{n}.weight_scale"]) for n in linears
    )


def test_int8_has_a_scale_a_row_and_is_within_half_a_step(tmp_path, dit):
    source, target = write_sharded(published(dit), tmp_path), tmp_path / "new.safetensors"
    convert(source, target, "int8")
    meant, stored = published(load_dit(source, dtype=torch.float32)), load_file(target)
    loaded = published(load_dit(target, dtype=torch.float32))
    linears = [name for name in meant if is_linear(name)]
    assert stored.keys() == meant.keys() | {f"{name}_scale" for name in linears}
    for name, tensor in meant.items():
        if name in linears:
            values, scale = stored[name], stored[f"{name}_scale"]
            assert values.dtype == torch.int8 and scale.dtype == torch.float32 and scale.shape == (len(values), 1)
            assert ((values * scale - tensor).abs() <= scale * 0.5001).all()
            assert (values.abs().amax(1) == 127).all()
            assert torch.equal(loaded[name], values * scale)
        else:
            assert stored[name].dtype == torch.float32 and torch.equal(stored[name], tensor), name
    quantised = json.loads(Checkpoint.open(target).metadata["_quantization_metadata"])
    assert quantised["layers"] == {name.removesuffix(".weight"): {"format": "int8_tensorwise"} for name in linears}


def test_the_variant_reaches_the_file(tmp_path, sr_dit):
    save_file(published(sr_dit), tmp_path / "merge.safetensors")
    with pytest.raises(CheckpointError, match="neither metadata nor name tells the variant"):
        convert(tmp_path / "merge.safetensors", tmp_path / "new.safetensors", "bf16")
    convert(tmp_path / "merge.safetensors", tmp_path / "new.safetensors", "bf16", variant="1080p_sr")
    convert(tmp_path / "new.safetensors", tmp_path / "again.safetensors", "fp8")
    convert(tmp_path / "again.safetensors", tmp_path / "third.safetensors", "fp8")
    config = load_dit(tmp_path / "third.safetensors").config
    assert config.positions == "v1" and config.local_attention_layers
    second, third = (load_file(tmp_path / f"{name}.safetensors") for name in ("again", "third"))
    assert all(torch.equal(second[name].float(), third[name].float()) for name in second if "scale" not in name)


def test_text_encoder_with_its_tokenizer(tmp_path, text_encoder):
    save_part(tmp_path / "t5gemma.safetensors", text_encoder, "text_encoder", text_encoder.config, "text_encoder")
    words = '{"model": {"type": "WordLevel", "vocab": {"中": 0}, "unk_token": "中"}}'
    (tmp_path / "tokenizer.json").write_text(words, encoding="utf-8")
    for dtype in ("bf16", "fp8"):
        (tmp_path / dtype).mkdir()
        convert(tmp_path / "t5gemma.safetensors", tmp_path / dtype / "new.safetensors", dtype)
        assert Checkpoint.open(tmp_path / dtype / "new.safetensors").metadata["happyhorse.tokenizer"] == words
    native = load_text_encoder(tmp_path / "t5gemma.safetensors")
    assert_same(load_text_encoder(tmp_path / "bf16" / "new.safetensors"), native)
    stored = load_file(tmp_path / "fp8" / "new.safetensors")
    for name, meant in text_encoder.state_dict().items():
        name = f"model.encoder.{name}"
        if "proj" in name:
            assert_within_half_a_step(stored[name], stored[f"{name}_scale"], meant)
        else:
            assert stored[name].dtype == (torch.bfloat16 if "embed" in name else torch.float32)
            assert torch.equal(stored[name], meant.to(stored[name].dtype)) and f"{name}_scale" not in stored
    load_text_encoder(tmp_path / "fp8" / "new.safetensors")


def test_a_layer_of_zeros_and_pieces_that_do_not_divide(tmp_path, dit, monkeypatch):
    monkeypatch.setattr(module, "PIECE", 1000)
    monkeypatch.setattr(module, "REOPEN", 0)
    with torch.no_grad():
        dit.block.layers[1].mlp.down_proj.weight.zero_()
    source = write_sharded(published(dit), tmp_path)
    convert(source, tmp_path / "bf16.safetensors", "bf16")
    convert(source, tmp_path / "fp8.safetensors", "fp8")
    assert_same(load_dit(tmp_path / "bf16.safetensors"), load_dit(source))
    assert not load_dit(tmp_path / "fp8.safetensors").block.layers[1].mlp.down_proj.weight.any()


@pytest.mark.parametrize("write", [write_sharded, write_split, write_scaled], ids=lambda write: write.__name__)
def test_one_tensor_and_one_set_of_open_files_at_a_time(tmp_path, dit, monkeypatch, write):
    source = write(published(dit), tmp_path)
    opened, tensors, open_now = weakref.WeakSet(), weakref.WeakSet(), Checkpoint.open

    class Watched(Checkpoint):
        @classmethod
        def open(cls, path):
            checkpoint = open_now(path)
            opened.add(checkpoint)
            return checkpoint

    def watched(checkpoint):
        seen = as_published(checkpoint)

        def read(name):
            assert len(opened) == 1 and not tensors
            tensor = seen.read(name)
            tensors.add(tensor)
            return tensor

        return Checkpoint(seen.path, seen.headers, seen.metadata, read)

    monkeypatch.setattr(module, "Checkpoint", Watched)
    monkeypatch.setattr(module, "as_published", watched)
    monkeypatch.setattr(module, "REOPEN", 0)
    convert(source, tmp_path / "new.safetensors", "fp8")


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("name", ["block.layers.2.mlp.down_proj.weight", "final_norm_video.weight"])
def test_values_that_are_not_finite_are_refused_by_name(tmp_path, dit, name, value):
    tensors = published(dit)
    tensors[name].view(-1)[-1] = value
    save_file(tensors, tmp_path / "distill.safetensors")
    with pytest.raises(CheckpointError, match=rf"distill\.safetensors: {name} holds NaN or infinite"):
        convert(tmp_path / "distill.safetensors", tmp_path / "new.safetensors", "fp8")
    assert [file.name for file in tmp_path.iterdir()] == ["distill.safetensors"]


def test_a_run_that_breaks_off_leaves_nothing_and_the_old_file(tmp_path, dit, monkeypatch):
    source, target = write_sharded(published(dit), tmp_path), tmp_path / "new.safetensors"
    target.write_bytes(b"old")
    written = []

    def interrupted(writer, name, piece, write=SafetensorsWriter.write):
        written.append(name)
        if len(written) == 9:
            raise KeyboardInterrupt
        write(writer, name, piece)

    monkeypatch.setattr(SafetensorsWriter, "write", interrupted)
    with pytest.raises(KeyboardInterrupt):
        convert(source, target, "fp8", force=True)
    assert target.read_bytes() == b"old" and sorted(p.name for p in tmp_path.iterdir()) == ["distill", target.name]


def test_what_a_killed_run_leaves_is_no_file_and_no_obstacle(tmp_path):
    path, part = tmp_path / "new.safetensors", tmp_path / "new.safetensors.part"
    writer = SafetensorsWriter(path, {"a": TensorHeader((3,), torch.float32), "b": TensorHeader((5,), torch.uint8)}, {})
    writer.__enter__()
    writer.write("b", torch.arange(5, dtype=torch.uint8))
    writer.write("a", torch.arange(3.0))
    writer._file.flush()
    shutil.copy(part, tmp_path / "renamed.safetensors")
    with pytest.raises(CheckpointError):
        Checkpoint.open(tmp_path / "renamed.safetensors")
    assert not path.exists()
    writer.__exit__(None, None, None)
    with safe_open(path, "pt") as file:
        assert file.get_tensor("b").tolist() == [0, 1, 2, 3, 4] and file.get_tensor("a").tolist() == [0, 1, 2]


def test_destinations_that_will_not_do(tmp_path, dit, monkeypatch):
    source, target = write_sharded(published(dit), tmp_path), tmp_path / "new.safetensors"
    (tmp_path / "folder.safetensors").mkdir()
    faults = {
        tmp_path / "new.gguf": "must end in .safetensors",
        tmp_path / "nowhere" / "new.safetensors": "no such folder",
        source / "new.safetensors": "what is to be converted",
        tmp_path / "folder.safetensors": "is a folder",
    }
    for path, message in faults.items():
        with pytest.raises(ValueError, match=message):
            convert(source, path, "bf16", force=True)
    first = source / "model-00001-of-00003.safetensors"
    with pytest.raises(ValueError, match="what is to be converted"):
        convert(first, source / "model-00002-of-00003.safetensors", "bf16", force=True)
    target.with_name("new.safetensors.part").write_bytes(b"left behind")
    convert(source, target, "bf16")
    with pytest.raises(ValueError, match="what is to be converted"):
        convert(target, target, "fp8", force=True)
    with pytest.raises(ValueError, match="--force"):
        convert(source, target, "fp8")
    before = target.stat().st_size
    convert(source, target, "fp8", force=True)
    assert target.stat().st_size < before
    monkeypatch.setattr(shutil, "disk_usage", lambda path: namedtuple("Usage", "total used free")(9, 9, 9))
    with pytest.raises(ValueError, match="GiB free"):
        convert(source, target, "bf16", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["distill", "folder.safetensors", "new.safetensors"]


def test_autoencoders_are_refused(tmp_path, wan):
    save_part(tmp_path / "vae.safetensors", wan, "video_vae", wan.config, "wan_vae")
    with pytest.raises(CheckpointError, match="holds a video_vae"):
        convert(tmp_path / "vae.safetensors", tmp_path / "new.safetensors", "bf16")
    load_video_vae(tmp_path / "vae.safetensors")


def test_the_command_line(tmp_path, dit, capsys):
    source, target = write_sharded(published(dit), tmp_path), tmp_path / "new.safetensors"
    module.main([str(source), str(target), "--dtype", "fp8"])
    assert "new.safetensors: 0." in capsys.readouterr().out
    with pytest.raises(SystemExit, match="convert: .*--force"):
        module.main([str(source), str(target), "--dtype", "fp8"])
    module.main([str(source), str(target), "--dtype", "bf16", "--force"])
    assert_same(load_dit(target), load_dit(source))
