"""Long texts that made readers quadratic, and how long one may take: seconds of this process, not the minutes of a quadratic one."""

import time

SIZE, SECONDS = 200_000, 8  # quadratic, the quickest of these took 200
UNITS = [
    "?",
    "1",
    " ",
    "question: ",
    "question:",
    "Question: a\n",
    "<think>",
    "</think>",
    "<think></think>",
    '"question": "',
    "(",
    "\"'",
    "**",
    "|",
    "\\boxed{",
    "</s>",
    "</s> x",
]
LONG = [(unit * SIZE)[:SIZE] for unit in UNITS]


def in_time(function, *args):
    started = time.process_time()
    result = function(*args)
    assert time.process_time() - started < SECONDS
    return result
