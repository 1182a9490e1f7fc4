"""The prompt node."""

from comfy_api.latest import io

from .clip import MAX_TEXT_TOKENS, require_prompt_encoder, token_count, too_long
from .notice import notice


class EncodePrompt(io.ComfyNode):
    """Prompt to conditioning, as stock CLIP Text Encode does it, with a notice where the prompt is too long."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseEncodePrompt",
            display_name="HappyHorse Prompt",
            category="HappyHorse",
            description="Turns the prompt into conditioning. CLIP Text Encode gives the same; this one also tells when "
            "a prompt is longer than the model reads.",
            search_aliases=["happyhorse text encode", "prompt"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder, from Load HappyHorse."),
                io.String.Input(
                    "text",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip="What is seen and heard: scene, action, camera, what is said and the background sound. "
                    f"Full-size models want 150 to 200 words and read up to {MAX_TEXT_TOKENS} tokens; nano wants one "
                    'sentence, as "A red ball bounces on a blue floor" or "A yellow face says ma mo mi". Brackets are '
                    "plain text here, not weights.",
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="Connect to HappyHorse Sampler, or to HappyHorse First Image first.")
            ],
        )

    @classmethod
    def execute(cls, clip, text):
        """Encode the prompt at its true length."""
        tokens = token_count(require_prompt_encoder(clip), text)
        if tokens > MAX_TEXT_TOKENS:
            notice(cls, too_long(tokens))
        return io.NodeOutput(clip.encode_from_tokens_scheduled(clip.tokenize(text)))
