"""Every published layout: tiny files compute what the native network does; every full-size tensor has its place."""

import hashlib
import json
import math
import struct
from collections import namedtuple

import pytest
import torch
from layouts_on_disk import EXACT, LAYOUTS, diffusers_oobleck, diffusers_wan
from pack.model_loader.checkpoint import Checkpoint
from pack.model_loader.config import STABLE_AUDIO, T5GEMMA_9B, TURBO_7_7, WAN22_VAE
from pack.model_loader.detect import DIT_VARIANTS, describe
from pack.model_loader.key_map import KEY_MAPS
from pack.model_loader.layouts import as_published
from pack.model_loader.load import (
    expected_tensors,
    load_audio_vae,
    load_dit,
    load_text_encoder,
    load_video_vae,
    plan,
    published_tensors,
)
from pack.verify.case import GOLDEN
from safetensors.torch import save_file
from sparse_file import extend

Network = namedtuple("Network", "key component preset load")
NETWORKS = {  # key: of KEY_MAPS; component: of the manifest
    "text_encoder": Network(
        "text_encoder", "t5gemma_9b_encoder", T5GEMMA_9B, lambda path: load_text_encoder(path, dtype=torch.float32)
    ),
    "turbo": Network("turbo_vae", "turbo_vaed", TURBO_7_7, load_video_vae),
    "wan": Network("wan_vae", "wan2.2_vae", WAN22_VAE, load_video_vae),
    "oobleck": Network("oobleck", "oobleck", STABLE_AUDIO, load_audio_vae),
}
for _variant, _preset in DIT_VARIANTS.items():
    NETWORKS[_variant] = Network("dit", "dit", _preset, lambda path: load_dit(path, dtype=torch.float32))
COMPONENTS = json.loads((GOLDEN / "manifest_full.json").read_text())["components"]
# sha256 of the names and shapes that diffusers 0.42.1 gives the two networks at full size, see `digest`.
DIFFUSERS = {
    "wan": (diffusers_wan, "7f91be2a05f1ba0975f8777ce6e217f70919a3318a01d0ee5a879d251a1278eb"),
    "oobleck": (diffusers_oobleck, "7118395061bd577b1623dc62d793b08015d1bbbaf67c2612bcefca3a530f7ce9"),
}

NAMES = {torch.float32: "F32", torch.bfloat16: "BF16", torch.float8_e4m3fn: "F8_E4M3", torch.uint8: "U8"}


def write(files, folder):
    """Write {path: tensors by name, or what a .json holds}."""
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".json":
            target.write_text(json.dumps(content))
        elif target.suffix == ".safetensors":
            save_file({name: tensor.contiguous() for name, tensor in content.items()}, target)
        else:
            torch.save(content, target)


def write_sparse(files, folder):
    """Write the same files with names, shapes and dtypes only: where the content would be, they have holes."""
    for path, content in files.items():
        target = folder / path
        target.parent.mkdir(parents=True, exist_ok=True)
        if target.suffix == ".json":
            target.write_text(json.dumps(content))
        elif target.suffix == ".safetensors":
            header, end = {}, 0
            for name, tensor in content.items():
                start, end = end, end + math.prod(tensor.shape) * tensor.dtype.itemsize
                dtype = NAMES[tensor.dtype]
                header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [start, end]}
            text = json.dumps(header).encode()
            with target.open("wb") as file:
                file.write(struct.pack("<Q", len(text)) + text)
                extend(file, 8 + len(text) + end)
        else:
            with torch.serialization.skip_data():
                torch.save(on_cpu(content), target)


def on_cpu(content):
    if isinstance(content, dict):
        return {name: on_cpu(value) for name, value in content.items()}
    return torch.empty_like(content, device="cpu") if isinstance(content, torch.Tensor) else content


def full_size(network):
    """Return {published name: meta tensor} of the manifest, which leaves out what precedes the text encoder's names."""
    component = COMPONENTS[NETWORKS[network].component]
    root = "model." if network == "text_encoder" else ""
    dtypes = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    return {
        root + name: torch.empty(shape, dtype=dtypes[dtype], device="meta")
        for name, (shape, dtype) in component["state_dict"].items()
    }


@torch.no_grad()
def outputs(network, module, clip):
    """Run a network both ways, where it has two, on the same input; returns one vector."""
    random = torch.Generator().manual_seed(8)
    if network == "text_encoder":
        found = [module(torch.tensor([[5, 9, 1, 30, 2, 7, 44, 12]]))]
    elif network == "turbo":
        found = [module.decode(torch.randn(1, 48, 3, 2, 3, generator=random))]
    elif network == "wan":
        pixels, latent = torch.rand(1, 3, 5, 32, 48, generator=random), torch.randn(1, 48, 2, 2, 3, generator=random)
        found = [module.encode(pixels), module.decode_raw(latent)]
    elif network == "oobleck":
        sound, latent = torch.randn(1, 2, 4096, generator=random), torch.randn(1, 64, 3, generator=random)
        found = [*module.encode_raw(sound), module.decode(latent)]
    else:
        found = module(*(stream[:1] for stream in clip))
    return torch.cat([tensor.flatten() for tensor in found])


@pytest.mark.parametrize("name", LAYOUTS)
def test_tiny_files_compute_what_the_native_network_does(tmp_path, tiny, clip, name):
    layout = LAYOUTS[name]
    native = tiny(layout.network)
    key = NETWORKS[layout.network].key
    write(layout.build(published_tensors(key, native.state_dict(), native.config), native.config), tmp_path)
    found = NETWORKS[layout.network].load(tmp_path / layout.path)
    assert found.config == native.config
    meant = outputs(layout.network, native, clip)
    error = (outputs(layout.network, found, clip) - meant).norm() / meant.norm()
    assert error <= layout.bound
    assert layout.bound == EXACT or error > layout.bound / 20  # the bound means something


@pytest.mark.parametrize("name", LAYOUTS)
def test_full_size_headers_are_recognised_and_every_tensor_has_its_place(tmp_path, name):
    layout = LAYOUTS[name]
    network = NETWORKS[layout.network]
    published = full_size(layout.network)
    write_sparse(layout.build(published, network.preset), tmp_path)
    checkpoint = as_published(Checkpoint.open(tmp_path / layout.path))
    found = describe(checkpoint)
    assert (found.network, found.config) == (network.key, network.preset)
    wanted = expected_tensors(found.network, found.config, dtype=torch.bfloat16)
    places = plan(found.network, checkpoint, found.prefix, wanted)  # raises where one of ours is missing
    keys = KEY_MAPS[network.key]
    assert len(places) == len(published) - sum(name in published for name in keys.computed)
    smallest = min(places, key=lambda place: torch.Size(checkpoint.headers[place].shape).numel())
    assert not checkpoint.read(smallest).any()


@pytest.mark.parametrize("network", DIFFUSERS)
def test_the_builders_know_diffusers_names(network):
    build, digest = DIFFUSERS[network]
    tensors = build(full_size(network), NETWORKS[network].preset)
    found = json.dumps(sorted([name, list(tensor.shape)] for name, tensor in tensors.items()))
    assert hashlib.sha256(found.encode()).hexdigest() == digest
