"""Prompts: ours and stock CLIP Text Encode agree, true lengths, literal text, the limit; the builder node."""

import logging
import re

import pytest
import torch
from pack.nano import world
from pack.nodes import files
from pack.nodes.clip import MAX_TEXT_TOKENS, reads_long_prompts
from pack.nodes.loaders import LoadTextEncoder
from pack.nodes.prompt import EncodePrompt, PromptBuilder

import nodes as stock


def encode(loaded, text):
    return EncodePrompt.execute(loaded[1], text).args[0][0][0]


def test_stock_clip_text_encode_gives_the_same(loaded, prompt):
    theirs = stock.CLIPTextEncode().encode(loaded[1], "a red ball bounces")[0]
    assert torch.equal(prompt[0][0], theirs[0][0])
    assert prompt[0][1].keys() == theirs[0][1].keys()


def test_length_is_the_prompts_own(loaded):
    assert encode(loaded, "a ball").shape == (1, 7, 48)  # <bos> and six letters
    assert encode(loaded, "").shape == (1, 1, 48)
    assert encode(loaded, "a ball").dtype == torch.float32


def test_brackets_are_text_not_weights(loaded):
    assert encode(loaded, "(ball:1.2)").shape[1] == 11
    assert not torch.equal(encode(loaded, "(ball)")[:, 1:-1], encode(loaded, "ball")[:, 1:])


def test_a_long_prompt_is_cut_after_encoding_and_reported(loaded, caplog):
    text = "ab" * 350
    with caplog.at_level(logging.WARNING):
        cut = encode(loaded, text)
    assert cut.shape[1] == MAX_TEXT_TOKENS
    assert f"The prompt has 701 tokens; the model reads the first {MAX_TEXT_TOKENS}" in caplog.text
    network = loaded[1].cond_stage_model.network
    ids = torch.tensor([[entry[0] for entry in loaded[1].tokenize(text)["t5gemma"][0]]])
    torch.testing.assert_close(cut, network(ids)[:, :MAX_TEXT_TOKENS], atol=1e-6, rtol=0)


def test_text_encoder_on_the_cpu(loaded):
    clip = LoadTextEncoder.execute(files.TEXT_ENCODER.nano, "cpu").args[0]
    assert clip is not loaded[1] and clip.patcher.load_device == torch.device("cpu")
    assert torch.equal(clip.encode_from_tokens(clip.tokenize("a ball")), encode(loaded, "a ball"))


def test_another_models_clip_is_refused():
    with pytest.raises(ValueError, match="not HappyHorse's text encoder. Connect the CLIP of 'Load HappyHorse'"):
        EncodePrompt.execute(object(), "a ball")


def test_nanos_encoder_wants_no_long_prompts(loaded):
    assert not reads_long_prompts(loaded[1])


@pytest.mark.parametrize(
    "text, unknown",
    [
        ("A red ball bounces on a blue floor", None),
        ('An orange FACE says: "ma, mo." On purple!', None),
        ("", None),
        ("A red dog says pa pa on a blue floor", "dog, pa."),
        ("Un ballon rouge 跳", "un, ballon, rouge, 跳."),
        ("ten words that are not known here: one of two", "ten, words, that, are, known, here."),
        (
            "alpha beta gamma delta epsilon zeta eta theta iota kappa",
            "alpha, beta, gamma, delta, epsilon, zeta, eta, theta and 2 more.",
        ),
    ],
)
def test_words_that_nano_has_not_learnt_are_told(loaded, notices, text, unknown):
    encode(loaded, text)
    assert len(notices) == 1
    remarks = notices[0].splitlines()[1:]
    assert len(remarks) == (unknown is not None)
    assert unknown is None or f" has not learnt: {unknown} It knows" in remarks[0]


def test_what_nano_knows_is_told_in_full(loaded, notices):
    encode(loaded, "A dog")
    told = set(re.findall(r"\w+", notices[0].split("It knows")[1]))
    assert {*world.KINDS, *world.SYLLABLES, *world.COLOURS} <= told


def test_what_the_builder_writes_by_itself_is_not_told(loaded, notices):
    off = {f"speaker_{number}": {f"speaker_{number}": "off"} for number in (1, 2, 3, 4)}
    prompt = PromptBuilder.execute("A red ball bounces on a blue floor.", "", **off).args[0]
    encode(loaded, prompt)
    assert notices[-1].splitlines()[1:] == []


def test_what_a_node_shows_is_logged(loaded, caplog):
    with caplog.at_level(logging.INFO):
        encode(loaded, "a dog")
    told = [
        (record.levelname, record.message.split(":")[0]) for record in caplog.records if "HappyHorse" in record.message
    ]
    assert told == [("INFO", "HappyHorse Prompt"), ("WARNING", "HappyHorse Prompt")]


def test_builder_takes_the_speakers_that_are_on():
    prompt = PromptBuilder.execute(
        description="A park.",
        background_sound="",
        speaker_1={"speaker_1": "off"},
        speaker_2={"speaker_2": "on", "description": "old man", "language": "German", "line": "Guten Tag."},
        speaker_3={"speaker_3": "off"},
        speaker_4={"speaker_4": "on", "description": "girl", "language": "Korean", "line": "안녕"},
    ).args[0]
    assert prompt.split("\n\n") == [
        'A park. The old man says in German, "Guten Tag." The girl says in Korean, "안 녕"',
        'Dialogue:\n<Old man, German>: "Guten Tag."\n<Girl, Korean>: "안 녕"',
        "Background Sound:\n<No prominent background sound>",
    ]


def test_builder_refuses_a_switch_that_core_does_not_know():
    with pytest.raises(ValueError, match="speaker_3 is neither on nor off"):
        PromptBuilder.validate_inputs("on", "off", None, "off")
    assert PromptBuilder.validate_inputs("on", "off", "off", "off")
