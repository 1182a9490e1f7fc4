"""GGUF files as llama.cpp's tools write them: names, quantised rows, header."""

import gguf
import numpy as np
import torch
from pack.model_loader.gguf_blocks import quantise
from sparse_file import extend

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


def kind_of(tensor, kind):
    """Return what tools store a tensor as that is to be `kind`: vectors F32, rows that its blocks do not fill F16."""
    if tensor.ndim < 2:
        return KIND.F32
    return KIND[kind] if tensor.shape[-1] % gguf.GGML_QUANT_SIZES[KIND[kind]][0] == 0 else KIND.F16


def stored(array, kind):
    if kind.name.endswith("_K"):  # which the package restores but does not write
        return quantise(torch.from_numpy(array), kind.name).numpy()
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
        extend(file, -(-start // 32) * 32 + end)
    return path
