import hashlib
import random
import re

import pytest

from mpa.answers.replies import END_TOKENS, without_end_tokens
from mpa.method.prompts import (
    A_MARK,
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
    """A changed word changes every result, and the embedded teacher was trained on these prompts."""
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
            Annotation("What is <image>?", "x", "a mark of the prompt format"),
        ),
        ("", Annotation(None, None, "no question")),
        ("Die Frage: Was ist das?\nAntwort: Katze", Annotation("Was ist das?", "Katze")),
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
    """A reply that is cut where generation may stop parses like the complete reply."""
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
        ("Question: According to the chart,\nwhich year?\nAnswer: 2013", "According to the chart, which year?", "2013"),
        (
            "Question: According to the chart,\n\nwhich year?\n\nAnswer: 2013",
            "According to the chart, which year?",
            "2013",
        ),
        ("Question: What is it?\nA) cat\nB) dog\nAnswer: A", "What is it? A) cat B) dog", "A"),
        ("Question: What is it?\nType: text\nAnswer: cat", "What is it?", "cat"),
        ("Question: <question>\nAnswer: <answer>\n\nQuestion: What is it?\nAnswer: cat", "What is it?", "cat"),
        ("```\nQuestion: What is it?\nAnswer: cat\n```", "What is it?", "cat"),
        ("Question: What is it?\nAnswer:\n```\ncat\n```", "What is it?", "cat"),
        ("Question: What is it?\nAnswer: ```cat```", "What is it?", "cat"),
        ('{"question": "What is it?", "answer": "cat"}', "What is it?", "cat"),
        ('```json\n[{"question": "What is it?",\n "answer": 5}]\n```', "What is it?", "5"),
        ("{'question': 'What\\'s it?', 'answer': 'cat'}", "What's it?", "cat"),
        ('{"question_id": 4, "Question": "Is it \\"red\\"?", "Answer": true}', 'Is it "red"?', "yes"),
        ("Q: What is it?\nA: cat", "What is it?", "cat"),
        ("**Q1:** What is it? A: cat", "What is it?", "cat"),
        ("### Question\nWhat is it?\n\n### Answer\ncat", "What is it?", "cat"),
        ("Question 1: What is it?\nCorrect Answer: cat", "What is it?", "cat"),
        ("Question: What is it?\nThe final answer is: **cat**", "What is it?", "cat"),
        ("Question (text): What is it?\nAnswer (one word): cat", "What is it?", "cat"),
        ("<question>What is it?</question><answer>cat</answer>", "What is it?", "cat"),
        ("Sure! Question: What is it? Answer: cat", "What is it?", "cat"),
        ("Question: Name it | Answer: cat", "Name it", "cat"),
        ('Question: "What is it?"\nAnswer: "cat"', "What is it?", "cat"),
        ("Question: What is the answer: A or B?\nAnswer: A", "What is the answer: A or B?", "A"),
        ('Question: Who asked "Why? When?"?\nAnswer: Bob', 'Who asked "Why? When?"?', "Bob"),
        ("Question: Who asked “Why? When?”?\nAnswer: Bob", "Who asked “Why? When?”?", "Bob"),
        ("Question: Is it (a cat? a dog?) here?\nAnswer: no", "Is it (a cat? a dog?) here?", "no"),
        ("Pregunta: ¿Qué es?\nRespuesta: gato", "¿Qué es?", "gato"),
        ("Question : Qu'est-ce ?\nRéponse : chat", "Qu'est-ce ?", "chat"),
        ("Вопрос: Что это?\nОтвет: кот", "Что это?", "кот"),
        ("问题：这是什么？答案：猫", "这是什么？", "猫"),
        ("質問：これは何ですか。\n答え：猫", "これは何ですか。", "猫"),
        ("질문: 무엇입니까?\n정답: 고양이", "무엇입니까?", "고양이"),
        ("سؤال: ما هذا؟\nالإجابة: قطة", "ما هذا؟", "قطة"),
        ("प्रश्न: यह क्या है?\nउत्तर: बिल्ली", "यह क्या है?", "बिल्ली"),
        ("\ufeffQuestion: What is it?\r\nAnswer: cat\r\n", "What is it?", "cat"),
    ],
)
def test_an_annotation_is_read_in_the_forms_that_models_write(reply, question, answer):
    assert parse_annotation(reply) == Annotation(question, answer)
    cut = next((reply[:i] for i in range(len(reply) + 1) if annotation_is_complete(reply[:i])), reply)
    assert parse_annotation(cut) == Annotation(question, answer)


@pytest.mark.parametrize(
    ("reply", "reason"),
    [
        ("Question: <question>\nAnswer: <answer>", "the prompt's template, not filled in"),
        ("Question: [Your question here]\nAnswer: [Your answer here]", "the prompt's template, not filled in"),
        ("Question: What is it?\nAnswer: <answer>", "no answer"),
        ("Question: What is it?\nAnswer: ...", "no answer"),
        ('{"question": "What is it?", "answer": "Grand Cen', "no answer"),
        ("Question: What is it?\nWhat color?\nAnswer: cat", "two questions"),
        ("Question 1: A?\nQuestion 2: B?\nAnswer 1: x\nAnswer 2: y", "two questions"),
        ("I'm sorry, but I can't help with that.", "a refusal"),
        ("<think>Question: What is it?\nAnswer: cat", "only reasoning, no answer"),
        ("Question: What is <|im_end|>?\nAnswer: x", "a mark of the prompt format"),
    ],
)
def test_what_cannot_be_used_is_left_out_with_its_reason(reply, reason):
    assert parse_annotation(reply).left_out == reason
    assert follow_up_prompt(reply, "paper") is None


@pytest.mark.parametrize("answer", ["I cannot determine that.", "unanswerable", "N/A", "not visible", "不知道"])
def test_a_refusal_is_left_out_unless_it_is_to_be_kept(answer):
    reply = f"Question: What is it?\nAnswer: {answer}"
    assert parse_annotation(reply).left_out == "a refusal"
    assert parse_annotation(reply, keep_refusals=True) == Annotation("What is it?", answer)


def test_marks_of_a_model_are_refused_beside_the_fixed_ones():
    reply = "Question: What does <IMG_CONTEXT> say?\nAnswer: x"
    marks = frozenset({"<IMG_CONTEXT>", "</s>", " "})  # white space among a tokenizer's tokens is no mark
    assert parse_annotation(reply).left_out is None
    assert parse_annotation(reply, marks=marks).left_out == "a mark of the prompt format"
    assert parse_annotation("Question: What is it?\nAnswer: <IMG_CONTEXT>", marks=marks).left_out == A_MARK
    assert parse_annotation("Question: What is it?\nAnswer: a b", marks=marks).left_out is None
    assert follow_up_prompt(reply, "paper", marks) is None
    assert parse_annotation("Question: What is it\nAnswer: x</s>", "released", marks=marks).left_out is None


@pytest.mark.parametrize("token", END_TOKENS)
def test_an_end_token_is_removed_after_the_answer_and_refused_within_it(token):
    pair = "Question: What is it?\nAnswer: a cat"
    for end in (token, f" {token} {token}", f"\n{token}\n", f"{token}\nIt purrs.", f"</s>\n\n{token}\n"):
        assert parse_annotation(pair + end) == Annotation("What is it?", "a cat"), end
        assert parse_annotation(pair + end, "released").answer == "a cat"
        assert follow_up_prompt(pair + end, "paper") == answer_prompt("What is it?")
        cut = next((i for i in range(len(pair + end) + 1) if annotation_is_complete((pair + end)[:i])), None)
        assert parse_annotation((pair + end)[:cut]) == Annotation("What is it?", "a cat")
        assert first_line(f"a cat{end}") == first_line(f"{token}\na cat{end}") == "a cat"
    for within in (f"Question: What{token} is it?\nAnswer: a cat", f"Question: What is it?\nAnswer: a {token} cat"):
        assert parse_annotation(within).left_out == A_MARK
        assert follow_up_prompt(within, "paper") is None
    assert parse_annotation('{"question": "What is it?", "answer": "a cat"}' + token) == Annotation(
        "What is it?", "a cat"
    )
    assert parse_annotation(f"Question: What is it?\nAnswer: {token}").left_out == "no answer"


def test_what_looks_like_an_end_token_is_an_answer():
    for answer in ("<b>", "a < b", "</ s>", "s>", "end of turn", "INSTALL]", "<red>", "1 <2> 3", "<|"):
        assert parse_annotation(f"Question: What is it?\nAnswer: {answer}") == Annotation("What is it?", answer)
        assert first_line(answer) == without_end_tokens(answer) == answer


def test_the_released_reader_finds_what_its_expressions_find():
    draw = random.Random(0)
    pieces = ["Question:", "question:", "queſtion:", "Answer:", "answer:", "?", " ", "\n", "\t", "\u2028", "x", "？"]
    for _ in range(20_000):
        reply = "".join(draw.choices(pieces, k=draw.randint(0, 14)))
        question = re.search(r"question:\s*([^\n]*?)\?", reply, re.IGNORECASE)
        answer = re.search(r"answer:\s*([^\n]*)", reply, re.IGNORECASE)
        expected = Annotation(question and question.group(1).strip(), answer and answer.group(1).strip())
        assert parse_annotation(reply, "released") == expected


Q = "Question: What is it?\n"


@pytest.mark.parametrize(
    ("reply", "answer"),
    [
        ("| Question | Answer |\n|---|---|\n| What is it? | red |", "red"),
        ("Question | Answer\n:---: | ---\nWhat is it? | -5\n", "-5"),
        ("| # | **Question** | **Answer** |\n|-|-|-|\n| 1 | What is it? | **red** |\n| 2 | Why? | so |", "red"),
        ("| Question | What is it? |\n|---|---|\n| Answer | red |", "red"),
        ("| Question: What is it? |\n| Answer: red |", "red"),
        ("| **Question:** What is it? | **Answer:** red |", "red"),
        (f"{Q}Answer:\n| Answer |\n|---|\n| red |", "red"),
        (f"{Q}Answer: | red |", "red"),
        (f"{Q}Answer: |x|", "|x|"),
        *((f"{Q}Answer: {text}", "red") for text in ("[red]", "**[red]**", '["red"]', "(red)", "{red}", "【red】")),
        *((f"{Q}Answer: {text}", "red.") for text in ("**red**.", "*red*.", "`red`.", "- __red__.")),
        *((f"{Q}Answer: {text}", text) for text in ("f(x)", "(a) or (b)", "red (dark)", "(5)", "[a] or [b]")),
        *((f"{Q}Answer:\n{item} red", "red") for item in ("-", "*", "•", ">", "###", "1.", "2)", "- [x]", "→", "- -")),
        (f"{Q}Answer:\n- **red**", "red"),
        (f"{Q}Answer: - red", "red"),
        (f"{Q}Answer:\n- 5", "5"),
        (f"{Q}Answer:\n- -5", "-5"),
        *(
            (f"{Q}Answer: {n}", n)
            for n in ("-5", "−5", "- 5", "− 5", "+5", "> 5", "# 5", "10:30", "50 %", "1. Mai", "A*", "3.0")
        ),
        *((f"{Q}Answer:\n{n}", n) for n in ("-5", "−5", "− 5", "1.5", "> 5")),
        ("Question: Question: What is it?\nAnswer: Answer: red", "red"),
        ("**Question:** Q: What is it?\n**Answer:** The answer: Answer: red", "red"),
        ("Frage: Frage: What is it?\nAntwort: Antwort: red", "red"),
        ('{"question": "Question: What is it?", "answer": "- [red]"}', "red"),
        (f"{Q}Answer: A: red", "A: red"),
        (f"{Q}Answer: A. Smith", "A. Smith"),
        (f"{Q}Answer: Note:", "Note:"),
        *(
            (f"{Q}Answer:{space}{text}red", "red")
            for space in (" ", "\n")
            for text in (
                "Sure! Here is the answer:\n",
                "Sure! Here is the answer: ",
                "Sure!\n",
                "Here's the short answer:\n\n",
            )
        ),
        (f"{Q}Answer: Based on the image, the answer is:\nred", "red"),
        (f"{Q}Answer: Natürlich! Hier ist die Antwort:\nred", "red"),
        (f"{Q}Answer: 当然！答案如下：\nred", "red"),
        (f"{Q}Answer: Sure", "Sure"),
        ("Sure! Here is the question:\nWhat is it?\n\nHere is the answer:\nred", "red"),
        ("Question: Sure! Here is a question:\nWhat is it?\nAnswer: red", "red"),
        ("Question: Here's a question about the image: What is it?\nAnswer: red", "red"),
        ("Question:\n- What is it?\nAnswer:\n- red", "red"),
        ("Question: [What is it?]\nAnswer: [there]", "there"),
        ("Question: | What is it? |\nAnswer: red<br>", "red"),
        ("Question: <br>What is it?\nAnswer: <br/> red<br>", "red"),
    ],
)
def test_an_annotation_keeps_no_decoration_and_each_sign(reply, answer):
    assert parse_annotation(reply) == Annotation("What is it?", answer)
    cut = next((reply[:i] for i in range(len(reply) + 1) if annotation_is_complete(reply[:i])), reply)
    assert parse_annotation(cut) == Annotation("What is it?", answer)


@pytest.mark.parametrize(
    "said", ["Sure! Here is the answer:", "[insert answer]", "**[your answer here]**", "[ ]", "Sure!"]
)
def test_what_only_announces_an_answer_or_holds_its_place_is_none(said):
    assert parse_annotation(f"{Q}Answer: {said}").left_out == "no answer"


def test_a_choice_that_ends_in_a_colon_stays_in_the_question():
    reply = "Question: Choose the correct answer:\nA) cat\nB) dog\nAnswer: A"
    assert parse_annotation(reply) == Annotation("Choose the correct answer: A) cat B) dog", "A")
