"""The node that makes a structured prompt of a short idea, by a language model that core loads and runs."""

import re

import comfy.text_encoders.llama
from comfy_api.latest import io

from .clip import PromptEncoder
from .conditioning import MAX_SECONDS, MIN_SECONDS
from .notice import notice
from .prompt_instructions import instructions
from .prompt_text import FEWEST_WORDS, LANGUAGES, parts_of, quotations, structured_prompt, word_count

LANGUAGE_MODEL = (
    "Connect core's Load CLIP with a language model for chat, such as qwen3.5_4b_bf16.safetensors (it sees pictures "
    "too) from https://huggingface.co/Comfy-Org/Qwen3.5, in models/text_encoders"
)
# Core's own defaults for text (Generate Text).
TOP_K, TOP_P, MIN_P, REPETITION_PENALTY = 64, 0.95, 0.05, 1.05


class PromptEnhancer(io.ComfyNode):
    """Idea and, where there is one, first picture to the prompt that the full-size models want."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorsePromptEnhancer",
            display_name="HappyHorse Prompt Enhancer",
            category="HappyHorse",
            description="Makes a long prompt in the form the full-size models were trained on from a short idea, with "
            "a language model that runs on this computer.",
            search_aliases=["happyhorse llm", "prompt enhance", "rewrite prompt", "expand prompt"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.Clip.Input("language_model", tooltip=f"{LANGUAGE_MODEL}."),
                io.String.Input(
                    "idea",
                    multiline=True,
                    dynamic_prompts=True,
                    tooltip='What you want to see and hear, in any language: "A tired waiter says: Wir schließen '
                    'gleich." What stands in quotation marks is said word for word. May be empty with a picture.',
                ),
                io.Float.Input(
                    "seconds",
                    default=5.0,
                    min=MIN_SECONDS,
                    max=MAX_SECONDS,
                    step=0.2,
                    round=0.01,
                    tooltip="Length of the clip in seconds, as in HappyHorse Empty Latent: what is spoken is to fit.",
                ),
                io.Int.Input(
                    "seed",
                    default=0,
                    min=0,
                    max=0xFFFFFFFFFFFFFFFF,
                    control_after_generate=io.ControlAfterGenerate.fixed,
                    tooltip="The same seed gives the same prompt, another seed another wording.",
                ),
                io.Image.Input(
                    "image",
                    optional=True,
                    tooltip="The picture that the clip begins with, for language models that see pictures (Qwen 3.5, "
                    "Qwen3-VL, Gemma 3 and 4).",
                ),
                io.Float.Input(
                    "temperature",
                    default=0.7,
                    min=0.0,
                    max=2.0,
                    step=0.05,
                    advanced=True,
                    tooltip="How freely words are chosen: 0 always takes the likeliest, 0.7 is core's own default.",
                ),
                io.Int.Input(
                    "max_tokens",
                    default=2048,
                    min=64,
                    max=32768,
                    advanced=True,
                    tooltip="Where the language model is stopped. A prompt takes about 400; models that think first "
                    "take more.",
                ),
            ],
            outputs=[io.String.Output(display_name="prompt", tooltip="Connect to the text of HappyHorse Prompt.")],
        )

    @classmethod
    def execute(cls, language_model, idea, seconds, seed, image=None, temperature=0.7, max_tokens=2048):
        """Have the prompt written; tell its length and what is not as it was asked for."""
        if not idea.strip() and image is None:
            raise ValueError("There is no idea. Type what you want to see and hear, or connect a picture.")
        request = instructions(idea, seconds, image is not None)
        answer = write(language_model, request, image, seed, temperature, max_tokens)
        description, speeches, background = parts_of(answer, quotations(idea))
        prompt = structured_prompt(description, speeches, background)
        told = [length(prompt), *left_out(prompt, idea), *unknown_languages(speeches)]
        notice(cls, "\n".join(told))
        return io.NodeOutput(prompt)


def write(language_model, request, image, seed, temperature, max_tokens):
    """Return the language model's answer, str without what it thought.

    language_model: core's CLIP; image: [B, H, W, 3] in 0..1, of which the first is shown, or None. ValueError where
    the CLIP writes no text or sees no pictures, or where the answer is empty or did not end.
    """
    clip = require_language_model(language_model)
    # ComfyUI 0.30 takes one `image`, newer ones a list of `images`; tokenizers ignore what they do not know.
    picture = {} if image is None else {"image": image[:1], "images": [image[:1]]}
    tokens = clip.tokenize(request, skip_template=False, min_length=1, thinking=False, **picture)
    if picture and not _shows_a_picture(tokens):
        raise ValueError(f"This language model sees no pictures. Disconnect the image, or: {LANGUAGE_MODEL}.")
    ids = clip.generate(
        tokens,
        do_sample=temperature > 0,
        max_length=max_tokens,
        temperature=temperature or 1.0,
        top_k=TOP_K,
        top_p=TOP_P,
        min_p=MIN_P,
        repetition_penalty=REPETITION_PENALTY,
        seed=seed,
    )
    thought, ended, answer = clip.decode(ids).rpartition("</think>")
    if len(ids) >= max_tokens:
        raise ValueError(
            f"The language model was still writing after {max_tokens} tokens. Raise max_tokens, try another seed, or a "
            "language model that follows instructions (one for chat)."
        )
    if not re.search(r"\w", answer):
        raise ValueError(f"The language model wrote nothing. Try another seed, or another model: {LANGUAGE_MODEL}.")
    return answer


def require_language_model(clip):
    """Return the CLIP; ValueError where it cannot write text."""
    model = getattr(clip, "cond_stage_model", None)
    if isinstance(model, PromptEncoder):
        raise ValueError(f"HappyHorse's text encoder reads prompts but writes none. {LANGUAGE_MODEL}.")
    writer = comfy.text_encoders.llama.BaseGenerate
    if model is None or not any(isinstance(module, writer) for module in model.modules()):
        raise ValueError(f"This CLIP writes no text. {LANGUAGE_MODEL}.")
    return clip


def length(prompt):
    """Return what to tell about a prompt's length."""
    words = word_count(prompt)
    enough = words >= FEWEST_WORDS
    return f"{words} words" + ("" if enough else ", where 150 to 200 are wanted. Try another seed or a larger model.")


def left_out(prompt, idea):
    """Return what to tell, in a list, about lines that the idea quotes and the prompt does not."""
    missing = [line for line in quotations(idea) if line not in prompt]
    return (
        [f"Not in the prompt: {', '.join(missing)}. Try another seed, or HappyHorse Prompt Builder."] if missing else []
    )


def unknown_languages(speeches):
    """Return what to tell, in a list, about languages that the models were not trained to speak."""
    unknown = sorted({speech.language for speech in speeches} - set(LANGUAGES))
    return [f"The models were not trained to speak {', '.join(unknown)}."] if unknown else []


def _shows_a_picture(tokens):
    return any(isinstance(entry[0], dict) for batches in tokens.values() for batch in batches for entry in batch)
