"""A text encoder's tokenizer: in its file's header, or beside it as a tokenizer.json or a tokenizer.model."""

import base64
import json
import struct

import sentencepiece
import tokenizers

from .checkpoint import CheckpointError, label

HEADER_KEY = "happyhorse.tokenizer"
NAMES = ("tokenizer.json", "tokenizer.model")
BYTE_PAIRS = 2  # SentencePiece's number for models that merge pairs


def tokenizer_definition(checkpoint):
    """Return a tokenizer as text: the content of a tokenizer.json, base64 of a tokenizer.model, or None without one.

    Looked for in the checkpoint's header, then in its folder, then in a folder `tokenizer` beside that (diffusers).
    A tokenizer.json's post-processor is left out: T5Gemma's prompts begin with no <bos>, whatever the file, which is
    Gemma's, may say (keras_hub's T5GemmaSeq2SeqLMPreprocessor, ComfyUI's text_encoders/sa3.py). CheckpointError where
    such a file is damaged.
    """
    embedded = checkpoint.metadata.get(HEADER_KEY)
    if embedded:
        return embedded
    folder = checkpoint.path if checkpoint.path.is_dir() else checkpoint.path.parent
    found = [place / name for place in (folder, folder.parent / "tokenizer") for name in NAMES]
    path = next((path for path in found if path.is_file()), None)
    if path is None:
        return None
    try:
        if path.suffix == ".model":
            definition = base64.b64encode(path.read_bytes()).decode()
        else:
            content = json.loads(path.read_text(encoding="utf-8"))
            content.pop("post_processor", None)
            definition = json.dumps(content, ensure_ascii=False)
        read_tokenizer(definition)
    except Exception as error:  # tokenizers raises bare Exceptions
        raise CheckpointError(f"{label(path)}: not a tokenizer ({error}). Download it again.") from None
    return definition


def read_tokenizer(definition):
    """Return a function from text to token ids [n]; definition: as `tokenizer_definition` gives it."""
    if definition.startswith("{"):
        tokenizer = tokenizers.Tokenizer.from_str(definition)
        return lambda text: tokenizer.encode(text).ids
    return sentencepiece.SentencePieceProcessor(model_proto=base64.b64decode(definition)).encode


def definition_of_vocabulary(pieces, scores, kinds, leading_space):
    """Return the definition of a SentencePiece model of pairs given by its vocabulary, as GGUF files carry it.

    pieces: texts, spaces written as U+2581; scores: floats, the higher merged first; kinds: 1 ordinary, 2 unknown,
    3 control, 4 user-defined, 5 unused, 6 byte; leading_space: whether a text gets a space in front.
    """
    rows = zip(pieces, scores, kinds, strict=True)
    # The message ModelProto of SentencePiece's published sentencepiece_model.proto, field by field.
    proto = b"".join(
        _field(1, _field(1, piece.encode()) + b"\x15" + struct.pack("<f", score) + _field(3, kind))
        for piece, score, kind in rows
    )
    trainer = _field(3, BYTE_PAIRS) + _field(35, int(6 in kinds))  # bytes stand in for characters without a piece
    normaliser = _field(1, b"identity") + _field(3, int(leading_space)) + _field(4, 0)  # extra spaces are kept
    return base64.b64encode(proto + _field(2, trainer) + _field(3, normaliser)).decode()


def _field(number, value):
    """Encode a protobuf field: an int as varint, bytes with their length in front."""
    if isinstance(value, int):
        return _varint(number << 3) + _varint(value)
    return _varint(number << 3 | 2) + _varint(len(value)) + value


def _varint(value):
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
