"""Remove what surrounds an answer in a reply: end tokens, reasoning before it, Markdown and quotes, labels before it.

Everything here takes time linear in the length of the reply, for any input.
"""

import re

# --- end tokens ------------------------------------------------------------------------------------

# What ends a turn or opens the next, in any family: a server may return it as text. Local engines do not decode it.
END_TOKENS = tuple(
    """
    <|im_end|> <|endoftext|> <|im_start|> </s> <eos> <end_of_turn> <start_of_turn> <turn|> <|turn> <end_of_utterance>
    <|eot_id|> <|eom_id|> <|eot|> <|eom|> <|EOT|> <|end_of_text|> <|start_header_id|> <|end_of_role|> <|start_of_role|>
    <|end|> <|return|> <|call|> <|start|> <|user|> <|observation|> <|assistant|> <|END_OF_TURN_TOKEN|> <|START_OF_TURN_TOKEN|>
    <｜end▁of▁sentence｜> <|end_of_sentence|> <|eos|> <|endofturn|> [|endofturn|] <|stop|> <eoa> <eoh> <EOS_TOKEN>
    [EOS] [EOT] [INST] [/INST] <|eos_token|> <|end_of_message|> <s> <bos> <|begin_of_text|> <|startoftext|>
    """.split()
)
_END_RUN = re.compile(rf"(?:{'|'.join(map(re.escape, END_TOKENS))}|\s)++")


def without_end_tokens(text: str) -> str:
    """`text` without the end tokens at its end, and the white space before and between them; other text as it is.

    "</s>" printed in an image cannot be told from the token, and is taken for it, as a tokenizer would.

    >>> without_end_tokens("red<turn|> </s>\\n"), without_end_tokens("a </s> b"), without_end_tokens("a < b ")
    ('red', 'a </s> b', 'a < b ')
    """
    if not text.rstrip().endswith(END_TOKENS):
        return text
    return text[: next(run.start() for run in _END_RUN.finditer(text) if run.end() == len(text))]


# --- reasoning -------------------------------------------------------------------------------------

# DeepSeek, Qwen and most others write <think>…</think>; Mistral [THINK], Kimi ◁think▷, Seed <seed:think>, Cohere
# <|START_THINKING|>, gpt-oss and Gemma channels, Granite a sentence; LLaVA-CoT has sections.
_NAMES = r"(?:seed:)?think(?:ing)?|thoughts?|thought_process|reasoning|reflection|scratchpad|inner_monologue|analysis"
_NAMES += r"|rationale|summary|caption"
_OPEN = rf"""
    <\s?(?:{_NAMES})(?:\s[^<>/]{{0,99}})?>  |  ◁\s?(?:{_NAMES})\s?▷  |  \[(?:think(?:ing)?|thought|reasoning)\]
    | <\|(?:begin_of_|start_|start_of_)(?:thought|thinking|think|reasoning)\|>  |  <\|(?:think|thinking|inner_prefix)\|>
    | <\|channel\|?>\s?(?:analysis|commentary|thought)(?:<\|message\|>)?  |  <unused94>(?:thought\b)?
    | ^here\sis\smy\sthought\sprocess:
"""
_CLOSE = rf"""
    <\s?/\s?(?:{_NAMES})\s?>  |  ◁\s?/\s?(?:{_NAMES})\s?▷  |  \[/(?:think(?:ing)?|thought|reasoning)\]
    | <\|(?:end_of_|end_)(?:thought|thinking|think|reasoning)\|>  |  <\|(?:/think|/thinking|inner_suffix)\|>
    | <channel\|>  |  <unused95>
"""
# Everything before one of these is reasoning, marked or not.
_FINAL = r"""
    (?:<\|start\|>assistant)?<\|channel\|?>\s?final(?:<\|message\|>)?  |  assistantfinal  |  \[BEGIN\ FINAL\ RESPONSE\]
    | <\s?(?:conclusion|response|solution|final_answer)\s?>  |  <\|(?:begin_of_|start_)(?:solution|response)\|>
    | ^here\sis\smy\sresponse:
"""
# These only delimit the answer.
_AROUND = r"""
    <\s?/\s?(?:conclusion|response|solution|final_answer)\s?>  |  <\|(?:end_of_|end_)(?:solution|response)\|>
    | \[END\ FINAL\ RESPONSE\]  |  <\|(?:begin|end)_of_box\|>
"""
_REASONING = re.compile(
    f"(?P<open>{_OPEN})|(?P<close>{_CLOSE})|(?P<final>{_FINAL})|(?P<around>{_AROUND})", re.I | re.M | re.X
)
_OPENED = re.compile(rf"(?:{_OPEN})\s*\Z", re.I | re.X)


def _visible(text: str) -> tuple[str, bool, bool]:
    """(`text` without reasoning, whether it had any, whether it ends inside a reasoning block)."""
    kept, at, depth, found = [], 0, 0, False
    for mark in _REASONING.finditer(text):
        if not depth:
            kept.append(text[at : mark.start()])
        at, kind = mark.end(), mark.lastgroup
        found = found or kind != "around"
        if kind == "final" or (kind == "close" and not depth):  # the chat template had opened the block
            kept, depth = [], 0
        elif kind != "around":
            depth += 1 if kind == "open" else -1
    if not depth:
        kept.append(text[at:])
    return "".join(kept) if at else text, found, depth > 0


def strip_reasoning(text: str) -> str | None:
    """`text` without reasoning blocks and end tokens. A closing tag alone ends a block that the chat template opened.

    Text before a block stays. None if there is only reasoning, complete or not.

    >>> strip_reasoning("<think>It looks red.</think>red"), strip_reasoning("so, red</think>red")
    ('red', 'red')
    """
    visible, found, _ = _visible(without_end_tokens(text))
    if found and not visible.strip():
        return None
    return visible.lstrip() if found else visible


def in_reasoning(text: str) -> bool:
    """Does `text` end inside a reasoning block that it opened itself?"""
    return _visible(text)[2]


def has_reasoning(text: str) -> bool:
    """Does `text` hold reasoning, complete or not?"""
    return _visible(text)[1]


def opened_reasoning(prompt: str) -> str:
    """The tag that opens a reasoning block at the end of a formatted prompt, or "".

    The reply then starts inside the block but lacks the opening tag, so the engine puts this tag in front of the reply.
    """
    opened = _OPENED.search(prompt[-200:])
    return opened[0].strip() if opened else ""


def is_reasoning_tag(token: str) -> bool:
    """Does this token open or close reasoning?"""
    return bool(_REASONING.fullmatch(token.strip())) and not re.fullmatch(_AROUND, token.strip(), re.I | re.X)


# --- decoration of an answer -----------------------------------------------------------------------

_FENCE = re.compile(r"[ \t>]*(?:```|~~~)[\w+-]*[ \t]*")
_RULE = re.compile(r"[ \t]*([-*_=])[ \t]*(?:\1[ \t]*){2,}")
_TAGS = "answer|b|strong|em|i|u|code|p|span|div|mark|final|ans"
_DRESSED = [
    re.compile(r"(\*{1,3}|_{1,3}|`{1,3}|~~)((?:(?!\1).)+)\1", re.S),
    re.compile(rf"<({_TAGS})>((?:(?!</).)*)(?:</\1>)?", re.S | re.I),
    re.compile(r"()\\(?:text|textbf|textit|textrm|emph|mathrm|mathbf|mathit|mbox|fbox)\{([^{}]*)\}"),
    re.compile(r"()\\[(\[](.*)\\[)\]]", re.S),
    re.compile(r"(\$\$?)([^$]+)\1"),
    *(re.compile(f"({a})([^{a}{b}]+){b}") for a, b in ('""', "''", "“”", "‘’", "„“", "«»", "「」", "『』", "””")),
]
_FRACTION = re.compile(r"\\[dt]?frac\{([^{}]{1,40})\}\{([^{}]{1,40})\}")


def _boxed(text: str) -> str | None:
    r"""The content of the last \boxed{…}; None if there is no complete one."""
    start = text.rfind("\\boxed{")
    depth = 0
    for i in range(start + 6, len(text)) if start >= 0 else ():
        depth += {"{": 1, "}": -1}.get(text[i], 0)
        if not depth:
            return text[start + 7 : i]
    return None


def bare(text: str) -> str:
    r"""`text` without decoration around all of it: Markdown, quotes, LaTeX, tags; or the content of its last \boxed{…}.

    >>> bare('**"red"**'), bare(r"So it is $\boxed{\text{red}}$."), bare("<answer>red</answer>"), bare('"a" or "b"')
    ('red', 'red', 'red', '"a" or "b"')
    """
    text = text.strip()
    for _ in range(6):  # deeper nesting does not occur in practice
        boxed = _boxed(text)
        inner = boxed if boxed is not None else next((m[2] for p in _DRESSED if (m := p.fullmatch(text))), text)
        if not inner.strip() or inner.strip() == text:
            break
        text = inner.strip()
    return _FRACTION.sub(r"\1/\2", text).replace("\\%", "%")


# A list's item. "- 5" and "1. Mai" are items only on lines of their own; "> 5", "+ 5" and "# 5" never are.
_ITEM = r"[•▪●◦‣○■□➤→▸►✅✔☑👉]\ufe0f? *|(?:[>*+·-]|#{1,6}) +(?=[^\W\d_]|[*_\"'`“‘«\[(<])|\[[ xX✓]\] +"
_ITEMS = {False: re.compile(_ITEM), True: re.compile(rf"{_ITEM}|[*·-] +(?=\S)|\d{{1,2}}[.)] +(?=[^\W\d_])")}
_ENCLOSED = [
    *(re.compile(rf"\{a}([^\{a}\{b}]+)\{b}") for a, b in ("[]", "{}", "【】")),
    re.compile(r"\(([^()]*[^\W\d_][^()]*)\)"),  # (5) may be -5
    re.compile(r"<([^<>]+[?？])>"),
    re.compile(r"\|([^\W\d_]{2}[^|]*)\|"),  # |x| is a value
]
_EMPHASIS_AND_STOP = re.compile(r"(\*{1,3}|_{1,3}|`)([^*_`]+)\1([.!。])")  # the mark of a sentence stands outside
# Half of a pair: of a table's cell, of emphasis; and line breaks.
_HALF = re.compile(r"(?:\s*<br ?/?>)+\Z|\A(?:<br ?/?>\s*)+|(?:(?<=\s)\*+|\*{2,})\Z|\A\*+(?=[^*]+\Z)|\A\|\s|\s\|\Z")


def undecorated(text: str, own_line: bool = False) -> str:
    """`bare`, also without what makes `text` a list's item, a table's cell or a filled-in [placeholder].

    >>> [undecorated(text) for text in ("- **red**", "[red]", "| red |", "-5", "- 5", "A*")], undecorated("- 5", own_line=True)
    (['red', 'red', 'red', '-5', '- 5', 'A*'], '5')
    """
    for _ in range(6):
        inner = _HALF.sub("", bare(text)).strip()
        if sentence := _EMPHASIS_AND_STOP.fullmatch(inner):
            inner = sentence[2] + sentence[3]
        if item := _ITEMS[own_line].match(inner):
            inner = inner[item.end() :]
        else:
            inner = next((m[m.lastindex] for p in _ENCLOSED if (m := p.fullmatch(inner))), inner).strip()
        if not inner or inner == text:
            break
        text, own_line = inner, own_line and bool(item)
    return text


def is_frame(line: str) -> bool:
    """Is this line blank, a code fence or a rule?"""
    return not line.strip() or bool(_FENCE.fullmatch(line) or _RULE.fullmatch(line))


# --- labels ----------------------------------------------------------------------------------------

_QUESTION = """
question, questions, frage, pregunta, pergunta, domanda, vraag, soru, pytanie, pertanyaan, soalan, fråga, spørgsmål,
spørsmål, kysymys, otázka, kérdés, întrebare, câu hỏi, вопрос, питання, въпрос, ερώτηση, سؤال, السؤال, پرسش, שאלה,
प्रश्न, सवाल, প্রশ্ন, คำถาม, 问题, 問題, 提问, 提問, 質問, 問い, 问, 問, 질문, 문제
"""
_ANSWER = """
answer, answers, ans, antwort, respuesta, réponse, reponse, resposta, risposta, antwoord, cevap, yanıt, odpowiedź,
odpověď, jawaban, svar, vastaus, válasz, răspuns, câu trả lời, trả lời, đáp án, ответ, відповідь, отговор, απάντηση,
إجابة, الإجابة, جواب, الجواب, پاسخ, תשובה, उत्तर, जवाब, উত্তর, คำตอบ, 答案, 回答, 答え, 答, 답변, 정답, 대답, 답
"""
_HERE = """
here is, here are, here's, here’s, hier ist, hier sind, voici, aquí está, aquí tienes, aqui está, ecco, вот, 以下是, 这是, 以下は
"""
_BEFORE = f"""
{_HERE.strip()}, the, my, your, a, an, its, die, der, das, la, le, el, o, a, de, het, final, correct, right, short, expected, model,
proposed, sample, example, generated, predicted, visual, vqa, reference, ground truth, ground-truth, brief, one-word,
正确, 正確, 参考, 最终, 最終, richtige, correcta, correcte, correta, corretta, правильный
"""


def _any(words: str) -> str:
    """Any of these words, the longest first."""
    return "|".join(sorted((re.escape(w.strip()) for w in words.split(",")), key=len, reverse=True))


QUESTION_WORDS, ANSWER_WORDS = _any(_QUESTION), _any(_ANSWER)
# A number or a remark after a label's word: Question 1, Answer (one word).
_BEHIND = r"(?:[ _]?(?:no\.? ?|nr\.? ?|#|№)?\d{1,3})?(?: ?[(\[][^()\[\]\n]{0,40}[)\]])?"
_WORDS = rf"(?:(?:{_any(_BEFORE)})[ _-]?){{0,4}}(?:(?P<question>{QUESTION_WORDS})|(?P<answer>{ANSWER_WORDS})){_BEHIND}"
_LETTERS = r"(?:(?P<q>q)|(?P<a>a))(?:\d{1,3})?"
_END = r"""[*_`"'”)\]]*+[ ]*+"""
# A label at the start of a line, with any decoration: "- **Question 1:** …", "### Answer", "Q: …".
LABEL = re.compile(
    rf"""[ \t\ufeff\u200b\-*#>•·|_~`"'“(\[{{\d.)]*+(?:{_WORDS}{_END}(?:(?:is|ist|es|est|è|é) ?)?(?:[:：=]|[-–—](?=\s)|$)"""
    rf"""|{_LETTERS}{_END}(?:[:：]|\.(?=\s)))[ \t]*+(?:[*_`]++(?=\s|$))?[ \t]*+""",
    re.IGNORECASE,
)
# A label later in the line, after a sentence or a separator: "Question: …? Answer: …".
INLINE = re.compile(
    rf"""(?:(?<=[?？؟.!。！"'”’)>\]])[\s|;,/*_–—-]*+|(?<=[^\s|;,])\s*+[|;,]\s*+[*_]*+)(?={_WORDS}[*_`]*+ ?[:：])""",
    re.IGNORECASE,
)
INLINE_LETTER = re.compile(r"(?<=[?？؟])[\s|*_]*+(?=a ?[:：])", re.IGNORECASE)
_ANSWER_TAG = re.compile(r"</?answer>", re.IGNORECASE)

# --- announcements ---------------------------------------------------------------------------------

OPENING = re.compile(r"(?:sure|certainly|of course|okay|ok|well|so|thus|therefore|hence)\b[!,.:]+ *", re.IGNORECASE)
_POLITE = r"(?:sure(?: thing)?|certainly|of course|absolutely|gladly|no problem|natürlich|gerne?|bien sûr|claro|certo|конечно|当然|好的)"
_SPOKEN = rf"(?<![a-zà-ÿа-яё])(?:{QUESTION_WORDS}|{ANSWER_WORDS})(?![a-zà-ÿа-яё])"
# What says only that something follows: "Sure!", "Sure! Here is the answer:".
_ANNOUNCED = re.compile(
    rf"(?:(?:{_POLITE}|ok|okay) ?[!！,.]+\s*)?(?:{_any(_HERE)})[^:：?\n]{{0,80}}{_SPOKEN}[^:：?\n]{{0,80}}[:：][\s*_]*|{_POLITE} ?[!！]+\s*",
    re.IGNORECASE,
)
_INTRODUCES = re.compile(rf"[^:：\n]{{0,120}}{_SPOKEN}[^:：\n]{{0,80}}[:：][\s*_]*", re.IGNORECASE)


def without_announcement(text: str) -> str:
    """`text` without "Sure!" or "Here is the answer:" before it.

    >>> without_announcement("Sure! Here is the answer: red"), without_announcement("Sure!"), without_announcement("Sure")
    ('red', '', 'Sure')
    """
    start = _ANNOUNCED.match(text)
    return text[start.end() :] if start else text


def introduces(line: str) -> bool:
    """Does this line only say what follows: "Answer:", "Sure! Here is the answer:", "Based on the image, the answer is:"?"""
    line = without_announcement(line.strip())
    label = LABEL.match(line)
    only_label = label and label.end() == len(line) and not line.isalpha()
    return not line or bool(only_label or _INTRODUCES.fullmatch(line))


def first_line(reply: str) -> str:
    """The first line of a reply with content: the short answer that the prompt asks for. "" if there is none.

    Skips reasoning, blank lines, code fences, horizontal rules, and lines that only say what follows, such as "Answer:".
    End tokens at the line's end are removed.
    """
    for line in (strip_reasoning(reply) or "").splitlines():
        line = _ANSWER_TAG.sub("", without_end_tokens(line)).strip()
        if not is_frame(line) and not introduces(line):
            return line
    return ""
