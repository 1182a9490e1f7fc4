"""Tokenizers of text encoders: embedded, beside the file in two formats, in a folder of their own, damaged."""

import base64
import io
import json

import pytest
import sentencepiece
from pack.model_loader.checkpoint import Checkpoint, CheckpointError
from pack.model_loader.load import save_part
from pack.model_loader.tokenizer import definition_of_vocabulary, read_tokenizer, tokenizer_definition

TEXTS = ("a red ball bounces", "  two  spaces ", "Sie sagt: 你好 🐎\n\n<start_of_turn>end", "")
WORDS = {
    "model": {"type": "WordLevel", "vocab": {"<unk>": 0, "<bos>": 1, "é": 2}, "unk_token": "<unk>"},
    "post_processor": {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"<bos>": {"id": "<bos>", "ids": [1], "tokens": ["<bos>"]}},
    },
}


@pytest.fixture(scope="module")
def gemma_like():
    """A SentencePiece model with Gemma's options, as the bytes of its file: pairs, byte fallback, no space in front."""
    written = io.BytesIO()
    lines = [
        f"a {colour} ball bounces on the {ground} floor" for colour in ("red", "blue") for ground in ("wet", "dry")
    ]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines * 9), model_writer=written, model_type="bpe", vocab_size=320, byte_fallback=True,
        add_dummy_prefix=False, remove_extra_whitespaces=False, normalization_rule_name="identity", pad_id=0, eos_id=1,
        bos_id=2, unk_id=3, user_defined_symbols=["<start_of_turn>"], minloglevel=2,
    )  # fmt: skip
    return written.getvalue()


@pytest.fixture
def path(tmp_path, text_encoder):
    path = tmp_path / "text_encoder" / "t5gemma.safetensors"
    path.parent.mkdir()
    save_part(path, text_encoder, "text_encoder", text_encoder.config, "t5gemma")
    return path


def definition(path):
    return tokenizer_definition(Checkpoint.open(path))


def test_tokenizer_json_beside_gives_no_bos_whatever_it_says(path):
    assert definition(path) is None
    (path.parent / "tokenizer.json").write_text(json.dumps(WORDS), encoding="utf-8")
    assert read_tokenizer(json.dumps(WORDS))("é") == [1, 2]
    assert read_tokenizer(definition(path))("é") == [2]


def test_an_embedded_tokenizer_is_taken_as_it_is_before_others(path, text_encoder):
    save_part(path, text_encoder, "text_encoder", text_encoder.config, "nano", tokenizer=json.dumps(WORDS))
    (path.parent / "tokenizer.json").write_text("{}")
    assert read_tokenizer(definition(path))("é") == [1, 2]


@pytest.mark.parametrize("place", ["text_encoder", "tokenizer"])
def test_tokenizer_model_beside_or_in_the_folder_of_diffusers(path, gemma_like, place):
    folder = path.parent.parent / place
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(gemma_like)
    encode = read_tokenizer(definition(path))
    original = sentencepiece.SentencePieceProcessor(model_proto=gemma_like)
    assert [encode(text) for text in TEXTS] == [original.encode(text) for text in TEXTS]
    assert encode("a red")[:1] not in ([original.bos_id()], [original.eos_id()])


def test_a_vocabulary_alone_is_the_whole_model(gemma_like):
    model = sentencepiece.SentencePieceProcessor(model_proto=gemma_like)
    kinds = []
    for i in range(model.get_piece_size()):
        kind = 4 if model.id_to_piece(i) == "<start_of_turn>" else 1
        kinds.append(2 if model.is_unknown(i) else 3 if model.is_control(i) else 6 if model.is_byte(i) else kind)
    pieces, scores = zip(*((model.id_to_piece(i), model.get_score(i)) for i in range(len(kinds))), strict=True)
    encode = read_tokenizer(definition_of_vocabulary(pieces, scores, kinds, leading_space=False))
    assert [encode(text) for text in TEXTS] == [model.encode(text) for text in TEXTS]
    spaced = read_tokenizer(definition_of_vocabulary(pieces, scores, kinds, leading_space=True))
    assert spaced("red") == model.encode(" red")


@pytest.mark.parametrize(
    ("name", "content"), [("tokenizer.json", b"{"), ("tokenizer.json", b'{"model": 1}'), ("tokenizer.model", b"<html>")]
)
def test_a_damaged_tokenizer_is_named(path, name, content):
    (path.parent / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"text_encoder/{name}: not a tokenizer \(.*Download it again"):
        definition(path)


def test_a_definition_of_a_model_is_its_bytes(path, gemma_like):
    (path.parent / "tokenizer.model").write_bytes(gemma_like)
    assert base64.b64decode(definition(path)) == gemma_like
