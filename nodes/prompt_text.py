"""The structured prompt of the model's published guide, as text: what is seen, who says what, what is heard around."""

import re
import unicodedata
from dataclasses import dataclass

LANGUAGES = ("Mandarin", "Cantonese", "English", "Japanese", "Korean", "German", "French")
NO_BACKGROUND = "No prominent background sound"  # the guide's own words
FEWEST_WORDS = 80  # below, users of the model report ghost images; the guide asks for 150 to 200
# Han with its marks, kana, Hangul: what the guide writes with a space between any two characters.
CJK = "\u3005-\u3007\u3041-\u3096\u309d-\u309f\u30a1-\u30fa\u30fc-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7a3"
CJK += "\uf900-\ufaff\uff66-\uff9d\U00020000-\U0003ffff"
BETWEEN_CJK = re.compile(f"(?<=[{CJK}])(?=[{CJK}])")
WORD = re.compile(rf"[^\W{CJK}]+(?:['’-]\w+)*")
ARTICLE = re.compile(r"^(?:an?|the) ", re.IGNORECASE)
QUOTATION_MARK = re.compile(r"[“”„「」『』]|«\s*|\s*»")
QUOTED = re.compile(r'"([^"]+)"')
# What language models put around the parts: Markdown, code fences, a heading.
HEADING = re.compile(r"^[\s*#>]*(dialog|background)(?:ue)?(?: sounds?)?(?: ?\(.*?\))?[\s*]*(?::[\s*]*|$)", re.I | re.M)
WRAPPING = re.compile(r"^\s*```\w*\s*|\s*```\s*$|^[\s*#]*(?:enhanced )?prompt[\s*]*:[\s*]*", re.IGNORECASE)
SPOKEN = re.compile(r'<\s*([^<>]+?)\s*,\s*([^<>,]+?)\s*>\s*:?\s*(?:"([^"]+)"|(.+))')
ALSO_CALLED = {"chinese": "Mandarin", "mandarin chinese": "Mandarin", "putonghua": "Mandarin"}


@dataclass(frozen=True, slots=True)
class Speech:
    """Who speaks ("young woman in a red coat", or a name), in which of LANGUAGES, and the line.

    ValueError where there is nobody to speak or nothing to say.
    """

    speaker: str
    language: str
    line: str

    def __post_init__(self):
        if not self.speaker.strip():
            raise ValueError(f'Nobody is described for the line "{self.line}". Say who speaks, in about five words.')
        if not self.line.strip():
            raise ValueError(f"There is no line for {self.speaker}. Type what is said, or switch that speaker off.")

    @property
    def named(self):
        """The speaker without an article: as the guide names one in the Dialogue block."""
        return ARTICLE.sub("", _tidy(self.speaker))

    @property
    def quoted(self):
        """The line in quotation marks."""
        said = _tidy(self.line).removeprefix('"').removesuffix('"').strip().replace('"', "'")
        return f'"{said}"'


def structured_prompt(description, speeches, background):
    """Return the prompt: body, `Dialogue:` block if anybody speaks, `Background Sound:` block.

    description, background: str, may be empty; speeches: sequence of Speech in the order they are heard. A line that
    the description quotes already stays where it is; the others get a sentence of their own at the end of the body.
    """
    body = [_tidy(description)]
    for speech in speeches:
        if speech.quoted not in body[0]:
            # What begins with a capital is a name: "Anna says", but "The young woman says".
            subject = speech.named if speech.named[0].isupper() else f"The {speech.named}"
            body.append(f"{subject} says in {speech.language}, {speech.quoted}")
    lines = [f"<{_capital(speech.named)}, {speech.language}>: {speech.quoted}" for speech in speeches]
    dialogue = "\n".join(["Dialogue:", *lines]) if lines else ""
    heard = f"Background Sound:\n<{_tidy(background).strip('<>') or NO_BACKGROUND}>"
    return "\n\n".join(filter(None, [" ".join(filter(None, body)), dialogue, heard]))


def parts_of(prompt, said=()):
    """Return (description, [Speech], background) of a structured prompt as a language model writes one.

    prompt: str, with or without the two blocks, Markdown or a heading around them. Undoes `structured_prompt`; a line
    of the dialogue that the description quotes with other spacing, case or punctuation is quoted there as it is below.
    said: lines, as `quotations` returns them, that are written so wherever the prompt quotes the same letters.
    """
    pieces = HEADING.split(WRAPPING.sub("", WRAPPING.sub("", prompt)))
    blocks = dict(zip(map(str.lower, pieces[1::2]), pieces[2::2], strict=True))
    description, spoken = _tidy(pieces[0]), QUOTATION_MARK.sub('"', blocks.get("dialog", ""))
    exact = {_letters(line): line for line in said}
    speeches = []
    for speaker, language, quoted, bare in SPOKEN.findall(spoken):
        if letters := _letters(quoted or bare):
            speeches.append(Speech(speaker, _language(language), exact.get(letters, quoted or bare)))
    for line in (*(speech.quoted for speech in speeches), *said):
        description = _requote(description, line)
    background = _tidy(blocks.get("background", "")).strip("<>*` ")
    return description, speeches, "" if background == NO_BACKGROUND else background


def quotations(text):
    """Return what the text quotes, tidied, in quotation marks."""
    return [found[0] for found in QUOTED.finditer(_tidy(text)) if _letters(found[0])]


def space_cjk(text):
    """Return the text, composed, with one space between any two CJK characters: 你好，再见 -> 你 好，再 见."""
    return BETWEEN_CJK.sub(" ", unicodedata.normalize("NFC", text))


def word_count(prompt):
    """Return the words of a prompt's body, that is before its Dialogue and Background Sound; CJK does not count."""
    body = re.split(r"^(?:Dialogue|Background Sound):", prompt, maxsplit=1, flags=re.MULTILINE)[0]
    return len(WORD.findall(body))


def too_short(words):
    """Return what to tell about a prompt whose body has so many words; "" if they are enough."""
    if words >= FEWEST_WORDS:
        return ""
    return (
        f"The description has {words} words; full-size models want 150 to 200 and give ghost images below about "
        f"{FEWEST_WORDS}. Describe appearance, face, voice, light and camera, in English; HappyHorse Prompt Enhancer "
        "does it from a short idea."
    )


def unfamiliar(text, words, most=8):
    """Return what to tell of a text that uses others than those `words` (lower case); "" if it does not."""
    used = dict.fromkeys(re.findall(r"\w+", text.replace(NO_BACKGROUND, "").casefold()))
    unknown = [word for word in used if word not in words]
    if not unknown:
        return ""
    more = f" and {len(unknown) - most} more" if len(unknown) > most else ""
    return (
        f"nano, the built-in tiny model, has not learnt: {', '.join(unknown[:most])}{more}. It knows a ball or a cube "
        "that bounces, and a face that says ma, me, mi, mo or mu, in red, green, blue, yellow, purple, orange, cyan or "
        "white, on a background of another one of these."
    )


def _tidy(text):
    return space_cjk(QUOTATION_MARK.sub('"', " ".join(text.split())))


def _requote(text, line):
    return QUOTED.sub(lambda found: line if _letters(found[0]) == _letters(line) else found[0], text)


def _letters(text):
    return "".join(letter for letter in unicodedata.normalize("NFKC", text).casefold() if letter.isalnum())


def _language(name):
    known = {language.casefold(): language for language in LANGUAGES}
    return known.get(name.casefold()) or ALSO_CALLED.get(name.casefold(), name)


def _capital(text):
    return text[:1].upper() + text[1:]
