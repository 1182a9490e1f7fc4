"""Prompts: they say what the scene is, and training never sees those of the evaluation."""

import numpy as np
from pack.nano import prompts, world
from pack.nano.training import WEIGHTS


def test_every_prompt_names_colour_and_kind():
    for scene, prompt in prompts.corpus(300, seed=3):
        text = prompt.lower()
        assert scene.colour in text
        assert any(word in text for word in prompts.WORDS[scene.kind])
        assert " a orange" not in text


def test_shares_are_apart():
    rng = np.random.default_rng(4)
    scene = world.draw_scene(rng, kind="ball")
    training = {prompts.draw_prompt(scene, rng) for _ in range(300)}
    evaluation = {prompts.draw_prompt(scene, rng, evaluation=True) for _ in range(100)}
    assert training and evaluation and not training & evaluation


def test_structured_form_carries_the_dialogue():
    rng = np.random.default_rng(5)
    scene = world.draw_scene(rng, kind="face", colour="yellow", syllables=("ma", "mo", "mi"))
    found = [p for p in (prompts.describe(scene, rng) for _ in range(60)) if "Dialogue:" in p]
    assert found and all('English>: "ma mo mi"' in p and "Background Sound: <" in p for p in found)


def test_spoken_syllables_stand_in_the_prompt():
    for scene, prompt in prompts.corpus(200, seed=6):
        if scene.kind == "face":
            assert " ".join(scene.syllables) in prompt


def test_the_list_of_known_words_is_that_of_the_training():
    listed = (WEIGHTS / "nano_words.txt").read_text(encoding="utf-8").split()
    assert listed == prompts.words(prompt for _, prompt in prompts.corpus(4000))
