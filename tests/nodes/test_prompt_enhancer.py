"""The prompt enhancer: core's own tokenizer, model class and loop on a tiny language model; answers read; refusals."""

import comfy.sd
import comfy.supported_models_base
import pytest
import torch
from comfy import sd1_clip
from comfy.text_encoders import qwen35, z_image
from pack.nodes import prompt_enhancer
from pack.nodes.prompt_enhancer import PromptEnhancer, write
from pack.nodes.prompt_instructions import EXAMPLE, instructions
from pack.nodes.prompt_text import NO_BACKGROUND, parts_of, structured_prompt, word_count
from random_weights import random_weights

TINY = {
    "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 2,
    "num_key_value_heads": 1, "vision": {"hidden_size": 32, "num_heads": 2, "intermediate_size": 64, "depth": 1},
}  # fmt: skip
BODY = " ".join(["A tired waiter with a grey moustache stands behind the bar."] * 15)
ANSWER = f"""{BODY} He says, “wir schließen gleich” in a low voice.

Dialogue:
<Tired waiter with grey moustache, German>: "Wir schließen gleich!"

Background Sound:
<Glasses clinking>"""


@pytest.fixture(scope="module")
def language_model():
    """Qwen 3.5 as core has it, 4 layers, 32 columns, random weights: it sees pictures, babbles, and soon stops."""
    torch.manual_seed(0)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(qwen35.QWEN35_MODELS, "tiny", TINY)
        clip = clip_of(qwen35.tokenizer("tiny"), qwen35.te(model_type="tiny"))
    random_weights(clip.cond_stage_model)
    clip.cond_stage_model.tiny.transformer.model.config.stop_tokens = range(0, 240_000, 8)
    return clip


def clip_of(tokenizer, model):
    target = comfy.supported_models_base.ClipTarget(tokenizer, model)
    return comfy.sd.CLIP(target, model_options={"dtype": torch.float32, "initial_device": torch.device("cpu")})


@pytest.fixture
def answering(language_model, monkeypatch):
    """Return a function that lets the language model's tokens read as the text it is given."""

    def let_answer(text):
        monkeypatch.setattr(language_model, "decode", lambda ids: text)
        return language_model

    return let_answer


@pytest.fixture
def told(monkeypatch):
    """List of what the node tells."""
    messages = []
    monkeypatch.setattr(prompt_enhancer, "notice", lambda node, message: messages.append(message))
    return messages


def enhance(language_model, idea, **inputs):
    return PromptEnhancer.execute(language_model, idea, **{"seconds": 5.0, "seed": 1, **inputs}).args[0]


def test_core_writes_and_the_seed_decides(language_model):
    prompts = [enhance(language_model, "A waiter.", seed=seed) for seed in (1, 1, 2)]
    assert prompts[0] == prompts[1] != prompts[2]
    assert all(prompt.endswith(f"\n\nBackground Sound:\n<{NO_BACKGROUND}>") for prompt in prompts)


def test_temperature_0_takes_the_likeliest(language_model):
    first, second = (write(language_model, "A waiter.", None, seed, 0.0, 2048) for seed in (1, 2))
    assert first == second


def test_the_idea_is_what_it_reads(language_model):
    first, second = (enhance(language_model, idea) for idea in ("A waiter.", "A boat."))
    assert first != second


def test_the_picture_is_what_it_sees(language_model):
    grey = torch.full((2, 64, 96, 3), 0.5)
    dark = torch.stack([grey[0] * 0.2, grey[1]])
    seen, again, other, unseen = (
        write(language_model, "A waiter.", image, 1, 0.7, 2048) for image in (grey, grey, dark, None)
    )
    assert seen == again and len({seen, other, unseen}) == 3
    assert enhance(language_model, "", image=grey)


def test_an_answer_becomes_a_prompt(answering, told):
    idea = 'A waiter says "Wir schließen gleich."'
    assert enhance(answering(ANSWER), idea) == (
        f'{BODY} He says, "Wir schließen gleich." in a low voice.\n\n'
        'Dialogue:\n<Tired waiter with grey moustache, German>: "Wir schließen gleich."\n\n'
        "Background Sound:\n<Glasses clinking>"
    )
    assert told == ["174 words"]


def test_thoughts_are_left_out(answering):
    assert enhance(answering(f"<think>\nA waiter, then.\n</think>\n\n{ANSWER}"), "A waiter.").startswith(BODY)


def test_what_is_not_as_asked_is_told(answering, told):
    answer = ANSWER.replace("German", "Dutch").replace(BODY, "A waiter.")
    enhance(answering(answer), 'A waiter says "Wir schließen gleich." and "Danke."')
    assert told[0].splitlines() == [
        "11 words, where 150 to 200 are wanted. Try another seed or a larger model.",
        'Not in the prompt: "Danke.". Try another seed, or HappyHorse Prompt Builder.',
        "The models were not trained to speak Dutch.",
    ]


@pytest.mark.parametrize(
    ("answer", "inputs", "message"),
    [
        (" \n", {}, "wrote nothing. Try another seed, or another model"),
        ("<think>Hm.</think>", {}, "wrote nothing"),
        (ANSWER, {"max_tokens": 1}, "still writing after 1 tokens. Raise max_tokens"),
    ],
)
def test_answers_that_are_none(answering, answer, inputs, message):
    with pytest.raises(ValueError, match=message):
        enhance(answering(answer), "A waiter.", **inputs)


def test_nothing_to_go_by(language_model):
    with pytest.raises(ValueError, match="There is no idea. Type what you want to see and hear, or connect a picture"):
        enhance(language_model, " \n")


def test_a_blind_language_model_refuses_a_picture(language_model):
    blind = comfy.sd.CLIP.clone(language_model)
    blind.tokenizer = z_image.ZImageTokenizer()
    assert enhance(blind, "A waiter.")
    with pytest.raises(ValueError, match="sees no pictures. Disconnect the image, or: Connect core's Load CLIP"):
        enhance(blind, "A waiter.", image=torch.zeros(1, 64, 64, 3))


def test_other_clips_are_refused(loaded):
    with pytest.raises(ValueError, match="reads prompts but writes none. Connect core's Load CLIP with a language"):
        enhance(loaded[1], "A waiter.")
    with pytest.raises(ValueError, match="This CLIP writes no text. Connect core's Load CLIP"):
        enhance(object(), "A waiter.")
    stock = clip_of(sd1_clip.SD1Tokenizer, sd1_clip.SD1ClipModel)
    with pytest.raises(ValueError, match="This CLIP writes no text"):
        enhance(stock, "A waiter.")


def test_the_instructions_go_by_length_and_picture():
    short, long = instructions("A waiter.", 2.0, False), instructions("A waiter.", 10.0, True)
    assert "lasts 2 seconds, which is time for about 5 spoken words" in short and "fewer than 5." in short
    assert "lasts 10 seconds, which is time for about 25 spoken words" in long and "fewer than 20." in long
    assert "first frame" in long and "first frame" not in short
    assert "The request: A waiter.\n" in short and "The request: Let what" in instructions(" ", 2.0, True)
    assert not set("(){}[]") & set(short + long), "tokenizers of core take brackets for weights"


def test_the_example_is_as_the_rules_want_it():
    example = EXAMPLE.split("prompt for it:\n")[1]
    description, speeches, background = parts_of(example)
    assert structured_prompt(description, speeches, background) == example.strip()
    assert 150 <= word_count(example) <= 200 and speeches[0].language == "German" and background
