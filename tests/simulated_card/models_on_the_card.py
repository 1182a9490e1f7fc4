"""Script: transformers of every kind of weights, with and without a LoRA, under one way of managing memory.

Arguments: the built card, a mode, GiB, a folder for files, the file to which {name: latents} are saved. Modes:
"processor", "plain" (core's own partial loading), "dynamic" (comfy-aimdo's), and "kernels", which is dynamic with our
Triton kernels, interpreted.
"""

import os
import sys
from pathlib import Path

HERE = Path(__file__).parent
built, mode, gib, files_folder, results_file = (kind(word) for kind, word in zip(
    (Path, str, float, Path, Path), sys.argv[1:], strict=True
))  # fmt: skip
sys.argv = sys.argv[:1]
dynamic = mode in ("dynamic", "kernels")
if mode == "kernels":
    os.environ["TRITON_INTERPRET"] = "1"
    sys.path.append(str(HERE.parent / "kernels"))
sys.path[0] = os.environ["COMFYUI_PATH"]
if mode != "processor":
    sys.path.insert(1, str(HERE.parents[1] / "benchmarks" / "simulated_card"))
    import card

    card.put_in(built, gib)

import comfy.cli_args  # noqa: E402

comfy.cli_args.args.cpu = mode == "processor"
if dynamic:  # as main.py does
    import comfy_aimdo.control

    comfy_aimdo.control.init(implementation="cuda")

import comfy.memory_management  # noqa: E402
import comfy.model_management  # noqa: E402
import comfy.model_patcher  # noqa: E402

if dynamic:
    assert comfy_aimdo.control.init_devices([(0, 0)])
    comfy.model_patcher.CoreModelPatcher = comfy.model_patcher.ModelPatcherDynamic
    comfy.memory_management.aimdo_enabled = True

import runpy  # noqa: E402
import warnings  # noqa: E402
from dataclasses import replace  # noqa: E402

import comfy.ldm.modules.attention as core_attention  # noqa: E402
import comfy.sample  # noqa: E402
import comfy.samplers  # noqa: E402
import comfy.sd  # noqa: E402
import folder_paths  # noqa: E402
import torch  # noqa: E402
from comfy_extras.nodes_model_merging import save_checkpoint  # noqa: E402

runpy.run_path(str(HERE.parents[1] / "as_package.py"))["load_pack"]()
sys.path += [str(HERE.parent / "nodes"), str(HERE.parent / "model_loader")]
from gguf_on_disk import write  # noqa: E402
from pack.kernels import dispatch, restore_triton  # noqa: E402
from pack.model_loader import dit_layers, token_pieces, turbo_pieces, turbo_vae  # noqa: E402
from pack.model_loader.config import TURBO_7_7  # noqa: E402
from pack.model_loader.dit import DiT  # noqa: E402
from pack.model_loader.load import load_dit, published_tensors, save_part  # noqa: E402
from pack.model_loader.turbo_vae import TurboVAE  # noqa: E402
from pack.nodes import core_files, weight_dtypes  # noqa: E402
from pack.nodes.files import NANO_WEIGHTS  # noqa: E402
from pack.nodes.forward_options import ATTENTION  # noqa: E402
from pack.nodes.loaders import LoadModel  # noqa: E402
from pack.nodes.speed import with_attention, with_compiled_layers, with_fp8_attention  # noqa: E402
from pack.nodes.vae import load_video  # noqa: E402
from quantised_checks import make_lora  # noqa: E402

weight_dtypes.cpu_multiplies_bf16 = lambda: True  # bf16 everywhere, whatever this processor does by itself
FILE, BLOCKS, WIDE_HEADS = "tiny_distill.safetensors", "tiny_distill_Q8_0.gguf", "wide_heads_distill.safetensors"


def write_files():
    """Write the tiny transformer as a published file and as a .gguf file; return a LoRA for it."""
    torch.manual_seed(5)
    config = replace(load_dit(NANO_WEIGHTS / "nano_dit.safetensors").config, hidden_size=256, head_dim=32)
    network = DiT(config, dtype=torch.bfloat16).eval()
    if not (files_folder / FILE).exists():
        save_part(files_folder / FILE, network, "dit", config, "distill")
        tensors = published_tensors("dit", network.state_dict(), config)
        write(files_folder / BLOCKS, tensors, "Q8_0", "magihuman")
    config = replace(config, num_layers=2, head_dim=128, expert_layers=(0,))  # heads that the attention kernels serve
    save_part(files_folder / WIDE_HEADS, DiT(config, dtype=torch.bfloat16).eval(), "dit", config, "distill")
    folder_paths.folder_names_and_paths["diffusion_models"] = ([str(files_folder)], {".safetensors"})
    return make_lora(network)[0]


def recording_cuts():
    """Have every cut of a sequence write down whether short ones are to be cut too; return where."""
    asked, cut = set(), dit_layers.cut

    def recorded(spans, experts, short_too=False):
        asked.add(short_too)
        return cut(spans, experts, short_too)

    dit_layers.cut = recorded
    return asked


def sample(model):
    """Return the latent of three Euler steps, packed, as core samples."""
    from pack.nodes.conditioning import EmptyLatent

    latent = EmptyLatent.execute({"size": "custom", "width": 64, "height": 32}, 0.4).args[0]["samples"]
    text = torch.randn(1, 9, model.model.diffusion_model.config.text_in_channels, generator=torch.manual_seed(2))
    guider = comfy.samplers.CFGGuider(model)
    guider.set_conds([[text, {}]], [[text, {}]])
    guider.set_cfg(1.0)
    sampler, noise = comfy.samplers.ksampler("euler"), comfy.sample.prepare_noise(latent, 3)
    sampled = guider.sample(noise, latent, sampler, torch.tensor([1.0, 0.7, 0.3, 0.0]), disable_pbar=True, seed=3)
    return torch.cat([part.float().flatten().cpu() for part in sampled.unbind()])


def check_mapping(kind, model):
    """Under dynamic VRAM, weights as in their file can be read from there; what maps it may not be written to."""
    linears = [part for part in model.model.diffusion_model.modules() if hasattr(part, "in_features")]
    weights = [getattr(part.weight, "_qdata", part.weight) for part in linears]
    kept = [weight for weight in weights if kind == "bf16" or weight.dtype == torch.uint8]
    slices = [getattr(weight.untyped_storage(), core_files.SLICE, None) for weight in kept]
    mapped = [line for line in Path("/proc/self/maps").read_text().splitlines() if str(files_folder) in line]
    if dynamic and kind in ("bf16", "gguf"):
        assert kept and [stored.size for stored in slices] == [weight.nbytes for weight in kept]
        assert mapped and all(line.split()[1][1] == "-" for line in mapped)
    elif not dynamic:
        assert not any(slices)


def kinds_of_weights(lora):
    """Yield (name, latents) of every kind of weights: plain, with a LoRA, without it again, and as core saved both."""
    yield "decoded", decoded()
    for kind in ("bf16", "int8", "fp8_e4m3fn", "fp8_e4m3fn_fast", "gguf"):
        file, weight_dtype = (BLOCKS, "default") if kind == "gguf" else (FILE, kind)
        model = LoadModel.execute(file, weight_dtype).args[0]
        check_mapping(kind, model)
        changed, _ = comfy.sd.load_lora_for_models(model, None, lora, 1.0, 0.0)
        yield kind, sample(model)
        yield f"{kind}, LoRA", sample(changed)
        yield f"{kind}, LoRA off", sample(model)
        whole, token_pieces.PIECE = token_pieces.PIECE, 16  # tokens: a layer takes the clip in three pieces and more
        yield f"{kind}, pieces", sample(model)
        yield f"{kind}, LoRA, pieces", sample(changed)
        token_pieces.PIECE = whole
        name = f"merged_distill_{mode}_{gib}_{kind}"
        save_checkpoint(changed, filename_prefix=name, output_dir=str(files_folder))
        (saved,) = files_folder.glob(f"{name}*")
        if kind != "gguf":  # whose file is written, and refused with what to do: tests/nodes/test_gguf.py
            yield f"{kind}, saved", sample(LoadModel.execute(saved.name, "default").args[0])
        comfy.model_management.unload_all_models()


def decoded():
    """Return the frames of a tiny TurboVAED of random weights, and how many convolutions left out their biases."""
    config = replace(
        TURBO_7_7, block_out_channels=(24, 16, 12, 8), layers_per_block=(1,) * 5, first_chunk_size=2, step_size=1
    )
    torch.manual_seed(3)
    save_part(files_folder / "turbo.safetensors", TurboVAE(config), "video_vae", config, "turbo")
    apart, turbo_vae.Apart = [], lambda conv: apart.append(conv) or turbo_pieces.Apart(conv)
    latent = torch.randn(1, 48, 3, 2, 3, generator=torch.manual_seed(4))
    return load_video(files_folder / "turbo.safetensors").decode(latent).float().cpu(), torch.tensor(len(apart))


def with_cores_sage(model):
    """Return the MODEL with ComfyUI's own way to SageAttention, which repeats keys and values."""
    model, function = model.clone(), core_attention.get_attention_function("sage")
    options = model.model_options["transformer_options"]
    options[ATTENTION] = lambda _, *given, **named: function(*given, **named)
    return model


def counting(name):
    """Count the calls of a function of restore_triton; return where."""
    calls, function = [], getattr(restore_triton, name)
    setattr(restore_triton, name, lambda *given: calls.append(name) or function(*given))
    return calls


def kernels():
    """Yield (name, latents) with our kernels, and of layers that dynamo splits as for torch.compile."""
    from rounding import round_as_cards_do

    round_as_cards_do()
    assert dispatch.triton_kernels() is not None
    restore_triton.BLOCK_ROWS, restore_triton.BLOCK_RUNS = 256, 4096  # few programs: each takes a while
    restored = [counting(name) for name in ("restore_rows", "restore_blocks")]
    warnings.filterwarnings("error", message="Dynamo detected a call to a `functools.lru_cache`")  # it would go into it
    torch._dynamo.config.fail_on_recompile_limit_hit = True
    yield "decoded", decoded()
    for kind in ("bf16", "int8", "fp8_e4m3fn_fast"):
        yield kind, sample(LoadModel.execute(FILE, kind).args[0])
        yield f"{kind}, compiled", sample(with_compiled_layers(LoadModel.execute(FILE, kind).args[0], backend="eager"))
    yield "gguf", sample(LoadModel.execute(BLOCKS, "default").args[0])
    yield "restored", torch.tensor([len(calls) for calls in restored])
    model = LoadModel.execute(WIDE_HEADS, "bf16").args[0]
    yield "wide heads", sample(model)
    yield "sage attention", sample(with_attention(model, "sage"))
    yield "core's sage attention", sample(with_cores_sage(model))
    yield "sage attention, compiled", sample(with_compiled_layers(with_attention(model, "sage"), backend="eager"))
    yield "fp8 attention", sample(with_fp8_attention(model))
    token_pieces.PIECE = 16  # tokens
    yield "fp8 attention, pieces", sample(with_fp8_attention(model))
    yield "fp8 attention, compiled", sample(with_compiled_layers(with_fp8_attention(model), backend="eager"))


with torch.inference_mode():
    a_lora, asked = write_files(), recording_cuts()
    found = dict(kernels() if mode == "kernels" else kinds_of_weights(a_lora))
    assert asked == {mode != "processor"}, "short clips are cut between experts on cards, and only there"
    torch.save(found, results_file)
