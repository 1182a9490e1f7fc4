"""LoRA files of every key style, for stock LoRA loaders.

Core names our layers `diffusion_model.block.layers.0.attention.linear_qkv.video` and knows LoRAs under that name or its
kohya form. For every layer it also asks each class in `comfy.weight_adapter.adapters`; ours looks for the same layer
under the names that other tools give it. What nobody claims core reports ("lora key not loaded").
"""

import re

import comfy.weight_adapter
from comfy.weight_adapter import LoRAAdapter, WeightAdapterBase

from ..model_loader.dit_layers import MODALITIES
from ..model_loader.layouts import QKV

LAYER = re.compile(
    r"diffusion_model\.(block\.layers\.\d+\.(?:attention|mlp)\.\w+|adapter\.\w+|final_linear_\w+)"
    rf"(?:\.({'|'.join(MODALITIES)}))?"
)
PREFIXES = ("", "diffusion_model.", "transformer.", "base_model.model.", "base_model.model.diffusion_model.", "model.")
FLAT_PREFIXES = ("lora_unet_", "lora_transformer_", "lycoris_")  # dots become underscores
FUSED = "linear_qkv"
UP, DOWN, ALPHA, MID, DORA, RESHAPE = range(6)  # places in a LoRAAdapter's weights


class HappyHorseLora(WeightAdapterBase):
    """Finds a layer's LoRA; as an object, the LoRAs of q, k, v and gate on the rows of a fused linear.

    weights: for each of QKV the weights of a LoRAAdapter, or None.
    """

    name = "lora"

    def __init__(self, loaded_keys, weights):
        self.loaded_keys = loaded_keys
        self.weights = weights

    @classmethod
    def load(cls, x, lora, alpha, dora_scale, loaded_keys=None):
        """Return the adapter of the layer that core calls `x` if the file `lora` has it under another name, else None.

        The names it was found under go into `loaded_keys`.
        """
        match = LAYER.fullmatch(x)
        if match is None:
            return None
        loaded_keys = set() if loaded_keys is None else loaded_keys
        layer, modality = match.groups()
        if modality is None:
            return _find(layer, lora, loaded_keys) or cls._split(layer, "", lora, loaded_keys)
        return (
            _find(f"{layer}.{modality}", lora, loaded_keys)
            or _find(f"{layer}_{modality}", lora, loaded_keys)
            or _expert(layer, MODALITIES.index(modality), lora, loaded_keys)
            or cls._split(layer, f"_{modality}", lora, loaded_keys)
        )

    @classmethod
    def _split(cls, layer, suffix, lora, loaded_keys):
        if not layer.endswith(FUSED):
            return None
        parts = [_find(layer.removesuffix(FUSED) + name + suffix, lora, loaded_keys) for name in QKV]
        weights = tuple(part and part.weights for part in parts)
        return cls(loaded_keys, weights) if any(weights) else None

    def _parts(self, rows, width):
        """Return (first row, number of rows, adapter) of each part of a fused weight [rows, width]."""
        counts = [weights[UP].shape[0] if weights else 0 for weights in self.weights]
        first = (0, width, width + counts[2], rows - counts[3])  # q has `width` rows, k and v equally many
        adapters = [weights and LoRAAdapter(self.loaded_keys, weights) for weights in self.weights]
        return [part for part in zip(first, counts, adapters, strict=True) if part[2]]

    def calculate_weight(self, weight, *args, **kwargs):
        """Add each part to its rows of `weight`, in place, as LoRAAdapter does to a whole weight."""
        for first, count, adapter in self._parts(*weight.shape):
            adapter.calculate_weight(weight[first : first + count], *args, **kwargs)
        return weight

    def h(self, x, base_out):
        """Return what the parts add to a layer's output where the weight itself cannot be changed."""
        added = base_out.new_zeros(base_out.shape)
        for first, count, adapter in self._parts(base_out.shape[-1], x.shape[-1]):
            adapter.multiplier = self.multiplier
            added[..., first : first + count] = adapter.h(x, base_out)
        return added


def register_lora_names():
    """Let stock LoRA loaders ask HappyHorseLora as well."""
    if HappyHorseLora not in comfy.weight_adapter.adapters:
        comfy.weight_adapter.adapters.append(HappyHorseLora)


def _spellings(name):
    yield from (prefix + name for prefix in PREFIXES)
    yield from (prefix + name.replace(".", "_") for prefix in FLAT_PREFIXES)


def _scale(name, kind, lora, loaded_keys):
    tensor = lora.get(f"{name}.{kind}")
    if tensor is not None:
        loaded_keys.add(f"{name}.{kind}")
    return tensor


def _find(layer, lora, loaded_keys):
    """Return the LoRAAdapter of one layer under any prefix and any of core's names for the two matrices, or None."""
    for name in _spellings(layer):
        adapter = LoRAAdapter.load(name, lora, None, None, loaded_keys)
        if adapter is not None:
            alpha = _scale(name, "alpha", lora, loaded_keys)
            dora = _scale(name, "dora_scale", lora, loaded_keys)
            up, down, _, mid, _, reshape = adapter.weights
            return LoRAAdapter(loaded_keys, (up, down, None if alpha is None else alpha.item(), mid, dora, reshape))
    return None


def _expert(layer, index, lora, loaded_keys):
    """Return the LoRAAdapter of one expert from a LoRA on the stacked layer, or from a list of one LoRA an expert."""
    stacked = _find(layer, lora, loaded_keys)
    if stacked is not None:
        up, down, alpha, mid, dora, reshape = stacked.weights
        if up.shape[0] % len(MODALITIES):
            raise ValueError(
                f"LoRA for {layer}: {up.shape[0]} rows; expected those of {len(MODALITIES)} experts, video, audio and "
                "text, of equal size. It was made for another model."
            )
        if dora is not None and dora.shape[0] == up.shape[0]:
            dora = dora.chunk(len(MODALITIES))[index]
        return LoRAAdapter(loaded_keys, (up.chunk(len(MODALITIES))[index], down, alpha, mid, dora, reshape))
    for name in _spellings(layer):
        up, down = (f"{name}.lora_{matrix}.{index}.weight" for matrix in "BA")
        if up in lora and down in lora:
            loaded_keys |= {up, down}
            alpha = _scale(name, "alpha", lora, loaded_keys)
            return LoRAAdapter(loaded_keys, (lora[up], lora[down], alpha and alpha.item(), None, None, None))
    return None
