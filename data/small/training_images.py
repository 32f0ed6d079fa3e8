"""The drawings that the small suite's models learn from. They have seeds of their own, apart from the suite's."""

import json
import os
import random
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
import torch
from architectures import PATCH, PATCHES
from scenes import DRAW, FACTS, LETTERS, SIZE
from tqdm import tqdm

SEED = 10_000_000  # image i is drawn from the seed SEED + i; the suite's seeds are smaller
SHARES = {"signs": 0.25, "labels": 0.25, "chart": 0.25, "picture": 0.25}
GRID = SIZE // PATCH  # patches along an edge


def _draw(numbers: range) -> tuple[np.ndarray, list[dict]]:
    pixels, scenes = [], []
    names = list(DRAW)
    for i in numbers:
        name = names[i % len(names)]
        scene = DRAW[name](random.Random(SEED + i))
        pixels.append(np.asarray(scene.image, dtype=np.uint8))
        questions = [(q.kind, q.text, q.answer) for q in scene.questions]
        scenes.append({"name": name, "facts": scene.facts, "questions": questions, "letters": scene.letters})
    return np.stack(pixels), scenes


class Images:
    """`n` drawings: `pixels` [n, 96, 96, 3], `scenes`, and what a vision tower should see.

    `facts` [n, facts] holds the place of each fact's value plus 1; 0 where the scene has no such fact. `letters` [n, 144]
    holds the place of the letter whose centre lies in a patch plus 1; 0 for none, -100 in charts, whose letters are unknown.
    """

    def __init__(self, n: int, folder: Path):
        file, told = folder / f"images-{n}.npy", folder / f"images-{n}.json"
        if not told.exists():
            folder.mkdir(parents=True, exist_ok=True)
            self._draw_all(n, file, told)
        self.pixels = np.load(file, mmap_mode="r")
        self.scenes = json.loads(told.read_text())
        self.facts = torch.zeros(n, len(FACTS), dtype=torch.long)
        self.letters = torch.zeros(n, PATCHES, dtype=torch.long)
        places = {name: i for i, name in enumerate(FACTS)}
        for i, scene in enumerate(self.scenes):
            for fact, value in scene["facts"].items():
                self.facts[i, places[fact]] = FACTS[fact].index(value) + 1
            if scene["name"] == "chart":
                self.letters[i] = -100
            for letter, x, y in scene["letters"]:
                self.letters[i, int(y) // PATCH * GRID + int(x) // PATCH] = LETTERS.index(letter) + 1

    @staticmethod
    def _draw_all(n: int, file: Path, told: Path) -> None:
        parts = [range(start, min(start + 500, n)) for start in range(0, n, 500)]
        pixels = np.lib.format.open_memmap(file, mode="w+", dtype=np.uint8, shape=(n, SIZE, SIZE, 3))
        scenes = []
        with ProcessPoolExecutor(os.cpu_count()) as pool:
            for numbers, (drawn, found) in zip(
                parts, tqdm(pool.map(_draw, parts), total=len(parts), desc="draw"), strict=True
            ):
                pixels[numbers.start : numbers.stop] = drawn
                scenes += found
        pixels.flush()
        told.write_text(json.dumps(scenes))
