"""Long texts that made readers quadratic, and how long one may take: seconds, not the minutes of a quadratic one."""

import time

SIZE, SECONDS = 200_000, 8  # on a busy machine; quadratic, the quickest of these took 200
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
]
LONG = [(unit * SIZE)[:SIZE] for unit in UNITS]


def in_time(function, *args):
    started = time.perf_counter()
    result = function(*args)
    assert time.perf_counter() - started < SECONDS
    return result
