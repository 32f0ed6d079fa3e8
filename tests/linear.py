"""Long texts on which parsers used to take quadratic time, and the time limit in seconds for one text."""

import time

SIZE, SECONDS = 200_000, 8  # on a busy machine; the fastest quadratic parser took 200
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
