"""ComfyUI's VAE around our autoencoders, so that stock encode, decode and tiled nodes work on them."""

import logging
import os

import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ..model_loader.core_vae import PLAYBACK_RATE, resample, with_plain_weights
from ..model_loader.load import load_audio_vae, load_video_vae
from ..model_loader.turbo_vae import TurboVAE
from ..sampler.audio_windows import SAMPLES_PER_LATENT, WINDOW_LATENTS, encode_in_windows
from ..sampler.media import first_image, frames_one_by_one
from ..sampler.memory import decode_bytes, encode_bytes
from ..sampler.sizes import pixel_frames
from ..sampler.strips import OVERLAP, STRIP, decode_in_strips, strips
from .core_files import open_checkpoint
from .finite import require_finite


class HappyHorseVAE(comfy.sd.VAE):
    """comfy.sd.VAE with a ready network in place of one that it recognises from its tensors."""

    def __init__(self, network, dtype):
        # Its pass-through VAE sets every default that a stock method may read, in this and later versions.
        super().__init__(sd={"pixel_space_vae": torch.tensor(1.0)}, dtype=dtype)
        self.first_stage_model = network
        comfy.model_management.archive_model_dtypes(network)
        offload_device = comfy.model_management.vae_offload_device()
        self.patcher = comfy.model_patcher.CoreModelPatcher(
            network, load_device=self.device, offload_device=offload_device
        )
        self.disable_offload = False  # every layer streams
        self.size = comfy.model_management.module_size(network)


class VideoVAE(HappyHorseVAE):
    """Pictures [F,H,W,3] in [0,1] <-> normalised latents [1,48,T,H/16,W/16], F = 4T-3."""

    def __init__(self, network, dtype):
        super().__init__(network, dtype)
        turbo = isinstance(network, TurboVAE)
        self.latent_dim = 3
        self.latent_channels = network.config.latent_channels if turbo else network.config.z_dim
        self.upscale_ratio = (lambda frames: max(0, 4 * frames - 3), 16, 16)
        self.upscale_index_formula = (4, 16, 16)
        self.downscale_ratio = (lambda frames: (frames + 3) // 4, 16, 16)
        self.downscale_index_formula = (4, 16, 16)
        config = network.config
        self.memory_used_decode = lambda shape, dtype: decode_bytes(config, 16 * shape[-1], 16 * shape[-2], dtype)
        if not turbo:  # which has no encoder
            self.memory_used_encode = lambda shape, dtype: encode_bytes(config, shape[-3], shape[-1], shape[-2], dtype)

    def vae_encode_crop_pixels(self, pixels):
        """Crop to whole latents: sides to multiples of 16 about the middle, frames [F,H,W,3] to the first 4k+1.

        Every way of encoding begins here; ValueError with TurboVAED, which has no encoder.
        """
        if isinstance(self.first_stage_model, TurboVAE):
            raise ValueError("TurboVAED only decodes. To encode, load a Wan2.2 VAE with 'Load HappyHorse Video VAE'.")
        pixels = super().vae_encode_crop_pixels(pixels)
        frames = (pixels.shape[-4] - 1) // 4 * 4 + 1
        return pixels.narrow(-4, 0, frames)

    def encode_first_image(self, image, height, width):
        """Crop and resize an IMAGE [H,W,3] in [0,1] to `height` x `width` -> its latent [1,48,1,height/16,width/16]."""
        pixels = first_image(image[..., :3], height, width)
        return self.encode(pixels[0].movedim(0, -1) * 0.5 + 0.5)

    def decode(self, samples_in, vae_options=None):
        """Decode latents [B,48,T,h,w] to IMAGE [B,F,H,W,3]; in core's tiles where the card's memory is short.

        vae_options: core's, for other VAEs.
        """
        try:
            return self.decode_whole(samples_in)
        except Exception as error:
            comfy.model_management.raise_non_oom(error)
            logging.warning("Not enough memory to decode whole frames: decoding tiles, which takes longer.")
        comfy.model_management.soft_empty_cache()
        return self.decode_tiled(samples_in, tile_x=STRIP, tile_y=STRIP, overlap=OVERLAP)

    def decode_whole(self, samples):
        """Decode as `decode`, whole frames; they leave the card as they come, so that it never holds a clip of them."""
        batch, _, frames, height, width = samples.shape
        shape = batch, pixel_frames(frames), 16 * height, 16 * width, 3
        images = torch.empty(shape, device=self.output_device, dtype=self.vae_output_dtype())
        for clip, latent in zip(images, samples.split(1), strict=True):
            done = 0
            for pixels in self.decode_steps(latent):
                clip[done : done + pixels.shape[2]] = pixels[0].movedim(0, -1)
                done += pixels.shape[2]
        return self.process_output(images)

    def decode_frames(self, samples):
        """Yield the frames of latents [B,48,T,h,w] in 8 bits, [n,H,W,3] on the CPU, clip after clip.

        Where the card's memory is short the clip is decoded in strips (sampler/strips.py).
        """
        for latent in samples.split(1):
            given = 0
            try:
                for frame in frames_one_by_one(self.decode_steps(latent)):
                    given += 1
                    yield frame
                continue
            except Exception as error:
                comfy.model_management.raise_non_oom(error)
                logging.warning("Not enough memory to decode whole frames: decoding strips, which takes longer.")
            comfy.model_management.soft_empty_cache()
            for frames in self.strip_frames(latent):
                yield frames[given:]
                given = max(0, given - len(frames))

    def strip_frames(self, latent):
        """Yield the frames of one clip's latent as `decode_frames`, decoded in strips with progress of their own."""
        bar = comfy.utils.ProgressBar(len(strips(latent.shape[3])) * pixel_frames(latent.shape[2]))

        def steps(strip):
            for pixels in self.decode_steps(strip):
                bar.update(pixels.shape[2])
                yield pixels

        folder = folder_paths.get_temp_directory()
        os.makedirs(folder, exist_ok=True)
        return decode_in_strips(steps, latent, folder)

    def decode_steps(self, latent):
        """Yield the network's pixels [1,3,n,H,W], about [-1,1], of one clip's latent, on the device it computes on."""
        memory = self.memory_used_decode(latent.shape, self.vae_dtype)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)
        for pixels in self.first_stage_model.decode_steps(latent.to(self.device, self.vae_dtype)):
            comfy.model_management.throw_exception_if_processing_interrupted()
            yield require_finite(pixels, "The video VAE")
            del pixels  # the next step needs the room


class PlaybackAudio(torch.nn.Module):
    """The audio network at the rate that sound has everywhere else in ComfyUI, 44100 Hz."""

    def __init__(self, network):
        super().__init__()
        self.network = network

    def encode(self, waveform):
        """Encode stereo [B,2,n] at 44100 Hz -> latent [B,64,n // 1764]."""
        hop = self.network.hop * PLAYBACK_RATE // self.network.config.sample_rate
        latents = waveform.shape[-1] // hop
        return self.network.encode(resample(waveform[..., : latents * hop], latents * self.network.hop))

    def decode(self, latent):
        """Decode [B,64,L] -> stereo [B,2,1764 L] at 44100 Hz."""
        return require_finite(self.network.decode_for_playback(latent), "The audio VAE")


class AudioVAE(HappyHorseVAE):
    """Stereo [B,n,2] at 44100 Hz <-> latents [B,64,L], 25 a second."""

    def __init__(self, network):
        super().__init__(PlaybackAudio(network), torch.float32)
        hop = network.hop * PLAYBACK_RATE // network.config.sample_rate
        values = 8 * network.config.channels
        self.latent_dim = 1
        self.latent_channels = network.config.latent_dim
        self.output_channels = 2
        self.pad_channel_value = "replicate"  # mono sounds from both sides
        self.crop_input = False  # the end is cut, not both ends: the start must stay where it is
        self.upscale_ratio = self.downscale_ratio = hop
        self.audio_sample_rate = PLAYBACK_RATE
        self.process_input = self.process_output = lambda waveform: waveform
        self.memory_used_decode = lambda shape, dtype: values * shape[-1] * hop * dtype.itemsize
        self.memory_used_encode = lambda shape, dtype: values * shape[-1] * dtype.itemsize

    def encode_soundtrack(self, waveform):
        """Encode stereo [1,2,n] at 51200 Hz -> latent [1,64,n // 2048], beyond 29 s in windows as published."""
        longest = min(waveform.shape[-1], WINDOW_LATENTS * SAMPLES_PER_LATENT)
        memory = self.memory_used_encode((1, 2, longest), self.vae_dtype)
        comfy.model_management.load_models_gpu([self.patcher], memory_required=memory)
        network = self.first_stage_model.network
        return encode_in_windows(
            lambda part: network.encode(part.to(self.device, self.vae_dtype)).to(self.output_device), waveform
        )


def load_video(path):
    """Read a video VAE file into a VAE: bf16 where the device computes in it, as published, else fp32."""
    dtype = comfy.model_management.vae_dtype(comfy.model_management.vae_device(), [torch.bfloat16, torch.float32])
    dtype = torch.bfloat16 if dtype == torch.float16 else dtype
    network = load_video_vae(open_checkpoint(path), dtype=dtype, operations=comfy.ops.disable_weight_init)
    return VideoVAE(network, dtype)


def load_audio(path):
    """Read an audio VAE file into a VAE, fp32."""
    return AudioVAE(with_plain_weights(load_audio_vae(open_checkpoint(path))))


def require_video_vae(vae):
    """Return the VAE; ValueError where it is not our video VAE."""
    if not isinstance(vae, VideoVAE):
        raise ValueError(f"The video VAE input holds {_kind(vae)}. Connect the video VAE of 'Load HappyHorse'.")
    return vae


def require_audio_vae(vae):
    """Return the VAE; ValueError where it is not our audio VAE."""
    if not isinstance(vae, AudioVAE):
        raise ValueError(f"The audio VAE input holds {_kind(vae)}. Connect the audio VAE of 'Load HappyHorse'.")
    return vae


def _kind(vae):
    kinds = {VideoVAE: "a HappyHorse video VAE", AudioVAE: "a HappyHorse audio VAE", type(None): "nothing"}
    return kinds.get(type(vae), "another model's VAE, whose latents have another scale")
