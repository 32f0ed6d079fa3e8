"""A run folder with PA's and PI's files, written from a table of samples, for the checks and the diagnosis."""

from pathlib import Path

import synthetic_runs as fake

from mpa.method.parity import ParityRule
from mpa.runs.layout import Cell

CELL = Cell("textVQA", "big", "small")


def write(folder: Path, samples: list[dict], cell: Cell = CELL, ending: str = "", **meta) -> Path:
    """`samples` have question, annotation, lvlm, svlm (None: not asked), and optionally left_out, finish_reason, image,
    truth_question and truth. Returns the parity set's path.
    """
    pa, lvlm, svlm = [], [], []
    for i, s in enumerate(samples):
        image = {"question_id": s.get("id", i), "image_path": s.get("image", f"/images/{i}.png")}
        left_out = s.get("left_out")
        truth = {"ground_truth_question": s.get("truth_question"), "ground_truth_answer": s.get("truth")}
        annotation = {"predicted_question": s["question"], "predicted_answer": s["annotation"]}
        pa.append(image | truth | annotation | {"left_out": left_out, "logprob": -0.1})
        asked = image | {"PA_question": s["question"], "PA_answer": s["annotation"], "left_out": None, "logprob": -0.5}
        if not left_out:
            lvlm.append(asked | {"predictions": s["lvlm"], "finish_reason": s.get("finish_reason")})
        if s.get("svlm") is not None:
            svlm.append(asked | {"predictions": s["svlm"]})
    parity = ParityRule("exact", "paper").parity_set(lvlm, svlm)
    prefix = f"PI_{cell.lvlm}"
    fake.write(folder / f"PA_{cell.lvlm}_{cell.dataset}.json", pa)
    fake.write(folder / f"{prefix}_{cell.lvlm}_{cell.dataset}.json", lvlm)
    fake.write(folder / f"{prefix}_{cell.svlm}_{cell.dataset}.json", svlm)
    train = folder / f"{prefix}_train_{cell.lvlm}_{cell.svlm}_{cell.dataset}{ending}.json"
    fake.write(train, parity)
    settings = {"settings": {"preset": "paper", "match": "exact", "hold_out": 0.0}, "n": len(parity)}
    settings |= {"model_path_lvlm": f"hub/{cell.lvlm}", "model_path_svlm": f"hub/{cell.svlm}"}
    fake.write(
        train.with_suffix(".meta.json"), settings | {"funnel": {"pictures": len(pa), "parity": len(parity)}} | meta
    )
    return train


def word(i: int) -> str:
    return "w" + "".join("abcdefghij"[int(digit)] for digit in str(i))


def sample(i: int, lvlm: str | None = None, svlm: str | None = "wrong", annotation: str | None = None, **more) -> dict:
    """A sample with an open answer, which the L-VLM repeats and the S-VLM does not know."""
    answer = annotation or word(i)
    return {"question": f"what is thing {i}?", "annotation": answer, "lvlm": lvlm or answer, "svlm": svlm} | more
