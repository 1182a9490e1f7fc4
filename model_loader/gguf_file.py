"""Transformers and T5Gemma as .gguf files: header, published names, matrices in fp32 or in blocks as they lie there."""

import math
import mmap
import re
import struct
from dataclasses import dataclass

import torch

from .checkpoint import AGAIN, Checkpoint, CheckpointError, TensorHeader, map_tensor, refuse_other_kind
from .gguf_blocks import FORMATS, restore
from .tokenizer import HEADER_KEY, definition_of_vocabulary

PLAIN = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
KINDS = {  # ggml's numbers of types; those that are in neither PLAIN nor FORMATS are only called by their names
    0: "F32", 1: "F16", 2: "Q4_0", 3: "Q4_1", 6: "Q5_0", 7: "Q5_1", 8: "Q8_0", 9: "Q8_1", 10: "Q2_K", 11: "Q3_K",
    12: "Q4_K", 13: "Q5_K", 14: "Q6_K", 15: "Q8_K", 16: "IQ2_XXS", 17: "IQ2_XS", 18: "IQ3_XXS", 19: "IQ1_S",
    20: "IQ4_NL", 21: "IQ3_S", 22: "IQ2_S", 23: "IQ4_XS", 24: "I8", 25: "I16", 26: "I32", 27: "I64", 28: "F64",
    29: "IQ1_M", 30: "BF16", 34: "TQ1_0", 35: "TQ2_0", 39: "MXFP4",
}  # fmt: skip
VERSIONS = (2, 3)
ALIGNMENT = 32  # where the header does not say otherwise
NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
TEXT, ARRAY = 8, 9
BLOCK = re.compile(r"enc\.blk\.(\d+)\.(\w+)\.weight")
IN_BLOCK = {  # llama.cpp's names of T5 encoder tensors, and of Gemma 2's for what T5 lacks
    "attn_norm": "pre_self_attn_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_o": "self_attn.o_proj",
    "attn_output": "self_attn.o_proj",
    "post_attention_norm": "post_self_attn_layernorm",
    "ffn_norm": "pre_feedforward_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "post_ffw_norm": "post_feedforward_layernorm",
}
OUTSIDE_BLOCKS = {"token_embd.weight": "embed_tokens.weight", "enc.output_norm.weight": "norm.weight"}
ROOT = "model.encoder."


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor lies in the file: `kind` is the name of its ggml type, a row takes `row_bytes`."""

    kind: str
    shape: tuple[int, ...]
    start: int
    row_bytes: int


def open_gguf(path, tensor_at=map_tensor):
    """Open a .gguf file as a Checkpoint in published names; quantised tensors become fp32 when they are `read`.

    Its `blocks` names the kind of the quantised matrices, whose bytes uint8 [rows, bytes of a row] `read_blocks` maps;
    tensor_at: as `Checkpoint.open`.

    Tensors that keep their published names, as a transformer's do, keep their values. Under llama.cpp's names for T5
    (`enc.blk.N.attn_q.weight`) norm weights are read as 1 + w, and 1 is taken off: llama.cpp's converters of Gemma 1 to
    3 and of T5Gemma 2 add it, and none for T5Gemma was merged, so that this is inferred. Raises CheckpointError.
    """
    if path.stat().st_size < 24:
        raise CheckpointError(f"{path.name}: {path.stat().st_size} bytes, too short for a GGUF file. {AGAIN}")
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        metadata, infos, start = _read_header(path, mapped)
        size = len(mapped)
    if metadata.get("split.count", 1) != 1:
        raise CheckpointError(
            f"{path.name}: one of {metadata['split.count']} files of a split GGUF. Merge them with llama.cpp's "
            "`llama-gguf-split --merge`, or use a single file."
        )
    stored = {name: _locate(path, size, start, name, *info) for name, info in infos.items()}
    names = _published_names(path, stored, metadata.get("general.architecture", "unknown"))
    headers = {
        name: TensorHeader(stored[own].shape, PLAIN.get(stored[own].kind, torch.float32)) for name, own in names.items()
    }

    def read_blocks(name):
        tensor = stored[names[name]]
        raw = TensorHeader((math.prod(tensor.shape[:-1]), tensor.row_bytes), torch.uint8)
        return tensor_at(path, name, tensor.start, raw)

    def read(name):
        tensor = stored[names[name]]
        if tensor.kind in PLAIN:
            numbers = tensor_at(path, name, tensor.start, headers[name])
        else:
            numbers = restore(read_blocks(name), tensor.kind, torch.float32).reshape(tensor.shape)
        return numbers - 1 if name != names[name] and name.endswith("norm.weight") else numbers

    blocks = {n: stored[own].kind for n, own in names.items() if _in_blocks(stored[own])}
    return Checkpoint(path, headers, _tokenizer(metadata, headers), read, blocks=blocks, read_blocks=read_blocks)


def _in_blocks(tensor):
    return tensor.kind in FORMATS and len(tensor.shape) == 2


def _tokenizer(metadata, headers):
    """Return Checkpoint metadata with the file's own SentencePiece vocabulary, {} where it has none for every token."""
    pieces, scores, kinds = (metadata.get(f"tokenizer.ggml.{part}") for part in ("tokens", "scores", "token_type"))
    rows = next((headers[name].shape[0] for name in headers if name.endswith("embed_tokens.weight")), None)
    if metadata.get("tokenizer.ggml.model") != "llama" or not pieces or not scores or not kinds or len(pieces) != rows:
        return {}  # "llama" is how GGUF calls SentencePiece's pairs; Gemma's vocabulary is one of those
    leading_space = metadata.get("tokenizer.ggml.add_space_prefix", True)
    return {HEADER_KEY: definition_of_vocabulary(pieces, scores, kinds, leading_space)}


class _Header:
    """A cursor over a GGUF header; struct.error where the file ends too early."""

    def __init__(self, mapped):
        self.mapped = mapped
        self.at = 0

    def numbers(self, letter, count=1):
        layout = f"<{count}{letter}"
        found = struct.unpack_from(layout, self.mapped, self.at)
        self.at += struct.calcsize(layout)
        return found

    def text(self):
        (length,) = self.numbers("Q")
        if length > len(self.mapped) - self.at:
            raise struct.error(f"a text of {length} bytes")
        self.at += length
        return self.mapped[self.at - length : self.at].decode("utf-8", "replace")

    def value(self, kind):
        if kind == TEXT:
            return self.text()
        if kind != ARRAY:
            return self.numbers(NUMBERS[kind])[0]
        (kind,), (count,) = self.numbers("I"), self.numbers("Q")
        return self.numbers(NUMBERS[kind], count) if kind in NUMBERS else tuple(self.value(kind) for _ in range(count))


def _read_header(path, mapped):
    """Return metadata, {tensor name: (dimensions, kind, offset)} and where tensors begin."""
    if mapped[:4] != b"GGUF":
        refuse_other_kind(path)
        raise CheckpointError(f"{path.name}: not a GGUF file, whatever its name says. {AGAIN}")
    header = _Header(mapped)
    header.at = 4
    (version,) = header.numbers("I")
    if version not in VERSIONS:
        raise CheckpointError(
            f"{path.name}: GGUF version {version}; expected {' or '.join(map(str, VERSIONS))}, little-endian. Use a "
            "file that a current llama.cpp wrote."
        )
    metadata, infos, name = {}, {}, "none yet"
    try:
        tensors, pairs = header.numbers("Q", 2)
        for _ in range(pairs):
            key = header.text()
            metadata[key] = header.value(header.numbers("I")[0])
        for _ in range(tensors):
            name = header.text()
            dimensions = header.numbers("Q", header.numbers("I")[0])
            infos[name] = (dimensions, *header.numbers("I"), *header.numbers("Q"))
        alignment = metadata.get("general.alignment", ALIGNMENT)
        start = -(-header.at // alignment) * alignment
    except (struct.error, KeyError, TypeError, ZeroDivisionError, RecursionError, MemoryError) as error:
        raise CheckpointError(
            f"{path.name}: unreadable GGUF header (last tensor: {name}; {error!r}); the file is cut off or damaged. "
            f"{AGAIN}"
        ) from None
    if not infos:
        raise CheckpointError(f"{path.name}: holds no tensors. {AGAIN}")
    return metadata, infos, start


def _locate(path, size, start, name, dimensions, number, offset):
    kind = KINDS.get(number, f"unknown type {number}")
    if kind not in (*PLAIN, *FORMATS):
        raise CheckpointError(
            f"{path.name}: {name} is stored as {kind}; expected {', '.join((*PLAIN, *FORMATS))}. Use a file of one of "
            "these, for example Q6_K."
        )
    form = FORMATS.get(kind)
    block, block_bytes = (form.numbers, form.bytes) if form else (1, PLAIN[kind].itemsize)
    shape = tuple(reversed(dimensions))
    if not shape or not math.prod(shape) or shape[-1] % block:
        raise CheckpointError(
            f"{path.name}: {name} has shape {list(shape)}, impossible for {kind} in blocks of {block}. {AGAIN}"
        )
    row_bytes = shape[-1] // block * block_bytes
    end = start + offset + math.prod(shape[:-1]) * row_bytes
    if end > size:
        raise CheckpointError(f"{path.name}: {size} bytes, but {name} ends at {end}; the file is cut off. {AGAIN}")
    return StoredTensor(kind, shape, start + offset, row_bytes)


def _published_names(path, stored, architecture):
    """Return {published name: name in the file}; names that are not llama.cpp's stay."""
    if not any(name.startswith("enc.") for name in stored):
        found = next((name for name in stored if re.match(r"(blk|dec)\.", name)), None)
        if found:
            raise CheckpointError(
                f"{path.name}: a {architecture} file without an encoder (first tensor: {found}); expected T5Gemma's. "
                "Gemma itself will not do. Use a GGUF of t5gemma-9b-9b-ul2 that holds its encoder."
            )
        return {name: name for name in stored}
    names = {}
    for name in stored:
        block = BLOCK.fullmatch(name)
        if name in OUTSIDE_BLOCKS:
            published = OUTSIDE_BLOCKS[name]
        elif block and block[2] in IN_BLOCK:
            published = f"layers.{block[1]}.{IN_BLOCK[block[2]]}.weight"
        elif name.startswith("enc."):
            raise CheckpointError(
                f"{path.name}: {name} has no place in T5Gemma's encoder; the file is a {architecture} model. Use a "
                "GGUF of t5gemma-9b-9b-ul2."
            )
        else:
            continue  # the decoder's
        if ROOT + published in names:
            raise CheckpointError(f"{path.name}: {name} and {names[ROOT + published]} are one tensor twice. {AGAIN}")
        names[ROOT + published] = name
    return names
