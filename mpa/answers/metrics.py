"""Metrics: `METRICS[name](prediction, answers) -> float` between 0 and 1.

All are pure functions. Each docstring names the source and any difference from it. The tests have golden cases.
"""

import re
from collections import Counter
from functools import lru_cache

import numpy as np
from rapidfuzz.distance import Levenshtein

from mpa.answers.normalise import canonical, normalise
from mpa.answers.replies import bare

# --- VQA challenge and TextVQA ---------------------------------------------------------------------

_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
_NUMBERS = {"none": "0", "zero": "0", "one": "1", "two": "2", "three": "3", "four": "4", "five": "5"}
_NUMBERS |= {"six": "6", "seven": "7", "eight": "8", "nine": "9", "ten": "10"}
_ARTICLES = {"a", "an", "the"}
# The official table maps each of these words with one apostrophe missing to the correct word.
_CONTRACTED = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't
he'd he'd've he's how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've
mustn't must've needn't not've o'clock oughtn't 'ow's'at shan't she'd've should've shouldn't
shouldn't've somebody'd've somebody'll somebody's someone'd someone'd've someone'll someone's
something'd something'd've something'll that's there'd there'd've there're there's they'd they'd've
they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've
wouldn't wouldn't've y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
_CONTRACTIONS = {w[: m.start()] + w[m.end() :]: w for w in _CONTRACTED for m in re.finditer("'", w)}
_CONTRACTIONS["somebody'd"] = "somebodyd"  # reversed in the official table

_DIGIT_COMMA_DIGIT = re.compile(r"\d,\d")
# The official pattern has a misspelt look-behind, so only its look-ahead has an effect.
_PERIOD = re.compile(r"\.(?!\d)")
_MAX_PERIODS = 32  # the official code passes re.UNICODE, which is 32, as the `count` of `sub`


@lru_cache(2**16)
def _strip_punctuation(text: str) -> str:
    glue = _DIGIT_COMMA_DIGIT.search(text) is not None
    stripped = text
    for mark in _PUNCTUATION:
        beside_space = f"{mark} " in text or f" {mark}" in text
        stripped = stripped.replace(mark, "" if beside_space or glue else " ")
    return _PERIOD.sub("", stripped, count=_MAX_PERIODS)


@lru_cache(2**16)
def _normalise_words(text: str) -> str:
    words = (_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(_CONTRACTIONS.get(word, word) for word in words if word not in _ARTICLES)


def _on_one_line(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


FULL_MARKS = 4  # answers that must be equal to the prediction, so that three are left whichever is left out


def _soft_accuracy(prediction: str, answers: list[str]) -> float:
    """Mean over all leave-one-out subsets of the answers of min(1, number of matching answers / 3)."""
    agree = sum(answer == prediction for answer in answers)
    scores = [min(1.0, (agree - (answer == prediction)) / 3) for answer in answers]
    return sum(scores) / len(scores) if scores else 0.0


def vqa(prediction: str, answers: list[str]) -> float:
    """VQA challenge accuracy, as in the official code (GT-Vision-Lab/VQA, vqaEval.py).

    Normalises only if the human answers differ: "Yes." does not match a unanimous "yes". The official code leaves each
    answer out in turn, also where a question has fewer than ten. So a prediction equal to all answers of a question
    scores 0 with one answer, 1/3 with two, 2/3 with three, and 1 with four or more: see `few_answers`.
    """
    prediction, answers = _on_one_line(prediction), [_on_one_line(a) for a in answers]
    if len(set(answers)) > 1:
        answers = [_normalise_words(_strip_punctuation(a)) for a in answers]
        prediction = _normalise_words(_strip_punctuation(prediction))
    return _soft_accuracy(prediction, answers)


@lru_cache(2**16)
def evalai(text: str) -> str:
    """An answer normalised by the EvalAI processor of the TextVQA challenge (MMF)."""
    text = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return _normalise_words(_strip_punctuation(_on_one_line(text)))


def textvqa(prediction: str, answers: list[str]) -> float:
    """TextVQA soft accuracy (MMF): like `vqa`, but always after the EvalAI processor.

    MMF takes ten answers and no other number; for other numbers this is the formula of `vqa`.
    """
    return _soft_accuracy(evalai(prediction), [evalai(a) for a in answers])


def few_answers(answers: list[list[str]]) -> str:
    """One line about the questions with fewer answers than full marks by `vqa` and `textvqa` take; "" if there are none.

    >>> few_answers([["red"], ["red"] * 3, ["red"] * 10])
    '2 of 3 questions have fewer than 4 answers: vqa and textvqa give a right answer at most 0 % (1 with 1), 67 % (1 with 3)'
    """
    counts = Counter(map(len, answers))
    few = {n: counts[n] for n in range(1, FULL_MARKS) if counts[n]}
    most = ", ".join(f"{100 * (n - 1) / 3:.0f} % ({questions:,} with {n})" for n, questions in few.items())
    what = f"{sum(few.values()):,} of {len(answers):,} questions have fewer than {FULL_MARKS} answers"
    return f"{what}: vqa and textvqa give a right answer at most {most}" if few else ""


def accuracy(prediction: str, answers: list[str]) -> float:
    """ST-VQA accuracy: 1 if the prediction equals one of the answers, both after the EvalAI processor."""
    return float(evalai(prediction) in {evalai(a) for a in answers})


# --- ST-VQA, ChartQA, and the paper's own ----------------------------------------------------------


def anls(prediction: str, answers: list[str]) -> float:
    """ANLS of ST-VQA, average normalised Levenshtein similarity: 1 - NL if NL < 0.5, else 0; the best over the answers.

    NL is the edit distance divided by the longer length, ignoring case and outer white space. As in the formula (Biten
    et al. 2019, equation 1), an NL of exactly 0.5 gives 0. lmms-eval and the commonly used evaluator give 0.5 for it,
    and also collapse inner white space.
    """
    prediction = prediction.strip().lower()
    distances = (
        Levenshtein.normalized_distance(prediction, answer.strip().lower(), score_cutoff=0.5) for answer in answers
    )
    nearest = min(distances, default=1.0)
    return 1.0 - nearest if nearest < 0.5 else 0.0


def _number(text: str) -> float | None:
    try:
        return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
    except ValueError:
        return None


def relaxed(prediction: str, answers: list[str]) -> float:
    """ChartQA relaxed accuracy: numbers within 5 % of the answer; other text equal, ignoring case.

    As in the commonly used function, "5%" is 0.05, an answer of 0 is compared as text, and white space is not stripped.
    The best over the answers.
    """

    def matches(answer: str) -> bool:
        ours, theirs = _number(prediction), _number(answer)
        if ours is not None and theirs:
            return abs(ours - theirs) / abs(theirs) <= 0.05
        return prediction.lower() == answer.lower()

    return float(any(map(matches, answers)))


# --- ours: tolerant --------------------------------------------------------------------------------

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_WORD_VALUES = {word: value for value, word in enumerate((_UNITS + " seventeen eighteen nineteen").split())}
_TENS = {word: 10 * (i + 2) for i, word in enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split())}
_WORD_VALUES |= _TENS | {
    f"{ten}-{_UNITS.split()[unit]}": value + unit for ten, value in _TENS.items() for unit in range(1, 10)
}
_TENS_AND_UNIT = re.compile(rf"\b({'|'.join(_TENS)}) ({'|'.join(_UNITS.split()[1:10])})\b")
_PERCENT = re.compile(r"(?<=\d)\s?(?:%|percent\b|per cent\b)")
_SENTENCE_END = re.compile(r"[.。!]$")
_CURRENCY = re.compile(r"^(-?)([^\w\s.+-])(?=\.?\d)")
_NUMBER = re.compile(r"[+-]?(?:\d++(?:\.\d*+)?|\.\d++)%?")


@lru_cache(2**16)
def plain(text: str) -> str:
    """`canonical`, without a final full stop, with number words as digits and "percent" as %.

    >>> plain(" 12,500 per cent."), plain("Twenty-five"), plain("Route 66.")
    ('12500%', '25', 'route 66')
    """
    text = _SENTENCE_END.sub("", bare(canonical(text)))
    text = _TENS_AND_UNIT.sub(r"\1-\2", text)
    text = " ".join(str(_WORD_VALUES.get(word, word)) for word in text.split())
    return _PERCENT.sub("%", text)


@lru_cache(2**16)
def _as_people_read(text: str) -> tuple[frozenset[str], float | None, str, bool]:
    """(normalised forms to compare, the value if it is a number, its currency, whether it is a percentage)."""
    text_plain = plain(text)
    forms = frozenset({normalise(text), normalise(text_plain)} - {""})
    currency = _CURRENCY.match(text_plain)
    number = text_plain.replace(currency[2], "", 1) if currency else text_plain
    value = float(number.rstrip("%")) if _NUMBER.fullmatch(number) else None
    return forms, value, currency[2] if currency else "", "%" in number


def tolerant(prediction: str, answers: list[str]) -> float:
    """1 if a human would accept the prediction: equal as in `exact`, equal after `plain`, or numbers within 5 %.

    ChartQA's tolerance, except that years (1500 to 2099) must be equal; "5%" and "$5" equal 5, but "$5" is not "€5".
    """
    forms, ours, our_currency, our_share = _as_people_read(prediction)

    def matches(answer: str) -> bool:
        their_forms, theirs, their_currency, their_share = _as_people_read(answer)
        if forms & their_forms:
            return True
        if ours is None or theirs is None or len({our_currency, their_currency, ""}) > 2:
            return False
        is_year = not (our_share or their_share) and any(n.is_integer() and 1500 <= n < 2100 for n in (ours, theirs))
        return ours == theirs if is_year else abs(ours - theirs) <= 0.05 * abs(theirs)

    return float(any(map(matches, answers)))


@lru_cache(2**16)
def squeeze(text: str | None) -> str:
    """Lower case, without white space and non-word characters: the released code's exact normalisation.

    >>> squeeze("1.5 m"), squeeze("15M")
    ('15m', '15m')
    """
    return re.sub(r"[\s\W]+", "", str(text).lower()) if text is not None else ""


def most_common(answers: list[str]) -> str:
    """The most frequent answer, the first one on a tie: `GT_answer` in the result files."""
    return Counter(answers).most_common(1)[0][0] if answers else ""


def exact(prediction: str, answers: list[str]) -> float:
    """1 if the prediction is one of the answers after `normalise`. An empty prediction never matches."""
    return float(bool(normalise(prediction)) and normalise(prediction) in {normalise(a) for a in answers})


def contains(prediction: str, answers: list[str]) -> float:
    """The released code's score: is the most common answer a substring of the prediction, both after `squeeze`?

    As in the released code, "1" is found in "2013" and an empty answer in everything.
    """
    return float(squeeze(most_common(answers)) in squeeze(prediction))


METRICS = {
    "vqa": vqa,
    "textvqa": textvqa,
    "anls": anls,
    "accuracy": accuracy,
    "relaxed": relaxed,
    "exact": exact,
    "contains": contains,
    "tolerant": tolerant,
}


def bootstrap_interval(scores, resamples: int = 2000, seed: int = 0) -> tuple[float, float]:
    """95 % percentile bootstrap interval of the mean of `scores` [n], in the unit of the scores.

    Few scores are distinct, so it samples the count of each distinct score (multinomial) instead of n single scores.
    """
    values, counts = np.unique(np.asarray(scores, dtype=float), return_counts=True)
    n = counts.sum()
    if not n:
        return float("nan"), float("nan")
    means = np.random.default_rng(seed).multinomial(n, counts / n, size=resamples) @ values / n
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)
