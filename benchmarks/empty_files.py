"""Full-size model files that hold zeros and take no room on the disk: for what depends on shapes alone."""

import json
from pathlib import Path

import torch

from ..model_loader.checkpoint import Checkpoint, TensorHeader
from ..model_loader.convert import FORMATS, LINEARS
from ..model_loader.safetensors_writer import SafetensorsWriter
from ..model_loader.tokenizer import tokenizer_definition

ROOT = Path(__file__).parent.parent
MANIFEST = ROOT / "tests" / "golden" / "manifest_full.json"
TOKENIZER = ROOT / "nano" / "weights" / "nano_text_encoder.safetensors"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def write_empty(path, component, precision="bf16"):
    """Write a component of the manifest as a sparse safetensors file.

    precision: of a transformer's or text encoder's linears, "bf16", or "int8" or "fp8" as `convert` writes them, with
    scales of one.
    """
    headers, formats = {}, {}
    prefix, linears = component.get("checkpoint_prefix", "").split("*")[0], LINEARS[precision]
    for name, (shape, dtype) in component["state_dict"].items():
        wanted = DTYPES[dtype]
        if name.endswith(".weight") and len(shape) == 2 and "layers." in name:
            layer, wanted = prefix + name.removesuffix(".weight"), linears
            if linears in FORMATS:
                formats[layer] = {"format": FORMATS[linears]}
                scales = (shape[0], 1) if linears == torch.int8 else ()
                headers[f"{layer}.weight_scale"] = TensorHeader(scales, torch.float32)
        headers[prefix + name] = TensorHeader(tuple(shape), wanted)
    metadata = {"_quantization_metadata": json.dumps({"format_version": "1.0", "layers": formats})} if formats else {}
    SparseWriter(path, headers, metadata).write_empty(1.0, ".weight_scale")


class SparseWriter(SafetensorsWriter):
    """A safetensors file of zeros, and of one value where names end so."""

    def write_empty(self, value, ending):
        """Write the file at once."""
        with self.path.open("wb") as self._file:
            self._file.write(self._header)
            self._file.truncate(self.size)
            for name in self._cursors:
                if name.endswith(ending):
                    self.write(name, torch.full(((self._ends[name] - self._cursors[name]) // 4,), value))


def write_models(folder, precision):
    """Write a whole pipeline's files below `folder`, in ComfyUI's folders, and nano's tokenizer beside T5Gemma."""
    components = json.loads(MANIFEST.read_text(encoding="utf-8"))["components"]
    places = {f"diffusion_models/{name}.safetensors": "dit" for name in ("distill", "540p_sr", "1080p_sr")}
    places |= {"text_encoders/t5gemma.safetensors": "t5gemma_9b_encoder", "vae/wan2.2_vae.safetensors": "wan2.2_vae"}
    places |= {"vae/turbo_vae.safetensors": "turbo_vaed", "vae/sd_audio.safetensors": "oobleck"}
    for place, component in places.items():
        path = folder / place
        path.parent.mkdir(parents=True, exist_ok=True)
        quantised = component in ("dit", "t5gemma_9b_encoder")
        write_empty(path, components[component], precision if quantised else "bf16")
    tokenizer = tokenizer_definition(Checkpoint.open(TOKENIZER))
    (folder / "text_encoders" / "tokenizer.json").write_text(tokenizer, encoding="utf-8")
