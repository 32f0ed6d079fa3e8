import hashlib

import pytest

from mpa.prompts import (
    TASK_PROMPTS,
    Annotation,
    annotation_is_complete,
    answer_is_complete,
    answer_prompt,
    first_line,
    follow_up_prompt,
    parse_annotation,
)


def test_the_prompts_have_not_drifted():
    """A changed word changes every number measured, and the embedded teacher was trained on these."""
    digests = {task: hashlib.sha256(prompt.encode()).hexdigest()[:12] for task, prompt in TASK_PROMPTS.items()}
    assert digests == DIGESTS
    assert answer_prompt("What is it?") == "What is it? Answer the following question in a single word or phrase."
    assert answer_prompt("What is it", "released") == (
        "What is itAnswer the following question in a single word or phrase."
    )


DIGESTS = {
    "text": "424a8bb47780",
    "chart": "5528ce39c1c6",
    "knowledge": "80aba5dfc238",
    "general": "5b509e5242d9",
}


@pytest.mark.parametrize(
    ("reply", "expected"),
    [
        ("Question: What is it?\nAnswer: a cat", Annotation("What is it?", "a cat")),
        ("**Question:** What is it?\n**Answer:** a cat", Annotation("What is it?", "a cat")),
        ("- Question: What is it?\n- Answer: a cat.\nExplanation: it purrs", Annotation("What is it?", "a cat.")),
        ("question: Name it\nanswer: cat", Annotation("Name it", "cat")),
        ("Sure!\n\nQuestion: 这是什么？\nAnswer: 猫", Annotation("这是什么？", "猫")),
        ("Question：ما هذا؟\nAnswer：قطة", Annotation("ما هذا؟", "قطة")),
        ("Question: A?\nAnswer: x\nQuestion: B?\nAnswer: y", Annotation("A?", "x")),
        ("Question: What??\nAnswer: x", Annotation("What??", "x")),
        ("Question: What is it? Which one?\nAnswer: x", Annotation("What is it? Which one?", "x", "two questions")),
        ("Question: What is it?", Annotation("What is it?", None, "no answer")),
        ("Question: What is it?\nAnswer:", Annotation("What is it?", None, "no answer")),
        ("Question:\nWhat is it?\n\nAnswer:\na cat", Annotation("What is it?", "a cat")),
        ("Answer: a cat", Annotation(None, None, "no question")),
        ("Question:\nAnswer: a cat", Annotation(None, "a cat", "no question")),
        ("Question: What is it? Answer: a cat", Annotation("What is it?", "a cat")),
        ('Question: What does the sign "WHY?" say?\nAnswer: why', Annotation('What does the sign "WHY?" say?', "why")),
        ("Question: 这是什么？那是什么？\nAnswer: 猫", Annotation("这是什么？那是什么？", "猫", "two questions")),
        (
            "Question: What is <image>?\nAnswer: x",
            Annotation("What is <image>?", "x", "a mark of the prompt's format in it"),
        ),
        ("", Annotation(None, None, "no question")),
        ("Die Frage: Was ist das?\nAntwort: Katze", Annotation(None, None, "no question")),
    ],
)
def test_replies_are_read_or_refused_with_a_reason(reply, expected):
    assert parse_annotation(reply) == expected


@pytest.mark.parametrize(
    ("reply", "question", "answer"),
    [
        ("Question: What is it? Really?\nAnswer: a cat", "What is it", "a cat"),
        ("Question: Name it\nAnswer: cat", None, "cat"),
        ("Question: What is it?\nAnswer:\n\ncat", "What is it", "cat"),
        ("Question: What?", "What", None),
        ("Question: What?\nAnswer:", "What", ""),
    ],
)
def test_the_released_preset_reads_as_the_released_code(reply, question, answer):
    assert parse_annotation(reply, "released") == Annotation(question, answer)


@pytest.mark.parametrize(
    "reply",
    [
        "Question: What is it?\nAnswer: a cat\nExplanation: it purrs",
        "Question: What is it?\nAnswer:\na cat\n",
        "Question: What is it? Answer: a cat\nExplanation: it purrs",
        "No idea.\nQuestion: A?\n\nAnswer: x\n\nQuestion: B?\nAnswer: y\n",
    ],
)
def test_stopping_early_reads_the_same(reply):
    """Cut where generation may stop, a reply parses as the whole one does."""
    cut = next((reply[:i] for i in range(len(reply) + 1) if annotation_is_complete(reply[:i])), reply)
    assert parse_annotation(cut) == parse_annotation(reply)
    cut = next((reply[:i] for i in range(len(reply) + 1) if answer_is_complete(reply[:i])), reply)
    assert first_line(cut) == first_line(reply)


def test_the_short_answer_is_the_first_line_with_text():
    assert first_line("\n  red \nbecause") == "red"
    assert first_line("") == ""


def test_an_annotation_is_put_to_the_model_as_a_question_only_if_it_can_be_used():
    good = "Question: What is it?\nAnswer: a cat"
    assert follow_up_prompt(good, "paper") == answer_prompt("What is it?")
    assert follow_up_prompt(good, "released") == answer_prompt("What is it", "released")
    for reply in ("no idea", "Question: What is it?", "Question: a? b?\nAnswer: x"):
        assert follow_up_prompt(reply, "paper") is None
