"""Golden cases of the transformer: packing, positions, rotary table, local ranges, every layer, both velocities."""

import torch

from ..model_loader.attention import frame_windows, joint_attention
from ..model_loader.checkpoint import Checkpoint
from ..model_loader.config import DiTConfig
from ..model_loader.dit_layers import Stream
from ..model_loader.load import fill
from ..model_loader.tokens import TokenLayout, coordinates, patchify, rotary_sin_cos, rotary_table
from .case import Check

EXACT = 0.0
FP32 = 2e-5
BF16_LAYER = 1e-2  # relative RMS
BF16_MODEL = 2e-2


def config_of(case):
    """Return the DiTConfig that a case's json describes in the published names."""
    arch, proxy = case.config["arch"], case.config["proxy"]
    return DiTConfig(
        num_layers=arch["num_layers"],
        hidden_size=arch["hidden_size"],
        head_dim=arch["head_dim"],
        num_query_groups=arch["num_query_groups"],
        video_in_channels=arch["video_in_channels"],
        audio_in_channels=arch["audio_in_channels"],
        text_in_channels=arch["text_in_channels"],
        expert_layers=tuple(arch["mm_layers"]),
        gelu7_layers=tuple(arch["gelu7_layers"]),
        local_attention_layers=tuple(arch.get("local_attn_layers", ())),
        frame_receptive_field=proxy["frame_receptive_field"],
        positions=proxy["coords_style"],
    )


def check_dit(case):
    """Yield the checks of one forward pass: packing exactly, then each layer alone, then the whole network."""
    config = config_of(case)
    dtype = torch.float32 if case.config["fp32"] else torch.bfloat16
    video, audio = case["in.x_t"], case["in.audio_x_t"]
    text = case["in.txt_feat"][:, : int(case["in.txt_feat_len"])]
    layout = TokenLayout.of(video, audio, text)
    yield from check_packing(case, config, layout, (video, audio, text))

    network = fill("dit", config, Checkpoint.of_tensors(case.weights().tensors), dtype=dtype)
    seen = record_outputs(network)
    yield from check_layers(case, network, layout, seen, dtype)
    v_video, v_audio = network(video, audio, text)
    yield compare(case, "out.adapter_out", seen["adapter"], dtype, BF16_LAYER)
    yield compare(case, "out.model_out", model_out(config, layout, seen), dtype, BF16_MODEL)
    yield compare(case, "out.v_video", v_video, dtype, BF16_MODEL)
    yield compare(case, "out.v_audio", v_audio, dtype, BF16_MODEL)


def check_layers(case, network, layout, seen, dtype):
    """Yield the checks of every layer, fed the golden output of the layer before, so that no error is carried along."""
    config = network.config
    order, back = case["out.permute_mapping"], case["out.inv_permute_mapping"]  # the goldens' order of tokens, and ours
    rotary = rotary_table(layout, config.positions, config.head_dim, torch.device("cpu"))
    x = case["out.adapter_out"]
    for i, layer in enumerate(network.block.layers):
        out = layer(Stream(x[None].clone()), layout, rotary, joint_attention).sum()[0]
        for part in ("attn_out", "mlp_out"):
            yield compare(case, f"out.layer{i}.{part}", torch.cat(seen[part])[order], dtype, BF16_LAYER)
        yield compare(case, f"out.layer{i}.out", out[order], dtype, BF16_LAYER)
        x = case[f"out.layer{i}.out"][back]


def compare(case, name, ours, dtype, relative):
    """Compare by absolute error in fp32, by relative RMS in bf16."""
    return case.check(name, ours, FP32) if dtype is torch.float32 else case.check_rms(name, ours, relative)


def check_packing(case, config, layout, streams):
    """Yield the checks of everything that is decided before the first layer; all of it is exact."""
    total = sum(layout.spans)
    modality = torch.repeat_interleave(torch.arange(3), torch.tensor(layout.spans))
    order, inverse = case["out.permute_mapping"], case["out.inv_permute_mapping"]
    coords = coordinates(layout, config.positions)
    yield case.check("out.modality_mapping", modality, EXACT)
    # The reference sorts tokens by modality, unstably; ours need no sorting if that leaves contiguous spans.
    yield case.check("out.permute_mapping", torch.argsort(inverse), EXACT)
    yield Check("out.permute_mapping", 0.0 if torch.equal(modality[order], modality) else 1.0)
    yield case.check("out.inv_permute_mapping", torch.argsort(order), EXACT)
    yield case.check("out.cu_seqlens", torch.tensor([0, total]), EXACT)
    yield case.check("out.coords_mapping", coords, EXACT)
    yield case.check("out.rope", rotary_sin_cos(coords, config.head_dim), EXACT)
    yield case.check("out.token_sequence", packed_tokens(streams), EXACT)
    queries, keys = local_ranges(layout, config.frame_receptive_field)
    mask = torch.zeros(total, total, dtype=torch.uint8)
    for (q_start, q_stop), (k_start, k_stop) in zip(queries, keys, strict=True):
        mask[q_start:q_stop, k_start:k_stop] = 1
    yield case.check("out.ffa_q_ranges", torch.tensor(queries), EXACT)
    yield case.check("out.ffa_k_ranges", torch.tensor(keys), EXACT)
    yield case.check("out.local_attn_mask", mask, EXACT)


def packed_tokens(streams):
    """Return the packed input tokens [N, widest stream], zero padded, as the reference feeds them."""
    video, audio, text = streams
    parts = (patchify(video)[0], audio[0], text[0])
    widest = max(part.shape[1] for part in parts)
    return torch.cat([torch.nn.functional.pad(part, (0, widest - part.shape[1])) for part in parts])


def local_ranges(layout, radius):
    """Return query and key ranges of local attention: one pair a frame, video to the rest, the rest to everything."""
    frame, video, total = layout.frame, layout.video, sum(layout.spans)
    queries = [(f * frame, (f + 1) * frame) for f in range(layout.frames)] + [(0, video), (video, total)]
    keys = [(first * frame, last * frame) for first, last in frame_windows(layout.frames, radius)]
    return queries, keys + [(video, total), (0, total)]


def record_outputs(network):
    """Hook the network; return the dict that holds the parts' latest outputs for clip 0, a layer's piece by piece."""
    seen = {}

    def keep(name):
        return lambda module, inputs, output: seen.__setitem__(name, output[0].clone())  # layers write over their input

    def keep_piece(name):
        return lambda module, inputs, output: seen[name].append(output.flatten(0, -2))

    network.adapter.register_forward_hook(keep("adapter"))
    for layer in network.block.layers:
        layer.register_forward_pre_hook(lambda module, inputs: seen.update(attn_out=[], mlp_out=[]))
        layer.attention.linear_proj.register_forward_hook(keep_piece("attn_out"))
        layer.mlp.register_forward_hook(keep_piece("mlp_out"))
    network.final_linear_video.register_forward_hook(keep("video"))
    network.final_linear_audio.register_forward_hook(keep("audio"))
    return seen


def model_out(config, layout, seen):
    """Return the packed output [N, widest of video and audio]; text rows are zero."""
    width = max(config.video_in_channels, config.audio_in_channels)
    out = torch.zeros(sum(layout.spans), width)
    out[: layout.video, : config.video_in_channels] = seen["video"]
    out[layout.video : layout.video + layout.audio, : config.audio_in_channels] = seen["audio"]
    return out


KINDS = {"dit": check_dit}
