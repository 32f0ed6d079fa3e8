"""A run folder with PA's and PI's files, written from a table of samples, for the checks, the diagnosis and the report."""

import json
from pathlib import Path

import synthetic_runs as fake
from PIL import Image

from mpa.method.rules.rule import Selection
from mpa.method.verdict import PARITY, Judge
from mpa.runs.judging import annotation_of
from mpa.runs.layout import Cell
from mpa.stages.train_set import train_records

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
    judge, of_svlm = Judge.of({"match": "exact", "preset": "paper"}), {r["question_id"]: r for r in svlm}
    kept = [r for r in lvlm if judge(annotation_of(r), r, of_svlm.get(r["question_id"])).reason == PARITY]
    parity = train_records(Selection(kept, []), "paper")
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


def whole(
    folder: Path,
    images: Path,
    texts: list[str] | None = None,
    cell: Cell = CELL,
    n=130,
    questions=60,
    evaluated=True,
    name="{}.png",
) -> None:
    """A whole run with images: kept and rejected samples, evaluations before and after, a training log.

    Image 3 is missing and image 4 is broken. `texts` replace those of the first samples and test questions.
    """
    images.mkdir(parents=True, exist_ok=True)
    samples = []
    for i in range(n):
        path = images / name.format(i)
        if i != 3 and not path.exists():
            Image.new("RGB", (40, 30), (i % 255, 90, 160)).save(path)
        more = {"svlm": word(i)} if i % 3 == 1 else {"lvlm": "else", "svlm": None} if i % 3 == 2 else {}
        samples.append(sample(i, image=str(path), **more))
    for s, text in zip(samples, texts or [], strict=False):
        s |= {"question": text, "annotation": text, "lvlm": text, "svlm": "other " + text[:50], "id": text}
    (images / name.format(4)).write_text("not an image")
    write(folder, samples, cell)
    if evaluated:
        before, after = ([int(i % k == 0) for i in range(questions)] for k in (2, 3))
        for model, right in ((cell.svlm, before), (f"PL_{cell.lvlm}_{cell.svlm}_{cell.dataset}", after)):
            path = fake.evaluation(folder, model, cell.dataset, right)
            records = json.loads(path.read_text())
            for i, r in enumerate(records):
                r["image_path"] = str(images / name.format(i))
                if texts and i < len(texts):
                    r |= {"GT_question": texts[i], "predictions": texts[i]}
            fake.write(path, records)
        model = folder / f"PL_{cell.lvlm}_{cell.svlm}_{cell.dataset}"
        fake.write(model / "train_meta.json", {"settings": {}, "samples": 44, "steps": 12})
        rates = {"lr_language": 1e-5, "lr_vision": 2e-6}
        history = [
            {"step": i, "loss": 1 / (i + 1), "grad_norm": 1.0, "samples_per_second": 9.5} | rates for i in range(12)
        ]
        fake.write(model / "trainer_state.json", {"log_history": history})
