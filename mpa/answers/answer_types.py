"""Types of answers and questions, by simple rules: for coverage, diagnosis and the report.

The rules read English words; what they do not know is an "entity" or "other".
"""

import re

from mpa.answers.normalise import normalise

ANSWER_TYPES = ("yes/no", "number", "color", "text", "entity", "other")
QUESTION_TYPES = ("yes/no", "how many", "what color", "what", "which", "who", "where", "when", "why", "how", "other")
COLORS = set(
    "beige black blue bronze brown cream cyan gold golden gray green grey ivory khaki lime magenta maroon navy "
    "olive orange pink purple red scarlet silver tan teal turquoise violet white yellow".split()
)
NUMBERS = set(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fifteen twenty thirty forty fifty "
    "hundred thousand million billion half dozen".split()
)
_FIRST_WORDS = {
    "yes/no": "is are was were do does did can could will would has have had should may might am isn't aren't doesn't",
    "how many": "",
    "what color": "",
    "what": "what what's whats",
    "which": "which",
    "who": "who whose whom who's",
    "where": "where where's",
    "when": "when",
    "why": "why",
    "how": "how",
}
_TYPE_OF = {word: name for name, words in _FIRST_WORDS.items() for word in words.split()}


def answer_type(answer: str | None, task: str) -> str:
    """One of ANSWER_TYPES. `task` is the dataset's: an answer to a question about text is that text, if no other type fits.

    "entity": a name or noun phrase of up to three words. "other": anything longer, and an empty answer.
    """
    words = re.findall(r"[^\W\d_]+|\d+", (answer or "").casefold())
    if normalise(answer) in ("yes", "no"):
        return "yes/no"
    counted = [word for word in words if word.isdigit() or word in NUMBERS]
    if counted and (len(counted) == len(words) or words[0].isdigit()):
        return "number"
    if words and len(words) <= 3 and set(words) & COLORS and set(words) <= COLORS | {"and", "light", "dark"}:
        return "color"
    if task == "text" and words:
        return "text"
    return "entity" if 1 <= len(words) <= 3 else "other"


def question_type(question: str | None) -> str:
    """One of QUESTION_TYPES, by the first words; also where the question word comes later, after a comma or "in"."""
    words = re.findall(r"[\w']+", (question or "").casefold().replace("’", "'"))
    text = " ".join(words)
    if re.search(r"\bhow (?:many|much)\b", text):
        return "how many"
    if re.search(r"\b(?:what|which) (?:is the )?colou?rs?\b", text):
        return "what color"
    found = [_TYPE_OF[word] for word in words if word in _TYPE_OF]
    if words and words[0] in _TYPE_OF:
        return found[0]
    open_words = [name for name in found if name != "yes/no"]
    return open_words[0] if open_words else "other"
