"""Types of answers and questions."""

import pytest

from mpa.answers.answer_types import ANSWER_TYPES, QUESTION_TYPES, answer_type, question_type


@pytest.mark.parametrize(
    ("answer", "task", "expected"),
    [
        ("Yes.", "text", "yes/no"),
        ("no", "general", "yes/no"),
        ("12,500", "chart", "number"),
        ("50 %", "text", "number"),
        ("twenty one", "general", "number"),
        ("1990s", "knowledge", "number"),
        ("dark blue", "general", "color"),
        ("red and white", "general", "color"),
        ("Red Cross", "general", "entity"),
        ("Red Cross", "text", "text"),
        ("the quick brown fox", "general", "other"),
        ("", "text", "other"),
        ("北京", "general", "entity"),
        ("?!", "text", "other"),
    ],
)
def test_answers(answer, task, expected):
    assert answer_type(answer, task) == expected and expected in ANSWER_TYPES


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Is this a dog?", "yes/no"),
        ("Isn't it red?", "yes/no"),
        ("How many bars are there?", "how many"),
        ("how much does the tea cost?", "how many"),
        ("What color is the sign?", "what color"),
        ("what is the colour of the shape?", "what color"),
        ("What is written here?", "what"),
        ("In which year was it built?", "which"),
        ("Who painted this?", "who"),
        ("Where do they live?", "where"),
        ("Why?", "why"),
        ("How is it cooked?", "how"),
        ("Name the animal.", "other"),
        ("", "other"),
    ],
)
def test_questions(question, expected):
    assert question_type(question) == expected and expected in QUESTION_TYPES
