import hashlib
import time

import pytest

from mpa.prompts import (
    TASK_PROMPTS,
    Annotation,
    annotation_is_complete,
    answer_is_complete,
    answer_prompt,
    first_line,
    follow_up_prompt,
    opened_reasoning,
    parse_annotation,
    read_answer,
    strip_reasoning,
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
        ("Was ist das? Katze", Annotation(None, None, "no question")),
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


@pytest.mark.parametrize(
    ("reply", "question", "answer"),
    [
        (
            "Question: According to the chart,\nwhich year is it?\nAnswer: 2010",
            "According to the chart, which year is it?",
            "2010",
        ),
        ("Question:\nWhich brand,\nif any, is shown\nAnswer: Casio", "Which brand, if any, is shown", "Casio"),
        ('Question: Who asked "Why? When?"?\nAnswer: Bob', 'Who asked "Why? When?"?', "Bob"),
        ("```\nQuestion: What?\nAnswer: a cat\n```", "What?", "a cat"),
        ("Question: What?\nAnswer:\n```\na cat\n```", "What?", "a cat"),
        ('```json\n{"question": "What?", "answer": "a cat"}\n```', "What?", "a cat"),
        ('Here it is: {"Question": "How many?", "Answer": 5}', "How many?", "5"),
        ("Q: What?\nA: a cat", "What?", "a cat"),
        ("### Question\nWhat?\n\n### Answer\na cat", "What?", "a cat"),
        ("**Question**\nWhat?\n**Answer**\na cat", "What?", "a cat"),
        ("Question 1: What?\nAnswer 1: a cat\nQuestion 2: Who?\nAnswer 2: Bob", "What?", "a cat"),
        ("Question (text): What?\nCorrect Answer: a cat", "What?", "a cat"),
        ("<question>What?</question>\n<answer>a cat</answer>", "What?", "a cat"),
        ("Question: What?\nAnswer: \\boxed{a cat}", "What?", "a cat"),
        ("Question: What is the answer: yes or no?\nAnswer: yes", "What is the answer: yes or no?", "yes"),
        ("Question: What?\nA) a cat\nB) a dog\nAnswer: A", "What?", "A"),
        ("Frage: Was ist das?\nAntwort: Katze", "Was ist das?", "Katze"),
        ("Die Frage: Was ist das?\nDie Antwort: Katze", "Was ist das?", "Katze"),
        ("Pregunta: ¿Qué es?\nRespuesta: gato", "¿Qué es?", "gato"),
        ("Вопрос: Что это?\nОтвет: кот", "Что это?", "кот"),
        ("问题：这是什么？\n答案：猫", "这是什么？", "猫"),
        ("質問: これは何ですか？\n答え: 猫", "これは何ですか？", "猫"),
        ("سؤال: ما هذا؟\nجواب: قطة", "ما هذا؟", "قطة"),
        ("<think>Question: draft?\nAnswer: x</think>\nQuestion: What?\nAnswer: a cat", "What?", "a cat"),
        ("Question: draft?\nAnswer: x\n</think>\nQuestion: What?\nAnswer: a cat", "What?", "a cat"),
        ("[THINK]Question: draft?\nAnswer: x[/THINK]Question: What?\nAnswer: a cat", "What?", "a cat"),
        ("Question: What does the sign say?\nAnswer: No", "What does the sign say?", "No"),
        ("Question: How many are there?\nAnswer: none", "How many are there?", "none"),
    ],
)
def test_the_common_forms_of_an_annotation_are_read(reply, question, answer):
    assert parse_annotation(reply) == Annotation(question, answer)
    cut = next((reply[:i] for i in range(len(reply) + 1) if annotation_is_complete(reply[:i])), reply)
    if "</think>" not in reply or reply.startswith("<think>"):  # else the engine puts the tag in front
        assert parse_annotation(cut) == Annotation(question, answer)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Question: <question>\nAnswer: <answer>", "the prompt's own template"),
        ("Question: [Your question here]\nAnswer: [Your answer here]", "the prompt's own template"),
        ("Question: ...\nAnswer: ...", "the prompt's own template"),
        ("Question 1: What?\nQuestion 2: Who?\nAnswer: Bob", "two questions"),
        ("<think>What could I ask? Question: a?\nAnswer: b", "only reasoning, no annotation"),
        ("<think>hm</think>  ", "only reasoning, no annotation"),
        ("I'm sorry, I can't help with that.", "a refusal"),
        *[
            (f"Question: What does it say?\nAnswer: {answer}", "a refusal")
            for answer in (
                *(
                    "I cannot determine the answer.",
                    "unanswerable",
                    "N/A",
                    "n/a.",
                    "not visible",
                    "Unknown",
                    "Cannot be determined",
                ),
                *(
                    "**Not specified**",
                    "I'm sorry, but I can't tell.",
                    "The image does not show it.",
                    "It is unclear",
                    "不知道",
                ),
                *(
                    "无法确定",
                    "Nicht erkennbar",
                    "No se puede determinar",
                    "not visible in the image",
                    "Can't tell",
                    "わかりません",
                ),
            )
        ],
    ],
)
def test_what_is_no_annotation_is_left_out_with_its_reason(reply, reason):
    assert parse_annotation(reply).reason == reason


def test_refusals_are_kept_where_they_are_wanted():
    assert parse_annotation("Question: What?\nAnswer: N/A", keep_refusals=True) == Annotation("What?", "N/A")


def test_marks_of_a_model_are_refused():
    reply = "Question: What is <IMG_CONTEXT>?\nAnswer: x"
    assert parse_annotation(reply).reason is None
    assert parse_annotation(reply, marks=frozenset({"<IMG_CONTEXT>"})).reason == "a mark of the prompt's format in it"


@pytest.mark.parametrize(
    ("reply", "left"),
    [
        *[
            ("<think>a\nb</think>\n\nred", "\n\nred"),
            ("a</think>red", "red"),
            ("<THINK>a</THINK>red", "red"),
            ("red", "red"),
        ],
        *[("◁think▷a◁/think▷red", "red"), ("<think>a<think>b</think>c</think>red", "red"), ("<think>a", ""), ("", "")],
        *[("<|begin_of_thought|>a<|end_of_thought|>red", "red"), ("<think></think>", ""), ("a <b> c", "a <b> c")],
        ("<think>a</think><think>b</think>red", "red"),
    ],
)
def test_reasoning_is_no_part_of_a_reply(reply, left):
    assert strip_reasoning(reply) == left


def test_a_template_that_opens_the_reasoning_is_seen():
    assert opened_reasoning("<|im_start|>assistant\n<think>\n") == "<think>"
    assert opened_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n") == ""
    assert opened_reasoning("What is <think>? Answer") == ""


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        *[
            ("<think>\nblue?\n</think>\n\nred", "red"),
            ("```\nred\n```", "red"),
            ("Answer:\nred", "red"),
            ("<think>red", ""),
        ],
        *[
            ('{"answer": "red"}', "red"),
            ('```json\n{\n"answer": "red"\n}\n```', "red"),
            ("The answer is red.", "The answer is red."),
        ],
    ],
)
def test_the_answer_is_read_from_a_reply(reply, answer):
    assert read_answer(reply) == answer
    cut = next((reply[:i] for i in range(len(reply) + 1) if answer_is_complete(reply[:i])), reply)
    assert read_answer(cut) == answer


LONG = ["Question: " + "?" * 200_000, "question:" + " " * 200_000, "Question: " * 20_000, "question: a\n" * 20_000]
LONG += ["<think>" * 30_000, "</think>" * 30_000, "{" * 200_000, "[" * 200_000, "Question: " + '"' * 200_001]
LONG += ["question:" * 22_000 + "?", "Question: a? " * 20_000, "* " * 100_000, "Question: a\nAnswer: " + "<|a" * 60_000]
LONG += ["Question:\n" + "a b\n" * 50_000, "Question: a?\nAnswer: " + "not " * 50_000, "Question: " + "'a" * 100_000]


@pytest.mark.parametrize("reply", LONG, ids=[str(i) for i in range(len(LONG))])
def test_reading_takes_time_linear_in_the_length(reply):
    started = time.perf_counter()
    (
        parse_annotation(reply),
        parse_annotation(reply, "released"),
        annotation_is_complete(reply + "\n"),
        read_answer(reply),
    )
    assert time.perf_counter() - started < 5  # a quadratic pattern takes minutes at 200 kB
