"""LoRA through the stock loader: every key style gives what the delta added by hand gives; strangers are reported."""

import copy
import logging

import comfy.sd
import comfy.weight_adapter
import folder_paths
import pytest
import torch
from pack.nodes.host import load_model
from pack.nodes.lora import HappyHorseLora, register_lora_names
from pack.nodes.sampling import Sampler
from safetensors.torch import save_file

import nodes as stock

RANK, ALPHA, STRENGTH = 4, 2.0, 0.7
MODALITIES = ("video", "audio", "text")
SHARED, EXPERTS = "block.layers.1.mlp.down_proj", "block.layers.0.attention.linear_proj"
QKV, EXPERT_QKV = "block.layers.1.attention.linear_qkv", "block.layers.3.attention.linear_qkv"
# rows of q, k, v and gate in conftest's DIT: 64 wide, 4 heads of 16, 2 groups
ROWS = {"q": slice(0, 64), "k": slice(64, 96), "v": slice(96, 128), "g": slice(128, 132)}


@pytest.fixture(scope="module", autouse=True)
def registered():
    register_lora_names()
    register_lora_names()
    assert comfy.weight_adapter.adapters.count(HappyHorseLora) == 1


@pytest.fixture(scope="module")
def model(weights):
    return load_model(weights / "nano_dit.safetensors", torch.float32)


class LoraFile:
    """Random LoRAs under the names of one style, and the deltas that they mean."""

    def __init__(self, model, alpha=None):
        self.model = model
        self.alpha = alpha
        self.tensors, self.deltas = {}, {}
        self.generator = torch.Generator().manual_seed(7)

    def draw(self, *shape):
        return torch.randn(shape, generator=self.generator) * 0.2

    def width(self, layer):
        module = self.model.model.diffusion_model.get_submodule(layer)
        return getattr(module, "video", module).weight.shape[1]

    def rows(self, layer):
        module = self.model.model.diffusion_model.get_submodule(layer)
        return getattr(module, "video", module).weight.shape[0]

    def pair(self, name, rows, width, up=".lora_B.weight", down=".lora_A.weight"):
        """Put one LoRA into the file and return its delta [rows, width]."""
        self.tensors[name + up], self.tensors[name + down] = self.draw(rows, RANK), self.draw(RANK, width)
        if self.alpha is not None:
            self.tensors[f"{name}.alpha"] = torch.tensor(self.alpha)
        return self.tensors[name + up] @ self.tensors[name + down] * ((self.alpha or RANK) / RANK)

    def mean(self, layer, delta, rows=slice(None)):
        """Note that a delta belongs to rows of one of our linears."""
        weight = self.model.model.diffusion_model.get_submodule(layer).weight
        self.deltas.setdefault(layer, torch.zeros_like(weight))[rows] += delta


def named(prefix, flat=False, **matrices):
    """Return a style: the native module names behind `prefix`, experts as modules of their own and stacked."""

    def write(file):
        spell = (lambda name: prefix + name.replace(".", "_")) if flat else (lambda name: prefix + name)
        file.mean(SHARED, file.pair(spell(SHARED), file.rows(SHARED), file.width(SHARED), **matrices))
        own = f"{EXPERT_QKV}.audio"
        file.mean(own, file.pair(spell(own), file.rows(own), file.width(own), **matrices))
        stacked = file.pair(spell(EXPERTS), 3 * file.rows(EXPERTS), file.width(EXPERTS), **matrices)
        for modality, delta in zip(MODALITIES, stacked.chunk(3), strict=True):
            file.mean(f"{EXPERTS}.{modality}", delta)

    return write


def split_experts(prefix):
    """Return WanGP's style: q, k, v and gate apart, experts by suffix."""

    def write(file):
        for part, rows in ROWS.items():
            name = QKV.replace("linear_qkv", f"linear_{part}")
            if part != "g":  # shared layers here without their gate
                file.mean(QKV, file.pair(prefix + name, rows.stop - rows.start, file.width(QKV)), rows)
            for modality in ("video", "text"):
                name = EXPERT_QKV.replace("linear_qkv", f"linear_{part}_{modality}")
                delta = file.pair(prefix + name, rows.stop - rows.start, file.width(EXPERT_QKV))
                file.mean(f"{EXPERT_QKV}.{modality}", delta, rows)
        file.mean(f"{EXPERTS}.video", file.pair(f"{prefix}{EXPERTS}_video", file.rows(EXPERTS), file.width(EXPERTS)))
        file.mean(SHARED, file.pair(prefix + SHARED, file.rows(SHARED), file.width(SHARED)))

    return write


def listed_experts(file):
    """The public trainer's style: a list of one LoRA an expert."""
    for index, modality in enumerate(MODALITIES):
        matrices = {"up": f".lora_B.{index}.weight", "down": f".lora_A.{index}.weight"}
        file.mean(f"{EXPERTS}.{modality}", file.pair(EXPERTS, file.rows(EXPERTS), file.width(EXPERTS), **matrices))
    file.mean(SHARED, file.pair(SHARED, file.rows(SHARED), file.width(SHARED)))


KOHYA = {"up": ".lora_up.weight", "down": ".lora_down.weight"}
STYLES = {
    "native": (named(""), None),
    "native with prefix": (named("diffusion_model."), ALPHA),
    "diffusers": (named("transformer."), None),
    "peft": (named("base_model.model."), ALPHA),
    "peft, adapter named": (
        named("base_model.model.", up=".lora_B.default.weight", down=".lora_A.default.weight"), None,
    ),
    "kohya": (named("lora_unet_", flat=True, **KOHYA), ALPHA),
    "lycoris": (named("lycoris_", flat=True, **KOHYA), ALPHA),
    "split experts": (split_experts("diffusion_model."), ALPHA),
    "split experts, bare": (split_experts(""), None),
    "listed experts": (listed_experts, None),
}  # fmt: skip


def written(model, style):
    write, alpha = STYLES[style]
    file = LoraFile(model, alpha)
    write(file)
    return file


def forward(network):
    generator = torch.Generator().manual_seed(1)
    shapes = ((1, 48, 2, 4, 6), (1, 5, 64), (1, 7, 48))
    return network(*(torch.randn(shape, generator=generator) for shape in shapes))


@pytest.mark.parametrize("style", STYLES)
def test_every_style_is_the_delta_added_by_hand(model, style, caplog):
    file = written(model, style)
    by_hand = copy.deepcopy(model.model.diffusion_model)
    for layer, delta in file.deltas.items():
        by_hand.get_submodule(layer).weight += STRENGTH * delta
    before = forward(model.model.diffusion_model)
    with caplog.at_level(logging.WARNING):
        patched, _ = comfy.sd.load_lora_for_models(model, None, file.tensors, STRENGTH, 0.0)
    assert "not loaded" not in caplog.text.lower() and len(patched.patches) == len(file.deltas)
    patched.patch_model()
    found = forward(model.model.diffusion_model)
    patched.unpatch_model()
    for x, y, z, again in zip(found, forward(by_hand), before, forward(model.model.diffusion_model), strict=True):
        torch.testing.assert_close(x, y, atol=1e-5, rtol=1e-5)
        assert not torch.allclose(x, z, atol=1e-3) and torch.equal(z, again)


def test_layers_whose_weights_cannot_be_changed(model, latent, prompt):
    """Core's bypass loader adds a LoRA to each layer's output instead."""
    tensors = written(model, "split experts").tensors
    merged, _ = comfy.sd.load_lora_for_models(model, None, tensors, STRENGTH, 0.0)
    beside, _ = comfy.sd.load_bypass_lora_for_models(model, None, tensors, STRENGTH, 0.0)
    runs = (Sampler.execute(one, prompt, latent, 0, 1, 5.0).args[0]["samples"] for one in (merged, beside, model))
    for x, y, z in zip(*(run.unbind() for run in runs), strict=True):
        torch.testing.assert_close(x, y, atol=1e-4, rtol=1e-4)
        assert not torch.allclose(x, z, atol=1e-3)


def test_an_unknown_key_is_reported_and_the_others_count(model, caplog):
    file = written(model, "diffusers")
    file.tensors["transformer.block.layers.9.mlp.down_proj.lora_A.weight"] = torch.zeros(4, 4)
    file.tensors["transformer.blocks.0.attn1.to_q.lora_A.weight"] = torch.zeros(4, 4)
    with caplog.at_level(logging.WARNING):
        patched, _ = comfy.sd.load_lora_for_models(model, None, file.tensors, 1.0, 0.0)
    assert "lora key not loaded: transformer.block.layers.9.mlp.down_proj.lora_A.weight" in caplog.text
    assert "lora key not loaded: transformer.blocks.0.attn1.to_q.lora_A.weight" in caplog.text
    assert len(patched.patches) == len(file.deltas)


def test_rows_that_are_not_three_experts_are_refused(model):
    tensors = {f"{EXPERTS}.lora_B.weight": torch.zeros(100, 4), f"{EXPERTS}.lora_A.weight": torch.zeros(4, 64)}
    with pytest.raises(ValueError, match=f"LoRA for {EXPERTS}: 100 rows; expected those of 3 experts"):
        comfy.sd.load_lora_for_models(model, None, tensors, 1.0, 0.0)


def test_the_stock_node_takes_it_from_its_folder(model, tmp_path, monkeypatch):
    file = written(model, "peft")
    save_file({name: tensor.contiguous() for name, tensor in file.tensors.items()}, tmp_path / "mine.safetensors")
    monkeypatch.setitem(folder_paths.folder_names_and_paths, "loras", ([str(tmp_path)], {".safetensors"}))
    (patched,) = stock.LoraLoaderModelOnly().load_lora_model_only(model, "mine.safetensors", STRENGTH)
    assert {f"diffusion_model.{layer}.weight" for layer in file.deltas} == set(patched.patches)
