"""The prompt nodes: the structured prompt from its parts, and any prompt to conditioning."""

from comfy_api.latest import io

from .clip import MAX_TEXT_TOKENS, reads_long_prompts, require_prompt_encoder, token_count, too_long
from .files import NANO_WORDS
from .notice import notice
from .prompt_text import FEWEST_WORDS, LANGUAGES, Speech, structured_prompt, too_short, unfamiliar, word_count

SPEAKERS = ("speaker_1", "speaker_2", "speaker_3", "speaker_4")
OFF, ON = "off", "on"


def _speaker_input(id):
    """Return the switch of one speaker; each has its own, so that switching one leaves what was typed for others."""
    opened = [
        io.String.Input(
            "description",
            tooltip='Who speaks, in about five words of English: "young woman in red coat". What begins with a capital '
            "is taken as a name.",
        ),
        io.Combo.Input("language", options=list(LANGUAGES), default="English", tooltip="Language of the line."),
        io.String.Input(
            "line",
            multiline=True,
            tooltip="What is said, in that language and its own script, without quotation marks. Quote it in the "
            "description as well to place it there; else it is said at the end. About 2 to 3 words fit a second.",
        ),
    ]
    return io.DynamicCombo.Input(
        id,
        options=[io.DynamicCombo.Option(OFF, []), io.DynamicCombo.Option(ON, opened)],
        tooltip="on: one more voice. The lines are heard in the order of the speakers.",
    )


def _remarks(clip, text, tokens):
    """Return what to mind about a prompt of so many tokens: that it is too long, too short, or unknown to nano."""
    remarks = [too_long(tokens)] if tokens > MAX_TEXT_TOKENS else []
    if reads_long_prompts(clip):
        remarks.append(too_short(word_count(text)) if text.strip() else "")
    else:
        remarks.append(unfamiliar(text, set(NANO_WORDS.read_text(encoding="utf-8").split())))
    return filter(None, remarks)


class PromptBuilder(io.ComfyNode):
    """The form that the model was trained on, from description, speakers and background sound."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorsePromptBuilder",
            display_name="HappyHorse Prompt Builder",
            category="HappyHorse",
            description="Writes the prompt in the form the full-size models were trained on: description, dialogue of "
            "up to four speakers in seven languages, background sound.",
            search_aliases=["happyhorse dialogue", "structured prompt", "happyhorse speech", "lip sync prompt"],
            hidden=[io.Hidden.unique_id],
            inputs=[
                io.String.Input(
                    "description",
                    multiline=True,
                    tooltip="What is seen, in English and in the order it happens: appearance, mood, face and lips, "
                    "manner of speaking, light, framing. 150 to 200 words work best; the node warns below "
                    f"{FEWEST_WORDS}.",
                ),
                *(_speaker_input(id) for id in SPEAKERS),
                io.String.Input(
                    "background_sound",
                    tooltip='The most prominent sound besides the voices: "rain on a tin roof". Empty: none.',
                ),
            ],
            outputs=[io.String.Output(display_name="prompt", tooltip="Connect to the text of HappyHorse Prompt.")],
        )

    @classmethod
    def validate_inputs(cls, speaker_1=None, speaker_2=None, speaker_3=None, speaker_4=None):
        """Refuse a switch that is neither on nor off: core leaves it out without a word."""
        for id, switch in zip(SPEAKERS, (speaker_1, speaker_2, speaker_3, speaker_4), strict=True):
            if switch is None:
                raise ValueError(f"{id} is neither {ON} nor {OFF}")
        return True

    @classmethod
    def execute(cls, description, background_sound, **speakers):
        """Write the prompt; tell its length."""
        switched_on = [speakers[id] for id in SPEAKERS if speakers[id][id] == ON]
        speeches = [Speech(one["description"], one["language"], one["line"]) for one in switched_on]
        prompt = structured_prompt(description, speeches, background_sound)
        words = word_count(prompt)
        notice(cls, too_short(words) or f"{words} words")
        return io.NodeOutput(prompt)


class EncodePrompt(io.ComfyNode):
    """Prompt to conditioning, as stock CLIP Text Encode does it; tells a prompt's length and whether it fits."""

    @classmethod
    def define_schema(cls):
        """Describe the node."""
        return io.Schema(
            node_id="HappyHorseEncodePrompt",
            display_name="HappyHorse Prompt",
            category="HappyHorse",
            description="Turns the prompt into conditioning. CLIP Text Encode gives the same; this one also tells how "
            "long a prompt is, and whether that is too long or too short.",
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
                    'sentence with the background in it, as "A red ball bounces on a blue floor" or "A yellow face '
                    'says ma mo mi on a blue background". Brackets are plain text here, not weights.',
                ),
            ],
            outputs=[
                io.Conditioning.Output(tooltip="Connect to HappyHorse Sampler, or to HappyHorse First Image first.")
            ],
        )

    @classmethod
    def execute(cls, clip, text):
        """Encode the prompt at its true length; tell it."""
        tokens = token_count(require_prompt_encoder(clip), text)
        notice(cls, "\n".join([f"{tokens} of {MAX_TEXT_TOKENS} tokens", *_remarks(clip, text, tokens)]))
        return io.NodeOutput(clip.encode_from_tokens_scheduled(clip.tokenize(text)))
