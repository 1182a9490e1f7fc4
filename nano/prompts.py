"""English prompts for a scene of nano's world: free sentences in varied wording, and the model's structured form."""

import hashlib
import re

import numpy as np

WORDS = {
    "ball": ("ball", "ball", "ball", "sphere"),
    "cube": ("cube", "cube", "cube", "box", "block"),
    "face": ("face", "face", "face", "head"),
}
GROUNDS = (
    "on a {} floor",
    "on a {} ground",
    "on {}",
    "in front of a {} wall",
    "against a {} background",
    "over a {} floor",
    "in a {} room",
    "with a {} background",
)
MOVES = ("bounces", "drops and bounces", "falls and bounces", "hops", "jumps", "is bouncing", "falls down and bounces")
COUNTS = {
    None: ("", "", " again and again", " up and down"),
    1: (" once", " one time"),
    2: (" twice", " two times"),
    3: (" three times", " 3 times"),
}
SAYS = ("says", "speaks", "is saying", "tells us", "sings", "utters")
QUOTES = ("{}", '"{}"', "'{}'", '"{}"')
ADJECTIVES = (
    "small",
    "big",
    "shiny",
    "lovely",
    "bright",
    "plain",
    "round",
    "smooth",
    "cheerful",
    "calm",
    "little",
    "simple",
    "funny",
    "old",
    "new",
    "glossy",
    "quiet",
    "wooden",
    "painted",
    "strange",
)
OPENINGS = ("", "", "", "", "a video of ", "a clip of ", "we see ", "there is ", "animation of ", "a short film with ")
CLOSINGS = (
    "",
    "",
    "",
    "",
    "in bright light",
    "static camera",
    "cartoon style",
    "high quality",
    "with matching sound",
    "the camera does not move",
    "filmed in a studio",
    "4k",
)
SOUNDS = {
    "ball": ("a low tone at each bounce", "low thuds", "deep tones"),
    "cube": ("a high tone at each bounce", "high pings", "bright clicks"),
    "face": ("silence", "a clear voice", "quiet room"),
}


def article(phrase):
    """Return the phrase with its indefinite article."""
    return ("an " if phrase[0] in "aeiou" else "a ") + phrase


def describe(scene, rng):
    """Return one prompt (str) for the scene; wording comes from `rng`. One prompt in six leaves the ground unsaid."""
    pick = lambda options: options[rng.integers(len(options))]  # noqa: E731
    adjective = pick(ADJECTIVES) + " " if rng.random() < 0.2 else ""
    thing = article(f"{adjective}{scene.colour} {pick(WORDS[scene.kind])}")
    spoken = " ".join(scene.syllables)
    structured = rng.random() < 0.25
    if scene.kind != "face":
        action = pick(MOVES) + pick(COUNTS[scene.bounces])
    elif structured:
        action = pick(("talks", "speaks to us", "is talking", f'says "{spoken}"', f"says {spoken}"))
    else:
        action = f"{pick(SAYS)} {pick(QUOTES).format(spoken)}"
    ground = pick(GROUNDS).format(scene.background).replace("a o", "an o") if rng.random() < 5 / 6 else ""
    if ground and rng.random() < 0.25:
        sentence = f"{ground}, {thing} {action}"
    else:
        sentence = f"{pick(OPENINGS)}{thing} {ground + ' ' if ground and rng.random() < 0.2 else ''}{action}"
        sentence += f" {ground}" if ground and ground not in sentence else ""
    closing = pick(CLOSINGS)
    sentence += f", {closing}" if closing else ""
    if rng.random() < 0.8:
        sentence = sentence[0].upper() + sentence[1:]
    if rng.random() < 0.5 or structured:
        sentence += "."
    if structured:
        if scene.kind == "face":
            sentence += f'\n\nDialogue: <{scene.colour} {pick(WORDS["face"])}, English>: "{spoken}"'
        sentence += f"\n\nBackground Sound: <{pick(SOUNDS[scene.kind])}>"
    return sentence


def held_out(prompt):
    """Tell whether a prompt belongs to evaluation (one wording in eight, by its hash); training never uses those."""
    return hashlib.sha256(prompt.encode()).digest()[0] % 8 == 0


def draw_prompt(scene, rng, evaluation=False):
    """Return a prompt for the scene from the training or from the evaluation share."""
    while True:
        prompt = describe(scene, rng)
        if held_out(prompt) == evaluation:
            return prompt


def corpus(count, seed=31):
    """Return `count` (scene, prompt) pairs of the training share."""
    from .world import draw_scene

    rng = np.random.default_rng(seed)
    scenes = [draw_scene(rng) for _ in range(count)]
    return [(scene, draw_prompt(scene, rng)) for scene in scenes]


def words(prompts):
    """Return every word of the prompts, in lower case, sorted."""
    return sorted({word for prompt in prompts for word in re.findall(r"\w+", prompt.casefold())})
