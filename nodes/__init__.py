"""The extension: ComfyUI's list of our nodes."""

from comfy_api.latest import ComfyExtension

from .conditioning import EmptyLatent, FirstImage
from .decode import Decode, SaveVideo
from .files import add_example_image, add_nano_weights
from .loaders import LoadAudioVAE, LoadCheckpoint, LoadModel, LoadTextEncoder, LoadVideoVAE
from .prompt import EncodePrompt, PromptBuilder
from .sampling import Sampler, SamplerSelect, Sigmas

NODES = [
    LoadCheckpoint, LoadModel, LoadTextEncoder, LoadVideoVAE, LoadAudioVAE,
    PromptBuilder, EncodePrompt, EmptyLatent, FirstImage, Sampler, SamplerSelect, Sigmas, Decode, SaveVideo,
]  # fmt: skip


class HappyHorseExtension(ComfyExtension):
    """The nodes, the built-in weights and the example image."""

    async def on_load(self):
        """Add the built-in weights to ComfyUI's model folders, and the example image to its input folder."""
        add_nano_weights()
        add_example_image()

    async def get_node_list(self):
        """Return the node classes."""
        return NODES
