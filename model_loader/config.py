"""What a network looks like: frozen configurations of the five networks and the presets of the published weights.

Sources: daVinci-MagiHuman (arXiv 2603.21986) for the DiT, its TurboVAED release for the turbo decoder, the T5Gemma 9B,
Wan2.2 and stable-audio-open-1.0 releases for the rest.
"""

from dataclasses import asdict, dataclass, replace

PATCH = (1, 2, 2)  # latent frames, rows and columns that make one video token

# Statistics of the Wan2.2 video latent: normalised = (latent - mean) / std.
WAN22_LATENT_MEAN = (
    -0.2289, -0.0052, -0.1323, -0.2339, -0.2799, 0.0174, 0.1838, 0.1557, -0.1382, 0.0542, 0.2813, 0.0891,
    0.1570, -0.0098, 0.0375, -0.1825, -0.2246, -0.1207, -0.0698, 0.5109, 0.2665, -0.2108, -0.2158, 0.2502,
    -0.2055, -0.0322, 0.1109, 0.1567, -0.0729, 0.0899, -0.2799, -0.1230, -0.0313, -0.1649, 0.0117, 0.0723,
    -0.2839, -0.2083, -0.0520, 0.3748, 0.0152, 0.1957, 0.1433, -0.2944, 0.3573, -0.0548, -0.1681, -0.0667,
)  # fmt: skip
WAN22_LATENT_STD = (
    0.4765, 1.0364, 0.4514, 1.1677, 0.5313, 0.4990, 0.4818, 0.5013, 0.8158, 1.0344, 0.5894, 1.0901,
    0.6885, 0.6165, 0.8454, 0.4978, 0.5759, 0.3523, 0.7135, 0.6804, 0.5833, 1.4146, 0.8986, 0.5659,
    0.7069, 0.5338, 0.4889, 0.4917, 0.4069, 0.4999, 0.6866, 0.4093, 0.5709, 0.6065, 0.6415, 0.4944,
    0.5726, 1.2042, 0.5458, 1.6887, 0.3971, 1.0600, 0.3943, 0.5537, 0.5444, 0.4089, 0.7468, 0.7744,
)  # fmt: skip


class _JsonConfig:
    """Round trip of a configuration through plain JSON values, for safetensors headers."""

    __slots__ = ()

    def to_dict(self):
        """Return the fields as JSON values."""
        return asdict(self)

    @classmethod
    def from_dict(cls, fields):
        """Build the configuration from `to_dict` (lists become tuples); ValueError on missing or unknown fields."""
        try:
            return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in fields.items()})
        except TypeError as error:
            raise ValueError(
                f"{cls.__name__}: {error}. The file was written for another version of this pack."
            ) from None


@dataclass(frozen=True, slots=True)
class DiTConfig(_JsonConfig):
    """The joint audio-video transformer. `*_in_channels` are features per token; layer tuples hold layer numbers.

    expert_layers: layers with one weight set per modality. gelu7_layers: plain MLP of 4x width, all others are gated.
    local_attention_layers: video sees `frame_receptive_field` latent frames to either side. positions: "v1"
    (super-resolution) or "v2" (base, distill).
    """

    num_layers: int
    hidden_size: int
    head_dim: int
    num_query_groups: int  # key/value heads; there are hidden_size // head_dim query heads
    video_in_channels: int
    audio_in_channels: int
    text_in_channels: int
    expert_layers: tuple[int, ...]
    gelu7_layers: tuple[int, ...]
    local_attention_layers: tuple[int, ...]
    frame_receptive_field: int
    positions: str

    def __post_init__(self):
        if self.hidden_size % self.head_dim or self.num_heads % self.num_query_groups:
            raise ValueError(
                f"hidden_size {self.hidden_size} must be heads x head_dim {self.head_dim}, and the heads a multiple of "
                f"num_query_groups {self.num_query_groups}"
            )
        if self.head_dim % 8:
            raise ValueError(f"head_dim {self.head_dim} must be a multiple of 8 (three axes of rotary bands)")
        if self.video_in_channels % (PATCH[0] * PATCH[1] * PATCH[2]):
            raise ValueError(
                f"video_in_channels {self.video_in_channels} must be 4 x latent channels (patches are 1x2x2)"
            )
        if self.positions not in ("v1", "v2"):
            raise ValueError(f'positions must be "v1" or "v2", not {self.positions!r}')
        for name in ("expert_layers", "gelu7_layers", "local_attention_layers"):
            outside = [i for i in getattr(self, name) if not 0 <= i < self.num_layers]
            if outside:
                raise ValueError(f"{name} names layer {outside[0]}, but there are {self.num_layers} layers")

    @property
    def num_heads(self):
        """Query heads."""
        return self.hidden_size // self.head_dim

    def mlp_width(self, layer):
        """Width of a layer's MLP after its activation: 4 x hidden, or a multiple of 4 near 8/3 x hidden where gated."""
        return self.hidden_size * 4 if layer in self.gelu7_layers else int(self.hidden_size * 8 / 3) // 4 * 4


@dataclass(frozen=True, slots=True)
class TextEncoderConfig(_JsonConfig):
    """T5Gemma encoder. `attention_softcap` is None where attention runs without it, as in the published pipeline."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    sliding_window: int
    attention_softcap: float | None
    rope_theta: float
    norm_eps: float

    def __post_init__(self):
        if self.num_heads % self.num_key_value_heads or self.head_dim % 2:
            raise ValueError(
                f"{self.num_heads} heads must be a multiple of {self.num_key_value_heads} key/value heads, "
                f"and head_dim {self.head_dim} even"
            )


@dataclass(frozen=True, slots=True)
class TurboVAEConfig(_JsonConfig):
    """TurboVAED decoder, every tuple in decoder order; the published JSON starts at the pixels instead."""

    latent_channels: int
    out_channels: int
    block_out_channels: tuple[int, ...]  # of the up blocks; the first is also the width of the input and the middle
    layers_per_block: tuple[int, ...]  # middle block first, then the up blocks
    upsample: tuple[bool, ...]
    upsample_space_only: tuple[bool, ...]
    depthwise: tuple[bool, ...]  # middle block first
    depthwise_kernel_size: int
    unpatchify: bool
    norm_eps: float  # of the shortcut norm
    first_chunk_size: int  # latent frames
    step_size: int
    temporal_compression: int
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]

    def __post_init__(self):
        blocks = len(self.block_out_channels)
        expected = {
            "layers_per_block": blocks + 1,
            "depthwise": blocks + 1,
            "upsample": blocks,
            "upsample_space_only": blocks,
        }
        for name, length in expected.items():
            if len(getattr(self, name)) != length:
                raise ValueError(f"{name} must have {length} entries for {blocks} up blocks, not {getattr(self, name)}")
        if not len(self.latent_mean) == len(self.latent_std) == self.latent_channels:
            raise ValueError(f"latent_mean and latent_std must have {self.latent_channels} entries each")


@dataclass(frozen=True, slots=True)
class WanVAEConfig(_JsonConfig):
    """Wan2.2-style video VAE; encoder order, latent statistics included because every trained VAE has its own."""

    dim: int
    dec_dim: int
    z_dim: int
    dim_mult: tuple[int, ...]
    num_res_blocks: int
    temporal_downsample: tuple[bool, ...]
    latent_mean: tuple[float, ...]
    latent_std: tuple[float, ...]

    def __post_init__(self):
        if not len(self.latent_mean) == len(self.latent_std) == self.z_dim:
            raise ValueError(f"latent_mean and latent_std must have {self.z_dim} entries each")


@dataclass(frozen=True, slots=True)
class OobleckConfig(_JsonConfig):
    """Oobleck audio VAE: stereo at `sample_rate` Hz; one latent per product of `strides` samples."""

    channels: int
    latent_dim: int
    c_mults: tuple[int, ...]
    strides: tuple[int, ...]
    sample_rate: int

    def __post_init__(self):
        if len(self.c_mults) != len(self.strides):
            raise ValueError(f"c_mults {self.c_mults} and strides {self.strides} must have the same length")


DISTILL = DiTConfig(
    num_layers=40,
    hidden_size=5120,
    head_dim=128,
    num_query_groups=8,
    video_in_channels=192,
    audio_in_channels=64,
    text_in_channels=3584,
    expert_layers=(0, 1, 2, 3, 36, 37, 38, 39),
    gelu7_layers=(0, 1, 2, 3),
    local_attention_layers=(),
    frame_receptive_field=11,
    positions="v2",
)
BASE = DISTILL
SR_540P = replace(DISTILL, positions="v1")
SR_1080P = replace(SR_540P, local_attention_layers=tuple(i for i in range(40) if i not in range(3, 32, 4)))

T5GEMMA_9B = TextEncoderConfig(
    vocab_size=256000,
    hidden_size=3584,
    intermediate_size=14336,
    num_layers=42,
    num_heads=16,
    num_key_value_heads=8,
    head_dim=256,
    query_pre_attn_scalar=256,
    sliding_window=4096,
    attention_softcap=None,
    rope_theta=10000.0,
    norm_eps=1e-6,
)

TURBO_7_7 = TurboVAEConfig(
    latent_channels=48,
    out_channels=3,
    block_out_channels=(512, 256, 128, 64),
    layers_per_block=(3, 3, 2, 2, 2),
    upsample=(True, True, True, False),
    upsample_space_only=(False, False, True, False),
    depthwise=(False,) * 5,
    depthwise_kernel_size=5,
    unpatchify=True,
    norm_eps=1e-6,
    first_chunk_size=7,
    step_size=7,
    temporal_compression=4,
    latent_mean=WAN22_LATENT_MEAN,
    latent_std=WAN22_LATENT_STD,
)

WAN22_VAE = WanVAEConfig(
    dim=160,
    dec_dim=256,
    z_dim=48,
    dim_mult=(1, 2, 4, 4),
    num_res_blocks=2,
    temporal_downsample=(False, True, True),
    latent_mean=WAN22_LATENT_MEAN,
    latent_std=WAN22_LATENT_STD,
)

# The file says 44100 Hz; this model feeds and reads it at 51200 Hz, which gives 25 latents a second.
STABLE_AUDIO = OobleckConfig(
    channels=128, latent_dim=64, c_mults=(1, 2, 4, 8, 16), strides=(2, 4, 4, 8, 8), sample_rate=51200
)
