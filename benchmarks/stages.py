"""The networks' part of the table: one layer, whole stages with random weights of the full size, and the decoder."""

from dataclasses import replace

import torch
from torch.utils.flop_counter import FlopCounterMode

from ..model_loader import fp8_linear, padded_linear
from ..model_loader.attention import joint_attention
from ..model_loader.config import DISTILL, SR_540P, SR_1080P, TURBO_7_7
from ..model_loader.dit import DiT
from ..model_loader.dit_layers import Layer, Stream
from ..model_loader.fp8_linear import Fp8Linear
from ..model_loader.tokens import TokenLayout, rotary_table
from ..model_loader.turbo_vae import TurboVAE
from ..sampler.denoise import denoise_renoise, denoise_unipc, seeded_noise
from ..sampler.schedule import flow_sigmas
from .attention_rows import CLIPS, operations
from .measure import cell, head, milliseconds, once, peak_gigabytes, row_or_fault

# What a processor runs: the same code at a width it can bear.
SMALL_CLIPS = {"cpu": TokenLayout(6, 3, 4, 21, 12)}
SMALL = {"num_layers": 4, "hidden_size": 256, "num_query_groups": 1, "text_in_channels": 96}
SMALL |= {"expert_layers": (0, 3), "gelu7_layers": (0,)}
SMALL_TURBO = replace(TURBO_7_7, block_out_channels=(16, 16, 8, 8))
STEPS = {"256p": (DISTILL, 8), "540p": (SR_540P, 5), "1080p": (SR_1080P, 5)}
WAYS = {  # of computing: (fp8 linears, fp8 attention)
    "bf16": (False, False),
    "fp8, fp8 attention": (True, True),
    "fp8": (True, False),
    "bf16, fp8 attention": (False, True),
}
# Published times of the stages and of their decoding on one H100, seconds (daVinci-MagiHuman).
PUBLISHED = {"256p": (1.6, 0.4), "540p": (5.1, 1.3), "1080p": (31.0, 5.8)}


def small(config):
    """Return a configuration that a processor can bear."""
    local = tuple(i for i in range(SMALL["num_layers"]) if i in config.local_attention_layers)
    return replace(config, **SMALL, local_attention_layers=local)


def layer_operations(config, layer, layout):
    """Return (of linears, of attention) the floating-point operations of one layer."""
    width, inner = config.hidden_size, config.mlp_width(layer)
    rows = width + 2 * config.num_query_groups * config.head_dim + config.num_heads
    up = inner if layer in config.gelu7_layers else 2 * inner
    linears = 2 * sum(layout.spans) * width * (rows + width + up + inner)
    radius = config.frame_receptive_field if layer in config.local_attention_layers else None
    return linears, operations(layout, config.num_heads, config.head_dim, radius)


def floor(config, layers, layout, rates, fp8, fp8_attention=False):
    """Return the least milliseconds of these layers: multiplications at the measured rates of large matmuls."""
    parts = [layer_operations(config, layer, layout) for layer in layers]
    linears = rates.floor(operations=sum(part[0] for part in parts), fp8=fp8)
    attention = rates.floor(operations=sum(part[1] for part in parts), fp8=fp8_attention)
    return None if linears is None or attention is None else linears + attention


def randomise(network):
    """Fill weights with small random numbers where they lie; fp8 weights stay what a quantised normal would be."""
    with torch.no_grad():
        for module in network.modules():
            if isinstance(module, Fp8Linear):
                module.quantise(
                    torch.randn(module.out_features, module.weight.shape[1], device=module.weight.device) / 64
                )
            elif isinstance(module, torch.nn.Linear):
                module.weight.normal_(0, 1 / 64)
    return network.requires_grad_(False)


def operations_of(fp8):
    """Return what builds the linears."""
    return fp8_linear if fp8 else padded_linear


def layer_table(device, rates, cpu):
    """Yield the lines of single layers: what most layers are, one with experts, one with local attention."""
    yield from head("layer", "size", "precision", "ms", "floor ms", "floor/time", "peak GB beyond weights and input")
    for size, layout in (SMALL_CLIPS if cpu else CLIPS).items():
        config = small(SR_1080P) if cpu else STEPS[size][0]
        kinds = {"shared, full attention": 2 if cpu else 7, "experts": 3 if cpu else 37}
        if config.local_attention_layers:
            kinds["shared, local attention"] = 1 if cpu else 8
        for way in ("bf16", "fp8, fp8 attention"):
            for name, layer in kinds.items():
                yield row_or_fault(
                    (name, size, way),
                    lambda layer=layer, way=way, at=(config, layout): layer_cells(*at, layer, way, device, rates),
                )


def layer_call(config, layout, layer, way, device):
    """Build one layer with random weights, return a call that runs it by one of the WAYS."""
    fp8, fp8_attention = WAYS[way]
    factory = {"operations": operations_of(fp8), "dtype": torch.bfloat16, "device": device}
    network = randomise(Layer(config, layer, **factory))
    rotary = rotary_table(layout, config.positions, config.head_dim, device)
    rest = (layout, rotary, joint_attention, fp8_attention)
    x = torch.randn(1, sum(layout.spans), config.hidden_size, device=device)
    stream = network(Stream(x), *rest)  # as layers get it from one another
    return lambda: network(stream, *rest)


def layer_cells(config, layout, layer, way, device, rates):
    """Return the cells of one layer."""
    call = layer_call(config, layout, layer, way, device)
    time = milliseconds(call, device)
    least = floor(config, [layer], layout, rates, *WAYS[way])
    return cell(time), cell(least), cell(least and least / time, "{:.0%}"), cell(peak_gigabytes(call, device), "{:.2f}")


def as_variant(network, config):
    """Make a network sample as `config` says: positions and local layers are all that differs between the variants."""
    network.config = config
    for i, layer in enumerate(network.block.layers):
        layer.attention.radius = config.frame_receptive_field if i in config.local_attention_layers else None


def stage_call(network, layout, steps, device, fp8_attention):
    """Return a call that samples a whole stage: renoise for 8 steps, FlowUniPC for super-resolution's 5."""
    config = network.config
    noise = seeded_noise(0)
    video = torch.randn(
        1, config.video_in_channels // 4, layout.frames, 2 * layout.rows, 2 * layout.columns, device=device
    )
    audio = torch.randn(1, layout.audio, config.audio_in_channels, device=device)
    text = torch.randn(1, layout.text, config.text_in_channels, device=device)

    def velocity(video, audio, sigma):
        return network(video, audio, text, fp8_attention=fp8_attention)

    if config.positions == "v2":
        return lambda: denoise_renoise(velocity, video, audio, flow_sigmas(steps), noise=noise)
    return lambda: denoise_unipc(velocity, video, audio, flow_sigmas(steps), keep_audio=True)


def stage_table(device, rates, cpu):
    """Yield the lines of the whole stages, once after a warm-up of one step."""
    names = ("stage", "size", "precision", "s", "floor s", "floor/time", "published s (H100)", "peak GB beyond weights")
    yield from head(*names)
    for fp8 in (False, True):
        config = small(DISTILL) if cpu else DISTILL
        try:
            network = DiT(config, operations=operations_of(fp8), dtype=torch.bfloat16, device=device)
        except torch.OutOfMemoryError:
            yield f"| all | all | {'fp8' if fp8 else 'bf16'} | the weights do not fit this card |"
            continue
        randomise(network)
        for way in [way for way, (narrow, _) in WAYS.items() if narrow == fp8]:
            yield from stage_lines(network, way, device, rates, cpu)
        del network


def stage_lines(network, way, device, rates, cpu):
    """Yield the lines of one network's stages by one of the WAYS."""
    for size, layout in (SMALL_CLIPS if cpu else CLIPS).items():
        for variant, steps in STEPS.values() if cpu else (STEPS[size],):
            as_variant(network, small(variant) if cpu else variant)
            name = f"{steps} steps" + (", local layers" if network.config.local_attention_layers else "")
            at = (network, size, layout, steps, way)
            yield row_or_fault((name, size, way), lambda at=at: stage_cells(*at, device, rates))


def stage_cells(network, size, layout, steps, way, device, rates):
    """Return the cells of one stage."""
    fp8, fp8_attention = WAYS[way]
    peak = peak_gigabytes(stage_call(network, layout, 1, device, fp8_attention), device)
    seconds = once(stage_call(network, layout, steps, device, fp8_attention), device)
    least = floor(network.config, range(network.config.num_layers), layout, rates, fp8, fp8_attention)
    least = least and least * steps / 1000
    published = PUBLISHED[size][0] if size in PUBLISHED else None
    return (
        cell(seconds, "{:.2f}"),
        cell(least, "{:.2f}"),
        cell(least and least / seconds, "{:.0%}"),
        cell(published, "{}"),
        cell(peak, "{:.2f}"),
    )


def decode_table(device, rates, cpu):
    """Yield the lines of the Turbo decoder, weights random, in bf16; its operations are counted as it runs."""
    yield from head("decode", "size", "s", "floor s", "floor/time", "published s (H100)", "peak GB beyond weights")
    vae = TurboVAE(SMALL_TURBO if cpu else TURBO_7_7, dtype=torch.bfloat16, device=device).requires_grad_(False)
    for size, layout in (SMALL_CLIPS if cpu else CLIPS).items():
        yield row_or_fault(("TurboVAED", size), lambda at=(vae, size, layout): decode_cells(*at, device, rates))


def decode_cells(vae, size, layout, device, rates):
    """Return the cells of one decode."""
    channels = vae.config.latent_channels
    latent = torch.randn(1, channels, layout.frames, 2 * layout.rows, 2 * layout.columns, device=device)
    with FlopCounterMode(display=False) as counter:
        peak = peak_gigabytes(lambda: vae.decode(latent), device)
    seconds = once(lambda: vae.decode(latent), device)
    least = rates.floor(operations=counter.get_total_flops()) / 1000
    published = PUBLISHED[size][1] if size in PUBLISHED else None
    shown = cell(seconds, "{:.2f}"), cell(least, "{:.2f}"), f"{least / seconds:.0%}"
    return *shown, cell(published, "{}"), cell(peak, "{:.2f}")
