"""The speed of checking images and scoring answers, relative to a plain loop in the same run.

    python benchmarks/data.py

Images: 2,000 generated JPEGs of 640 x 480 are opened, decoded and hashed with 1 and 2 workers; the plain loop calls
Pillow's open and convert. Scores: 100,000 predictions of a TextVQA-like test set with all metrics and intervals; ANLS
is also compared with a Levenshtein distance in Python. The last line is a JSON object.
"""

import json
import os
import random
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from PIL import Image

from mpa.answers.metrics import anls
from mpa.data import image_check
from mpa.data.protocol import Sample
from mpa.models.families import MAX_PIXELS, MIN_PIXELS
from mpa.runs import scoring

IMAGES, PREDICTIONS, PLAIN = 2000, 100_000, 10_000


def seconds(work) -> float:
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def draw_images(folder: Path) -> list[Sample]:
    samples = []
    for i in range(IMAGES):
        path = folder / f"{i:05}.jpg"
        Image.effect_noise((640, 480), 20 + i % 100).convert("RGB").save(path, quality=85)
        samples.append(Sample(i, str(path)))
    return samples


def pillow_loop(samples: list[Sample]) -> None:
    for sample in samples:
        with Image.open(sample.image_path) as file:
            file.convert("RGB")


def draw_results(n: int) -> list[dict]:
    """Ten answers per question, of one to three words, that mostly agree; predictions that are often one of them."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(20_000)]
    results = []
    for i in range(n):
        first, second = (" ".join(rng.choices(words, k=rng.randint(1, 3))) for _ in range(2))
        answers = [first] * rng.randint(4, 10)
        answers += [second] * (10 - len(answers))
        said = rng.choice([first, first, second, first.title() + ".", first[:-1], " ".join(rng.choices(words, k=2))])
        results.append({"question_id": i, "GT_answer": first, "predictions": said, "answers": answers})
    return results


def levenshtein(a: str, b: str) -> int:
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        previous, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            previous, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, previous + (x != y))
    return row[-1]


def plain_anls(prediction: str, answers: list[str]) -> float:
    prediction, best = prediction.strip().lower(), 0.0
    for answer in answers:
        answer = answer.strip().lower()
        distance = levenshtein(prediction, answer) / max(len(prediction), len(answer), 1)
        best = max(best, 1 - distance if distance < 0.5 else 0.0)
    return best


def main() -> None:
    figures = {}
    with tempfile.TemporaryDirectory() as folder:
        samples = draw_images(Path(folder))
        pillow_loop(samples[:100])  # warm
        figures["images_per_second_pillow"] = IMAGES / seconds(lambda: pillow_loop(samples))
        for workers in (1, 2):
            image_check.check(samples[:10], workers, MIN_PIXELS, MAX_PIXELS)  # imports
            took = seconds(lambda n=workers: image_check.check(samples, n, MIN_PIXELS, MAX_PIXELS))
            figures[f"images_per_second_{workers}"] = IMAGES / took
            figures[f"ratio_{workers}"] = figures[f"images_per_second_{workers}"] / figures["images_per_second_pillow"]
            print(
                f"check, {workers} workers: {IMAGES / took:.0f} images/s, {figures[f'ratio_{workers}']:.2f} of Pillow's loop"
            )

    results = draw_results(PREDICTIONS)
    figures["scoring_seconds"] = seconds(lambda: scoring.score(results, "textVQA"))
    print(
        f"all {len(scoring.metric_names('textVQA'))} metrics, {PREDICTIONS:,} predictions: {figures['scoring_seconds']:.1f} s"
    )
    part = [(r["predictions"], r["answers"]) for r in results[:PLAIN]]
    plain, ours = [], []
    slow = seconds(lambda: plain.extend(plain_anls(*pair) for pair in part))
    fast = seconds(lambda: ours.extend(anls(*pair) for pair in part))
    assert all(abs(a - b) < 1e-9 for a, b in zip(plain, ours, strict=True))
    figures["anls_ratio"] = slow / fast
    print(f"ANLS, {PLAIN:,} predictions: {slow / fast:.1f} times as fast as the plain loop, scores equal")
    print(json.dumps({"cores": os.cpu_count(), **{name: round(value, 3) for name, value in figures.items()}}))


if __name__ == "__main__":
    main()
