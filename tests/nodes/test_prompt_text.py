"""The structured prompt: the guide's form, dialogue in both places, CJK spacing, words."""

import pytest
from pack.nodes.prompt_text import (
    LANGUAGES,
    NO_BACKGROUND,
    Speech,
    parts_of,
    quotations,
    space_cjk,
    structured_prompt,
    too_short,
    word_count,
)

LINES = {
    "Mandarin": ("你好，很高兴见到你。", "你 好，很 高 兴 见 到 你。"),
    "Cantonese": ("你食咗飯未呀？", "你 食 咗 飯 未 呀？"),
    "English": ("Nice to meet you.", "Nice to meet you."),
    "Japanese": ("ラーメンを3つ、お願いします！", "ラ ー メ ン を3つ、お 願 い し ま す！"),
    "Korean": ("눌러 그럼.", "눌 러 그 럼."),
    "German": ("Schön, dich zu sehen.", "Schön, dich zu sehen."),
    "French": ("« C'est fini ? »", "C'est fini ?"),
}


def test_the_form_of_the_guide():
    speeches = [
        Speech("a young man in yellow polo", "Mandarin", "你十年了"),
        Speech("Anna in a red coat", "English", "Ten years?"),
    ]
    assert structured_prompt("A young man\n sits still.", speeches, "rain on a roof") == (
        'A young man sits still. The young man in yellow polo says in Mandarin, "你 十 年 了" '
        'Anna in a red coat says in English, "Ten years?"\n'
        "\n"
        "Dialogue:\n"
        '<Young man in yellow polo, Mandarin>: "你 十 年 了"\n'
        '<Anna in a red coat, English>: "Ten years?"\n'
        "\n"
        "Background Sound:\n"
        "<rain on a roof>"
    )


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_language(language):
    typed, written = LINES[language]
    prompt = structured_prompt("", [Speech("old man", language, typed)], "")
    assert prompt == (
        f'The old man says in {language}, "{written}"\n\nDialogue:\n<Old man, {language}>: "{written}"\n\n'
        "Background Sound:\n<No prominent background sound>"
    )


def test_a_line_that_the_description_quotes_stays_where_it_is():
    said = Speech("woman", "Mandarin", "走吧")
    body = structured_prompt("She says, “走吧” and leaves.", [said], "").split("\n\n")[0]
    assert body == 'She says, "走 吧" and leaves.'
    assert structured_prompt("She leaves.", [said], "").startswith('She leaves. The woman says in Mandarin, "走 吧"')


def test_without_speech_there_is_no_dialogue_block():
    assert structured_prompt("A lake.", [], "<wind>") == "A lake.\n\nBackground Sound:\n<wind>"


def test_quotation_marks_inside_a_line_do_not_end_it():
    assert Speech("boy", "English", '"He said "no""').quoted == "\"He said 'no'\""


@pytest.mark.parametrize("text", [written for _, written in LINES.values()] + ["a 你 b", "", "２０２５年"])
def test_spacing_twice_changes_nothing(text):
    assert space_cjk(space_cjk(text)) == space_cjk(text)


def test_decomposed_hangul_is_composed_first():
    assert space_cjk("\u1112\u1161\u11ab\u1100\u116e\u11a8") == "한 국"


def test_half_a_speaker_is_refused():
    with pytest.raises(ValueError, match="There is no line for old man. Type what is said, or switch"):
        Speech("old man", "English", " ")
    with pytest.raises(ValueError, match='Nobody is described for the line "hello"'):
        Speech("", "English", "hello")


def test_words_are_the_bodys_without_cjk():
    prompt = structured_prompt("It's a well-lit room, quiet.", [Speech("boy", "Mandarin", "你好吗")], "wind and rain")
    assert word_count(prompt) == 10  # It's a well-lit room quiet The boy says in Mandarin
    assert word_count("one two") == 2
    assert not too_short(80) and too_short(79).startswith("The description has 79 words; full-size models want 150")


@pytest.mark.parametrize("language", LANGUAGES)
def test_parts_of_undoes_it(language):
    written = structured_prompt("A man sits still.", [Speech("old man", language, LINES[language][0])], "rain")
    assert structured_prompt(*parts_of(written)) == written
    assert structured_prompt(*parts_of(structured_prompt("A park.", [], ""))) == structured_prompt("A park.", [], "")


@pytest.mark.parametrize(
    "written",
    [
        'A man says, "Hello there."\n\nDialogue:\n<Old man, English>: "Hello there."\n\nBackground Sound:\n<Rain>',
        "```\n**Enhanced Prompt:** A man says, “Hello there.”\n\n**Dialogue:**\n<Old man, English>: “Hello there.”\n\n"
        "**Background Sound:**\n<Rain>\n```",
        'Prompt: A man says, " hello there "\n### Dialogue\n* <Old man , english> "Hello there." (softly)\n'
        "### Background sounds\nRain",
        'A man says, "Hello there."\nDialogue: <Old man, English>: Hello there.\nBackground Sound: <Rain>',
        'A man says, "Hello there."\n\nDialog (in English):\n- <Old man, English>: "Hello there."\n\nBackground:\nRain',
    ],
)
def test_what_language_models_write_around_the_parts(written):
    description, speeches, background = parts_of(written)
    assert (description, background) == ('A man says, "Hello there."', "Rain")
    assert speeches == [Speech("Old man", "English", "Hello there.")]


def test_parts_that_are_missing():
    assert parts_of("A park.") == ("A park.", [], "")
    assert parts_of(f"A park.\n\nDialogue:\nNone\n\nBackground Sound:\n<{NO_BACKGROUND}>") == ("A park.", [], "")
    assert parts_of('The background sound is rain, the dialogue "ha".')[0] == (
        'The background sound is rain, the dialogue "ha".'
    )


def test_lines_are_written_as_the_user_did():
    written = 'She says, "你 好" and "bye !"\n\nDialogue:\n<Young woman, Chinese>: "你好！"'
    description, speeches, _ = parts_of(written, ['"你 好。"', '"Bye."'])
    assert description == 'She says, "你 好。" and "Bye."'
    assert [(speech.language, speech.quoted) for speech in speeches] == [("Mandarin", '"你 好。"')]


def test_quotations():
    assert quotations('Sie sagt „Guten Tag“, er “你好”, dann "".') == ['"Guten Tag"', '"你 好"']
