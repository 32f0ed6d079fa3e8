"""Thumbnails of a run's images: made once, shared by all pages, and only of images below the allowed folders."""

import base64
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from mpa.data import DATASETS
from mpa.data.loading import data_folder
from mpa.files import atomic, records
from mpa.files.image_files import ImageError, open_file, open_image

SIZE = 160  # pixels, the longer edge


def roots_of(dataset: str, image_root: str | None) -> list[str]:
    """The folders whose images may be shown: the dataset's, and --image-root."""
    known = DATASETS[dataset]
    folders = [image_root] if image_root else []
    if known.labelled:
        folders += [str(data_folder() / split.images) for split in (known.train, known.test)]
    return [os.path.abspath(folder) for folder in folders]


def allowed(path: str, roots: list[str]) -> bool:
    """Is the path below one of the folders? As it is written: a folder of images may hold links to them."""
    path = os.path.normpath(path or "")
    return os.path.isabs(path) and any(path.startswith(root.rstrip(os.sep) + os.sep) for root in roots)


def _make(path: str, folder: Path) -> str:
    """The thumbnail's file name. Raises ImageError if the image cannot be used."""
    with open_file(path) as file:
        found = os.fstat(file.fileno())
    name = records.digest(os.path.abspath(path), str(found.st_size), str(found.st_mtime_ns)) + ".webp"
    if not (folder / name).exists():
        image = open_image(path)
        image.thumbnail((SIZE, SIZE), Image.Resampling.LANCZOS)
        with atomic.replacing(folder / name, clean=False) as file:
            image.save(file, "WEBP", quality=80)
    return name


def make(paths: dict[str, list[str]], folder: Path) -> dict[str, tuple[str | None, str]]:
    """{path: (file name, "") or (None, why there is none)}; `paths` is {path: the folders it may be in}."""
    folder.mkdir(parents=True, exist_ok=True)
    atomic.remove_left(folder)

    def one(item) -> tuple[str | None, str]:
        path, roots = item
        if not allowed(path, roots):
            return None, "outside the image folders: name them with --image-root or $MPA_DATA"
        try:
            return _make(os.path.normpath(path), folder), ""
        except ImageError as error:
            return None, str(error)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        found = tqdm(pool.map(one, paths.items()), total=len(paths), desc="thumbnails", disable=None)
        return dict(zip(paths, found, strict=True))


def data_uri(file: Path) -> str:
    return "data:image/webp;base64," + base64.b64encode(file.read_bytes()).decode()
