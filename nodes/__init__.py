"""The extension: ComfyUI's list of our nodes."""

from comfy_api.latest import ComfyExtension

from .conditioning import EmptyLatent, FirstImage
from .decode import Decode, SaveVideo
from .extend import Continue, Join
from .files import add_example_image, add_nano_weights
from .guidance import Guider, NegativePrompt
from .loaders import LoadAudioVAE, LoadCheckpoint, LoadModel, LoadTextEncoder, LoadVideoVAE
from .prompt import EncodePrompt
from .sampling import Sampler, SamplerSelect, Sigmas
from .soundtrack import Soundtrack
from .super_resolution import SuperResolution

NODES = [
    LoadCheckpoint, LoadModel, LoadTextEncoder, LoadVideoVAE, LoadAudioVAE,
    EncodePrompt, NegativePrompt, EmptyLatent, FirstImage, Soundtrack, Sampler, SuperResolution, Continue, Join,
    SamplerSelect, Sigmas, Guider, Decode, SaveVideo,
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
