"""The transformer: noisy video and audio latents and text features in, velocities of both latents out."""

import torch
from torch import nn

from .attention import by_frames, joint_attention
from .dit_layers import Adapter, Layer, RMSNorm, Stream
from .tokens import TokenLayout, patchify, rotary_table, unpatchify


class DiT(nn.Module):
    """Single-stream audio-video transformer of MagiHuman (arXiv 2603.21986), differentiable and batched.

    `operations` supplies Linear (torch.nn, or comfy.ops.* under ComfyUI). Linears take `dtype` (default: torch's) and
    matmuls run in it; adapter, norms and final linears are fp32 always.
    """

    def __init__(self, config, *, operations=nn, dtype=None, device=None):
        super().__init__()
        self.config = config
        dtype = dtype or torch.get_default_dtype()
        self.adapter = Adapter(config, operations=operations, device=device)
        self.block = nn.Module()
        self.block.layers = nn.ModuleList(
            Layer(config, i, operations=operations, dtype=dtype, device=device) for i in range(config.num_layers)
        )
        shared = [i for i in range(config.num_layers) if i not in config.expert_layers] or [config.num_layers]
        self.middle = slice(shared[0], shared[-1] + 1)  # the layers that all modalities share
        final = {"bias": False, "dtype": torch.float32, "device": device}
        self.final_norm_video = RMSNorm(config.hidden_size, device=device)
        self.final_norm_audio = RMSNorm(config.hidden_size, device=device)
        self.final_linear_video = operations.Linear(config.hidden_size, config.video_in_channels, **final)
        self.final_linear_audio = operations.Linear(config.hidden_size, config.audio_in_channels, **final)

    def forward(self, video, audio, text, *, attention=None, fp8_attention=False, step_cache=None):
        """Predict velocity = noise - clean of both latents; the noise level is read off the latents themselves.

        video [B, C, T, H, W] (H, W even), audio [B, L, Ca], text [B, n, Ct]; all clips of a batch share sizes and text
        length. `attention(q, k, v)` replaces our own. fp8_attention: both products take fp8, see `joint_attention`.
        `step_cache(change, x, middle)` decides whether middle(x) is called, see sampler.step_cache. Returns fp32
        (video's shape, audio's shape). ValueError where sizes do not fit.
        """
        self._check(video, audio, text)
        layout = TokenLayout.of(video, audio, text)
        rotary = rotary_table(layout, self.config.positions, self.config.head_dim, video.device)

        rest = (layout, rotary, by_frames(attention) if attention else joint_attention, fp8_attention)

        def run(layers, stream):
            for layer in layers:
                stream = layer(stream, *rest)
            return stream.sum()

        x, layers = self.adapter(patchify(video), audio, text), list(self.block.layers)
        if step_cache is not None:  # at the cost of holding on to what enters: layers write over it, so they get copies
            entered = run(layers[: self.middle.start], Stream(x.clone()))
            x = step_cache(entered - x, entered, lambda x: run(layers[self.middle], Stream(x.clone())))
            del entered
            layers = layers[self.middle.stop :]
        stream = Stream(x)
        del x
        for layer in layers:
            stream = layer(stream, *rest)
        x_video, x_audio, _ = stream.sum().split(layout.spans, dim=1)
        v_video = self.final_linear_video(self.final_norm_video(x_video))
        v_audio = self.final_linear_audio(self.final_norm_audio(x_audio))
        return unpatchify(v_video, layout), v_audio

    def _check(self, video, audio, text):
        wanted = (
            ("video latent", video, 5, 1, self.config.video_in_channels // 4, "[B, C, T, H, W]"),
            ("audio latent", audio, 3, 2, self.config.audio_in_channels, "[B, L, C]"),
            ("text features", text, 3, 2, self.config.text_in_channels, "[B, n, C]"),
        )
        for name, tensor, ndim, axis, channels, axes in wanted:
            if tensor.ndim != ndim or tensor.shape[axis] != channels:
                raise ValueError(
                    f"{name} of shape {list(tensor.shape)}: this model wants {axes} with {channels} channels; "
                    "is it from another model's encoder?"
                )
