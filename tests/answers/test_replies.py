import pytest
from linear import LONG, in_time

from mpa.answers.refusals import is_refusal
from mpa.answers.replies import bare, first_line, opened_reasoning, strip_reasoning, undecorated
from mpa.method.prompts import STOPS, parse_annotation

PAIR = "Question: What is it?\nAnswer: a cat"
BLOCKS = [
    ("<think>", "</think>"),
    ("<THINK>", "</THINK>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ('<think time="3">', "</think>"),
    ("<seed:think>", "</seed:think>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|channel|>analysis<|message|>", "<|end|><|start|>assistant<|channel|>final<|message|>"),
    ("<|channel>thought\n", "<channel|>"),
    ("<SUMMARY>a</SUMMARY><CAPTION>b</CAPTION><REASONING>", "</REASONING><CONCLUSION>"),
]


@pytest.mark.parametrize(("opening", "closing"), BLOCKS)
def test_reasoning_is_never_the_answer(opening, closing):
    draft = "It looks blue.\n\nQuestion: Draft?\nAnswer: blue\n"
    assert first_line(f"{opening}{draft}{closing}\n\nred") == "red"
    assert first_line(f"{draft}{closing}\n\nred") == "red"  # the chat template opened it
    whole = parse_annotation(f"{opening}{draft}{closing}\n{PAIR}")
    assert (whole.question, whole.answer, whole.left_out) == ("What is it?", "a cat", None)
    assert parse_annotation(f"{draft}{closing}{PAIR}") == whole
    for cut in (opening, opening + draft, opening + draft + closing):
        assert strip_reasoning(cut) is None
        assert first_line(cut) == ""
        assert parse_annotation(cut).left_out == "only reasoning, no answer"
        for stop in STOPS.values():
            assert not stop(cut + ("\n" if not cut.endswith("\n") else ""))


@pytest.mark.parametrize(
    ("text", "left"),
    [
        ("red", "red"),
        ("", ""),
        ("<think>a<think>b</think>c</think>red", "red"),
        ("<think>a<think>b</think>red", None),  # as it may still be within the outer block
        ("<think>a</thinking>red", "red"),
        ("<think>a</think><think>b</think>red", "red"),
        ("red<think>was that right?</think>", "red"),
        ("red\n<think>was that ri", "red\n"),
        ("<think>\n\n</think>\n\nred", "red"),
        ("<|begin_of_thought|>a<|end_of_thought|><|begin_of_solution|>red<|end_of_solution|>", "red"),
        ("<|begin_of_box|>red<|end_of_box|>", "red"),
        ("a < b and think > c", "a < b and think > c"),
    ],
)
def test_what_is_left_without_reasoning(text, left):
    assert strip_reasoning(text) == left


def test_a_prompt_says_whether_the_reply_begins_in_reasoning():
    assert opened_reasoning("<|im_start|>assistant\n<think>\n")
    assert opened_reasoning("<|assistant|>[THINK]")
    assert not opened_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not opened_reasoning("<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("reply", "line"),
    [
        ("<answer>red</answer>", "red"),
        ("<think>a</think><answer>\nred\n</answer>", "red"),
        ("```\nred\n```", "red"),
        ("```text\nred\n```", "red"),
        ("Answer:\nred", "red"),
        ("**Answer:**\n\nred", "red"),
        ("---\nred", "red"),
        ("Answer: red", "Answer: red"),
        ("Answer", "Answer"),
        ("-5", "-5"),
        ("Sure! Here is the answer:\nred", "red"),
        ("Sure!\n\nred", "red"),
        ("Based on the image, the answer is:\n**red**", "**red**"),
        ("OK.\nIt says OK", "OK."),
        ("Note:\nred", "Note:"),
    ],
)
def test_the_short_answer_is_the_first_line_that_says_something(reply, line):
    assert first_line(reply) == line
    cut = next((reply[:i] for i in range(len(reply) + 1) if STOPS["answer"](reply[:i])), reply)
    assert first_line(cut) == line


@pytest.mark.parametrize(
    ("text", "inner"),
    [
        ("**red**", "red"),
        ("`red`", "red"),
        ('"red"', "red"),
        ("“red”", "red"),
        ("**“red”**", "red"),
        (r"\boxed{red}", "red"),
        (r"Thus $\boxed{\text{red}}$.", "red"),
        (r"\(\frac{3}{4}\)", "3/4"),
        ("<answer>red</answer>", "red"),
        ("<answer>red", "red"),
        ("<b>red</b>", "red"),
        ('"a" or "b"', '"a" or "b"'),
        ("**a** and **b**", "**a** and **b**"),
        ("5'", "5'"),
        ("", ""),
    ],
)
def test_what_decorates_an_answer_goes(text, inner):
    assert bare(text) == inner


@pytest.mark.parametrize("text", ["**", "***", "[ ]", "<br>", "A*", "-5", "- 5"])
def test_what_is_decoration_alone_or_may_be_meant_stays(text):
    assert undecorated(text) == text


REFUSALS = """
I cannot determine the answer. | I can't tell | Cannot be determined | cannot tell from the image | unanswerable | N/A | n/a
not visible | Not visible in the image. | Not clearly visible | not specified | The text is not legible | unknown | Unknown.
unclear | I'm sorry, but I can't assist with that. | I don't know | I’m not sure | It is impossible to tell | hard to say
There is not enough information | Insufficient information | The image does not provide this information | unable to determine
Too blurry to read | **Unanswerable** | no visible text | As an AI language model, I cannot see | I don't see any text
The name of the store cannot be determined from the image. | Nicht erkennbar | Ich weiß es nicht | Je ne sais pas
No se puede determinar | Não sei | Non lo so | 不知道 | 无法确定 | わかりません | 알 수 없음 | неизвестно | غير معروف | पता नहीं | Bilinmiyor
"""
ANSWERS = """
red | None | nothing | no | No one | 0 | NA | clear | invisible | not red | no parking | Not for sale | Unknown Pleasures
I Can't Get No Satisfaction | Can't Stop the Feeling | the unknown soldier | Because the sun is not visible | do not enter
don't walk | hard hat | Unclear Path | sorry sign | the table is not available for use
"""


def test_refusals_in_many_wordings_are_told_from_answers():
    refusals, answers = (
        [text.strip() for line in block.strip().splitlines() for text in line.split(" | ")]
        for block in (REFUSALS, ANSWERS)
    )
    assert [text for text in refusals if not is_refusal(text)] == []
    assert [text for text in answers if is_refusal(text)] == []


@pytest.mark.parametrize("text", LONG)
def test_200_kb_take_time_in_proportion(text):
    for read in (strip_reasoning, first_line, bare, is_refusal, parse_annotation, *STOPS.values()):
        in_time(read, text)
        in_time(read, f"Question: What?\nAnswer: {text}")
    in_time(parse_annotation, text, "released")
