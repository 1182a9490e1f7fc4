"""T5Gemma as GGUF: every quantisation within its error, both name styles, and files that are refused."""

import sys
from dataclasses import replace

import pytest
import torch
from gguf_on_disk import KIND, llama_names, write, write_sparse
from pack.model_loader.checkpoint import Checkpoint, CheckpointError
from pack.model_loader.config import T5GEMMA_9B
from pack.model_loader.convert import convert
from pack.model_loader.detect import describe
from pack.model_loader.gguf_file import KINDS
from pack.model_loader.load import expected_tensors, load_text_encoder, plan, published_tensors, tokenizer_json
from pack.model_loader.text_encoder import TextEncoder
from pack.model_loader.tokenizer import read_tokenizer

SMALL = replace(
    T5GEMMA_9B,
    vocab_size=50,
    hidden_size=256,
    intermediate_size=512,
    num_layers=2,
    num_heads=2,
    num_key_value_heads=1,
)
IDS = torch.tensor([[5, 9, 1, 30, 2, 7, 44, 12]])
# Bounds on the relative error (rms) of normally distributed weights rounded to each type, and of the features after two
# layers; measured: about two thirds of them.
ERRORS = {
    "F32": (0, 0),
    "F16": (3e-4, 1e-3),
    "BF16": (3e-3, 1e-2),
    "Q8_0": (8e-3, 2e-2),
    "Q6_K": (2.5e-2, 8e-2),
    "Q5_K": (4.5e-2, 0.15),
    "Q4_K": (9e-2, 0.3),
    "Q5_1": (4.5e-2, 0.15),
    "Q5_0": (5e-2, 0.15),
    "Q4_1": (9e-2, 0.3),
    "Q4_0": (0.11, 0.35),
}


@pytest.fixture(scope="module")
def encoder():
    torch.manual_seed(7)
    network = TextEncoder(SMALL).eval()
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            parameter.normal_(0, 0.3 if "norm" in name else 0.06)
    return network


def tensors_of(encoder):
    return published_tensors("text_encoder", encoder.state_dict(), encoder.config)


def refusal(path):
    with pytest.raises(CheckpointError) as refused:
        load_text_encoder(path, dtype=torch.float32)
    message = str(refused.value)
    assert path.name in message
    return message


def error(found, meant):
    return float((found - meant).norm() / meant.norm())


@pytest.mark.parametrize("style", ["hf", "llama.cpp"])
@pytest.mark.parametrize("kind", ERRORS)
@torch.no_grad()
def test_each_quantisation_gives_the_features_within_its_error(tmp_path, encoder, kind, style):
    tensors = tensors_of(encoder)
    path = write(tmp_path / "t5.gguf", llama_names(tensors) if style == "llama.cpp" else tensors, kind)
    found = load_text_encoder(path, dtype=torch.float32)
    assert found.config == SMALL
    weights, features = ERRORS[kind]
    state = found.state_dict()
    for name, meant in encoder.state_dict().items():
        if "norm" in name:  # 1 + w and back rounds
            assert torch.allclose(state[name], meant, rtol=0, atol=0 if style == "hf" else 2e-7)
        else:
            assert error(state[name], meant) <= weights
            assert kind != "F32" or torch.equal(state[name], meant)
    assert error(found(IDS), encoder(IDS)) <= features
    if weights:
        assert error(found(IDS), encoder(IDS)) > features / 30  # the bound means something


@pytest.mark.parametrize("prefix", ["encoder.", ""])
@torch.no_grad()
def test_shorter_hugging_face_names_and_a_decoder_beside(tmp_path, encoder, prefix):
    tensors = {prefix + n.removeprefix("model.encoder."): t for n, t in tensors_of(encoder).items()}
    if prefix:
        beside = ("decoder.layers.0.self_attn.q_proj.weight", "lm_head.out_proj.weight")
        tensors |= {name: torch.zeros(4, 256) for name in beside}
    found = load_text_encoder(write(tmp_path / "t5.gguf", tensors), dtype=torch.float32)
    assert torch.equal(found(IDS), encoder(IDS))


def test_llama_names_with_a_decoder_beside(tmp_path, encoder):
    tensors = llama_names(tensors_of(encoder)) | {"dec.blk.0.attn_q.weight": torch.zeros(4, 256)}
    checkpoint = Checkpoint.open(write(tmp_path / "t5.gguf", tensors, "Q8_0"))
    assert checkpoint.headers.keys() == tensors_of(encoder).keys()


def test_a_cut_off_file_names_its_first_incomplete_tensor(tmp_path, encoder):
    whole = write(tmp_path / "whole.gguf", tensors_of(encoder)).read_bytes()
    last = list(tensors_of(encoder))[-1]
    path = tmp_path / "cut.gguf"
    path.write_bytes(whole[:-64])
    assert f"{last} ends at {len(whole)}; the file is cut off" in refusal(path)
    for size, said in ((300, "unreadable GGUF header"), (70, "unreadable"), (10, "too short"), (0, "too short")):
        path.write_bytes(whole[:size])
        assert said in refusal(path)


def test_other_content_and_versions_are_refused(tmp_path, encoder):
    whole = write(tmp_path / "whole.gguf", tensors_of(encoder)).read_bytes()
    path = tmp_path / "t5.gguf"
    path.write_bytes(b"ggml" + whole[4:])
    assert "not a GGUF file" in refusal(path)
    path.write_bytes(b"PK\3\4" + whole[4:])
    assert "is a torch checkpoint, whatever its name says. Rename it to .ckpt" in refusal(path)
    for version in (b"\1\0\0\0", b"\0\0\0\3"):
        path.write_bytes(whole[:4] + version + whole[8:])
        assert "GGUF version" in refusal(path)


@pytest.mark.parametrize("kind, said", [(99, "unknown type 99"), (int(KIND.IQ2_S), "IQ2_S")])
def test_an_unknown_quantisation_is_named_with_its_tensor(tmp_path, encoder, kind, said):
    name = "model.encoder.layers.1.mlp.up_proj.weight"
    content = bytearray(write(tmp_path / "whole.gguf", tensors_of(encoder)).read_bytes())
    at = content.index(name.encode()) + len(name) + 4 + 2 * 8
    content[at : at + 4] = kind.to_bytes(4, "little")
    path = tmp_path / "t5.gguf"
    path.write_bytes(content)
    assert f"{name} is stored as {said}; expected F32, F16, BF16, Q8_0" in refusal(path)


def test_other_models_are_refused(tmp_path, encoder):
    llama = llama_names(tensors_of(encoder))
    gemma = {name.removeprefix("enc."): tensor for name, tensor in llama.items()}
    message = refusal(write(tmp_path / "gemma.gguf", gemma, architecture="gemma2"))
    assert "a gemma2 file without an encoder (first tensor: blk." in message
    t5 = llama | {"enc.blk.0.attn_rel_b.weight": torch.zeros(32, 8)}
    assert "enc.blk.0.attn_rel_b.weight has no place" in refusal(write(tmp_path / "t5.gguf", t5, architecture="t5"))
    other = {"model.layers.0.input_layernorm.weight": torch.zeros(8)}
    assert "not a part of this model" in refusal(write(tmp_path / "llm.gguf", other))
    decoder = {n.replace("encoder", "decoder"): t for n, t in tensors_of(encoder).items()}
    decoder |= {"model.decoder.layers.0.cross_attn.q_proj.weight": torch.zeros(8, 8)}
    assert "model.decoder.layers.0.cross_attn.q_proj.weight" in refusal(write(tmp_path / "decoder.gguf", decoder))
    del llama["enc.blk.1.post_ffw_norm.weight"]
    assert "layers.1.post_feedforward_layernorm.weight" in refusal(write(tmp_path / "part.gguf", llama))


def test_part_of_a_split_file_is_refused(tmp_path, encoder):
    path = write(tmp_path / "t5-00001-of-00002.gguf", tensors_of(encoder), split_count=2)
    assert "one of 2 files of a split GGUF" in refusal(path)


def test_types_have_the_numbers_and_names_of_the_package():
    assert {number: KIND(number).name for number in KINDS} == KINDS


def test_the_package_gguf_is_not_needed(tmp_path, encoder, monkeypatch):
    path = write(tmp_path / "t5.gguf", tensors_of(encoder), "Q6_K")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert load_text_encoder(path).config == SMALL


def test_its_own_vocabulary_is_the_tokenizer_if_it_is_whole(tmp_path, encoder):
    pieces = ["<pad>", "<eos>", "<bos>", "<unk>", "r", "e", "d", "re", "red", *(f"p{i}" for i in range(41))]
    kinds = [3, 3, 3, 2, *[1] * 46]
    path = write(tmp_path / "t5.gguf", tensors_of(encoder), vocabulary=(pieces, kinds))
    assert read_tokenizer(tokenizer_json(path))("red") == [8]
    assert tokenizer_json(write(tmp_path / "t5.gguf", tensors_of(encoder))) is None
    assert tokenizer_json(write(tmp_path / "t5.gguf", tensors_of(encoder), vocabulary=(pieces[:9], kinds[:9]))) is None


@pytest.mark.parametrize("style", ["hf", "llama.cpp"])
@pytest.mark.parametrize("kind", ["Q8_0", "Q6_K", "Q4_K"])
def test_full_size_headers_are_recognised_and_every_tensor_has_its_place(tmp_path, manifest, kind, style):
    """A sparse file: names, shapes and types of the whole encoder, no content."""
    published = {f"model.{name}": header.shape for name, header in manifest("t5gemma_9b_encoder").headers.items()}
    tensors = {name: torch.empty(shape, device="meta") for name, shape in published.items()}
    named = llama_names(tensors) if style == "llama.cpp" else tensors
    checkpoint = Checkpoint.open(write_sparse(tmp_path / "t5.gguf", named, kind, "t5gemma"))
    found = describe(checkpoint)
    assert found.config == T5GEMMA_9B
    wanted = expected_tensors(found.network, found.config, dtype=torch.bfloat16)
    assert plan(found.network, checkpoint, found.prefix, wanted).keys() == published.keys()


@pytest.mark.parametrize("kind", ["F32", "Q6_K"])
def test_converts_to_one_file_that_loads_the_same(tmp_path, encoder, kind):
    path = write(tmp_path / "t5.gguf", llama_names(tensors_of(encoder)), kind)
    convert(path, tmp_path / "t5.safetensors", "bf16")
    found, meant = (load_text_encoder(p).state_dict() for p in (tmp_path / "t5.safetensors", path))
    assert found.keys() == meant.keys() and all(torch.equal(found[name], meant[name]) for name in meant)
