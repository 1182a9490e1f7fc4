"""What a language model is asked, so that it writes the structured prompt of `prompt_text` from a short idea.

The rules are those of the published prompt guide in our words (prompts/enhanced_prompt_design.md of daVinci-MagiHuman);
brackets are left out where they can be, as some of core's tokenizers take them for weights.
"""

from .prompt_text import LANGUAGES, NO_BACKGROUND

WORDS_A_SECOND = 2.5  # spoken at an unhurried pace

RULES = """\
You write prompts for a model that films people close up, with sound. Make one prompt of the request at the end.

Write one paragraph of 150 to 200 words, in plain, exact English:
- First who is seen: looks, clothes, place, mood. Then what happens, in the order in which it happens.
- Faces matter most. Say what brows, eyes, cheeks, lips and jaw do, and how the mouth shapes the words. Without \
people, say the same of what is seen instead.
- Bodies stay where they are. Dancing, running, driving and the like become small movements of head, face and \
shoulders.
- The camera stands still unless the request moves it. Name shot, angle, framing, the light and where it comes from; \
the face is sharp. The surroundings hold still. Nothing cuts to another scene.
- Whatever is spoken stands in double quotation marks at the moment when it is said, in the language in which it is \
said, exactly as the request has it. Right after it say how the voice sounds: tone, pace, pitch, loudness.
- Nobody speaks unless the request has speech. If it has speech without the words, make up fewer than {made_up}. The \
clip lasts {seconds:g} seconds, which is time for about {words} spoken words.
- Other sounds are told when they are heard.
- Only what can be seen or heard. No comparisons, no explanations, no lists, no titles.
{picture}
Below the paragraph stand two blocks, exactly like this:

Dialogue:
<who speaks in about five words, language>: "the spoken words once more"

Background Sound:
<the most prominent sound besides voices>

A line of dialogue for everything that is spoken, in that order; no block Dialogue if nobody speaks. Languages: \
{languages}. If there is no other sound, the second block is <{no_background}>.
"""

PICTURE = """\
- The picture shown is the first frame. Describe the people, clothes, place and light that it shows, and go on from \
there. Hands that it does not show are not mentioned.
"""

EXAMPLE = """\
Example of a request: an old fisherman at the harbour says in German: Moin. Heute bleibt die See ruhig.
Example of a prompt for it:
A fisherman of about seventy with a short white beard and a weathered face sits on a wooden crate at a small \
harbour. He wears a navy wool cap and a yellow oilskin jacket, and he is content and unhurried; his torso does not \
move. The shot is a static medium close-up at eye level with his face in the centre, the boats behind him out of \
focus and still. Soft grey daylight falls from the left and leaves the right side of his face in light shade. Gulls \
cry twice in the distance. His eyes narrow a little, the lines beside them deepen, and he breathes in through his \
nose. He looks straight into the camera, his lips part and close firmly on the first word, and his jaw opens wide on \
the long vowels as he says, "Moin. Heute bleibt die See ruhig." His voice is low, rough and calm, with a short pause \
after the first word. His lips close, one corner of the mouth rises into a small smile, and he nods once. He holds \
the look while water laps softly against the quay.

Dialogue:
<Old fisherman in yellow oilskin, German>: "Moin. Heute bleibt die See ruhig."

Background Sound:
<Distant gulls and softly lapping water>
"""


def instructions(idea, seconds, with_picture):
    """Return the request to a language model, str.

    idea: what the user typed, may be empty if there is a picture; seconds: length of the clip; with_picture: whether
    the model is shown the first frame.
    """
    words = max(2, round(seconds * WORDS_A_SECOND))
    rules = RULES.format(
        seconds=seconds,
        words=words,
        made_up=min(20, words),
        picture=PICTURE if with_picture else "",
        languages=", ".join(LANGUAGES),
        no_background=NO_BACKGROUND,
    )
    request = idea.strip() or "Let what the picture shows come alive."
    return f"{rules}\n{EXAMPLE}\nThe request: {request}\n\nAnswer with the prompt for this request and nothing else."
