"""Tensor names as data: how each network is recognised in a file, and how file names and our names correspond."""

from dataclasses import dataclass

from .dit_layers import MODALITIES


@dataclass(frozen=True, slots=True)
class KeyMap:
    """Names of one network in files.

    part: the role it plays. signature: a tensor that every file of it holds. roots: what its published names begin
    with, most specific first; files may put anything before (`model.`, `diffusion_model.`, `module.`,
    `pretransform.model.`). suffixes: (file, ours) pairs of name endings. computed: tensors that files may hold and the
    network computes instead. extras: whether training leaves other tensors among ours.
    """

    part: str
    signature: str
    roots: tuple[str, ...] = ("",)
    suffixes: tuple[tuple[str, str], ...] = ()
    computed: tuple[str, ...] = ()
    extras: bool = False

    def prefix(self, names):
        """Return what stands before this network's names in a file, or None where the file does not hold it."""
        for root in self.roots:
            ending = root + self.signature
            found = [name for name in names if name == ending or name.endswith("." + ending)]
            if found:
                return min(found, key=len)[: -len(self.signature)]
        return None

    def to_ours(self, name):
        """Rename one tensor from its file name without prefix to ours."""
        return next((name.removesuffix(file) + ours for file, ours in self.suffixes if name.endswith(file)), name)

    def to_file(self, name):
        """Rename one tensor from our name to the published one, root included."""
        renamed = next((name.removesuffix(ours) + file for file, ours in self.suffixes if name.endswith(ours)), name)
        return self.published_root + renamed

    @property
    def published_root(self):
        """What files that we write put before every name."""
        return self.roots[0]


WEIGHT_NORM = ((".weight_g", ".parametrizations.weight.original0"), (".weight_v", ".parametrizations.weight.original1"))

KEY_MAPS = {
    "dit": KeyMap("dit", "adapter.video_embedder.weight", computed=("adapter.rope.bands",)),
    "text_encoder": KeyMap(
        "text_encoder", "layers.0.pre_self_attn_layernorm.weight", roots=("model.encoder.", "encoder.", "")
    ),
    "wan_vae": KeyMap("video_vae", "decoder.middle.0.residual.0.gamma"),
    "turbo_vae": KeyMap("video_vae", "conv_in.conv.weight", roots=("decoder.", ""), extras=True),
    "oobleck": KeyMap("audio_vae", "encoder.layers.1.layers.0.layers.0.alpha", suffixes=WEIGHT_NORM),
}


def split_names(name, ours):
    """Return our names that one file tensor fills, in row order: itself, its three experts, or nothing."""
    if name in ours:
        return (name,)
    experts = expert_names(name)
    return experts if all(expert in ours for expert in experts) else ()


def expert_names(name):
    """`x.linear_qkv.weight` -> `x.linear_qkv.video.weight`, `.audio.weight`, `.text.weight`."""
    stem, _, leaf = name.rpartition(".")
    return tuple(f"{stem}.{modality}.{leaf}" for modality in MODALITIES)


def stacked_name(name):
    """Undo `expert_names`: `x.linear_qkv.audio.weight` -> `x.linear_qkv.weight`; other names stay."""
    stem, _, leaf = name.rpartition(".")
    owner, _, modality = stem.rpartition(".")
    return f"{owner}.{leaf}" if modality in MODALITIES else name
