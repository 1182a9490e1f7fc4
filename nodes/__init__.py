"""The extension: ComfyUI's list of our nodes."""

from comfy_api.latest import ComfyExtension

from .conditioning import EmptyLatent, FirstImage
from .decode import Decode, SaveVideo
from .encode import Encode
from .extend import Continue, Join
from .files import add_examples, add_nano_weights
from .guidance import Guider, NegativePrompt
from .loaders import LoadAudioVAE, LoadCheckpoint, LoadModel, LoadTextEncoder, LoadVideoVAE
from .lora import register_lora_names
from .prompt import EncodePrompt, PromptBuilder
from .prompt_enhancer import PromptEnhancer
from .sampling import Sampler, SamplerSelect, Sigmas
from .soundtrack import Soundtrack
from .speed import Speed
from .super_resolution import SuperResolution

NODES = [
    LoadCheckpoint, LoadModel, LoadTextEncoder, LoadVideoVAE, LoadAudioVAE,
    PromptBuilder, PromptEnhancer, EncodePrompt, NegativePrompt, EmptyLatent, FirstImage, Soundtrack, Encode, Sampler,
    SuperResolution, Continue, Join, SamplerSelect, Sigmas, Guider, Speed, Decode, SaveVideo,
]  # fmt: skip


class HappyHorseExtension(ComfyExtension):
    """The nodes, the built-in weights, the templates' examples and the LoRA names."""

    async def on_load(self):
        """Add the built-in weights to ComfyUI's model folders, the examples to its inputs, our LoRA names."""
        add_nano_weights()
        add_examples()
        register_lora_names()

    async def get_node_list(self):
        """Return the node classes."""
        return NODES
