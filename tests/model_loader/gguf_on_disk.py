"""GGUF files as llama.cpp's tools write them: names, quantised rows, header."""

from functools import partial

import numpy as np
import pytest

gguf = pytest.importorskip("gguf", reason="optional package: pip install gguf")
KIND = gguf.GGMLQuantizationType
LLAMA = {  # ours -> llama.cpp's, written out apart from the loader's table
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_o",
    "pre_self_attn_layernorm": "attn_norm",
    "post_self_attn_layernorm": "post_attention_norm",
    "pre_feedforward_layernorm": "ffn_norm",
    "post_feedforward_layernorm": "post_ffw_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def llama_names(tensors):
    """Rename as llama.cpp does, norms stored as 1 + w."""
    renamed = {}
    for name, tensor in tensors.items():
        inner = name.removeprefix("model.encoder.").removesuffix(".weight")
        own = {"embed_tokens": "token_embd", "norm": "enc.output_norm"}.get(inner)
        if own is None:
            _, layer, rest = inner.split(".", 2)
            own = f"enc.blk.{layer}.{LLAMA[rest]}"
        renamed[f"{own}.weight"] = tensor + 1 if "norm" in name else tensor
    return renamed


def pack_q6_k(weights):
    """Pack [rows, 256n] fp32 as Q6_K: 16 signed scales a block of 256, 6-bit numbers around 32."""
    sub = weights.reshape(-1, 16, 16)
    step = np.abs(sub).max(-1) / 31
    whole = (step.max(-1) / 127).astype(np.float16)
    scales = np.rint(step / whole[:, None].astype(np.float32)).astype(np.int8)
    size = whole.astype(np.float32)[:, None, None] * scales[:, :, None]
    q = (np.rint(sub / np.where(size == 0, 1, size)).clip(-32, 31) + 32).astype(np.uint8).reshape(-1, 2, 4, 32)
    low = np.concatenate([q[:, :, :2] & 15 | (q[:, :, 2:] & 15) << 4], -1)
    high = q[:, :, 0] >> 4 | q[:, :, 1] >> 4 << 2 | q[:, :, 2] >> 4 << 4 | q[:, :, 3] >> 4 << 6
    blocks = [low.reshape(-1, 128), high.reshape(-1, 64), scales.view(np.uint8), whole[:, None].view(np.uint8)]
    return np.concatenate(blocks, -1).reshape(len(weights), -1)


def pack_q4_k(weights, bits=4):
    """Pack [rows, 256n] fp32 as Q4_K or Q5_K: 8 six-bit scales and minima a block of 256, 4- or 5-bit numbers."""
    sub = weights.reshape(-1, 8, 32)
    least = np.maximum(-sub.min(-1), 0)
    step = (sub.max(-1) + least) / (2**bits - 1)
    wholes = [(part.max(-1) / 63).astype(np.float16) for part in (step, least)]
    scale, floor = (
        np.rint(part / whole[:, None].astype(np.float32)).astype(np.uint8)
        for part, whole in zip((step, least), wholes, strict=True)
    )
    size, offset = (
        whole.astype(np.float32)[:, None, None] * part[:, :, None]
        for part, whole in zip((scale, floor), wholes, strict=True)
    )
    q = np.rint((sub + offset) / np.where(size == 0, 1, size)).clip(0, 2**bits - 1).astype(np.uint8)
    fifth = [(q >> 4 << np.arange(8, dtype=np.uint8)[:, None]).sum(1, dtype=np.uint8)] if bits == 5 else []
    q = (q & 15).reshape(-1, 4, 2, 32)
    packed = [
        scale[:, :4] | scale[:, 4:] >> 4 << 6,
        floor[:, :4] | floor[:, 4:] >> 4 << 6,
        scale[:, 4:] & 15 | (floor[:, 4:] & 15) << 4,
    ]
    wholes = [whole[:, None].view(np.uint8) for whole in wholes]
    blocks = [*wholes, *packed, *fifth, (q[:, :, 0] | q[:, :, 1] << 4).reshape(-1, 128)]
    return np.concatenate(blocks, -1).reshape(len(weights), -1)


# The package dequantises these but does not quantise them.
K_QUANTS = {KIND.Q6_K: pack_q6_k, KIND.Q5_K: partial(pack_q4_k, bits=5), KIND.Q4_K: pack_q4_k}


def kind_of(tensor, kind):
    """Return what tools store a tensor as that is to be `kind`: vectors F32, rows that its blocks do not fill F16."""
    if tensor.ndim < 2:
        return KIND.F32
    return KIND[kind] if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[KIND[kind]][0] == 0 else KIND.F16


def stored(array, kind):
    if kind in K_QUANTS:
        return K_QUANTS[kind](array)
    return gguf.quants.quantize(array, kind)


def write(path, tensors, kind="F32", architecture="t5gemma", vocabulary=(["<pad>", "<eos>", "<bos>"], [3]), **metadata):
    """Write a GGUF as llama.cpp's tools do, see `kind_of`. vocabulary: pieces, best last, and their kinds."""
    writer = gguf.GGUFWriter(path, architecture)
    writer.add_string("tokenizer.ggml.model", "llama")
    writer.add_array("tokenizer.ggml.tokens", vocabulary[0])
    writer.add_array("tokenizer.ggml.scores", [-float(i) for i in range(len(vocabulary[0]), 0, -1)])
    writer.add_array("tokenizer.ggml.token_type", vocabulary[1])
    writer.add_bool("tokenizer.ggml.add_space_prefix", False)
    for key, value in metadata.items():
        writer.add_uint16(key.replace("_", "."), value)
    for name, tensor in tensors.items():
        chosen = kind_of(tensor, kind)
        array = tensor.detach().float().contiguous().numpy()
        writer.add_tensor(name, stored(array, chosen), raw_dtype=chosen)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_sparse(path, tensors, kind, architecture):
    """Write a GGUF without content: names, shapes and types of tensors on meta."""
    writer = gguf.GGUFWriter(path, architecture)
    end = 0
    for name, tensor in tensors.items():
        chosen = kind_of(tensor, kind)
        block, block_bytes = gguf.GGML_QUANT_SIZES[chosen]
        size = tensor.numel() // block * block_bytes
        dtype = {KIND.F32: np.float32, KIND.F16: np.float16}.get(chosen, np.uint8)
        shape = gguf.quants.quant_shape_to_byte_shape(tensor.shape, chosen) if dtype is np.uint8 else tensor.shape
        writer.add_tensor_info(name, shape, np.dtype(dtype), size, raw_dtype=chosen)
        end += -(-size // 32) * 32
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    with open(path, "r+b") as file:
        start = file.seek(0, 2)
        file.truncate(-(-start // 32) * 32 + end)
    return path
