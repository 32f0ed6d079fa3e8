"""Samples of a yes/no-heavy parity set, for the rules that select."""


def asked(n: int, question: str, answer: str, first: int) -> list[dict]:
    return [{"question_id": first + i, "PA_question": question, "PA_answer": answer} for i in range(n)]


# Of 400 consistent samples 200 are yes/no questions, half of them "yes"; the S-VLM errs on 60, nearly all of them "no".
PARITY = [*asked(50, "is there no circle?", "no", 0), *asked(10, "is it red?", "yes", 100)]


RIGHT = [*asked(50, "is it red?", "no", 200), *asked(90, "is it red?", "yes", 300)]
RIGHT += [*asked(150, "what shape is it?", "circle", 400), *asked(40, "what shape is it?", "square", 600)]
RIGHT += [r | {"PA_answer": f"shape {i}"} for i, r in enumerate(asked(10, "what shape is it?", "", 700))]
