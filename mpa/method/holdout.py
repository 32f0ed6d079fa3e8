"""The held-out set: which images are used to evaluate or to guard, and never to train. It is decided once per run and L-VLM.

An image is held out if the hash of its content is at most the threshold. So copies of an image are on the same side,
images that are added later do not move others, and the S-VLM has no influence. The threshold is stored in the meta file
of PI_<lvlm>_heldout_<dataset>.json, the held-out set.
"""

from collections.abc import Iterable
from pathlib import Path

from mpa.files import image_files, records
from mpa.files.records import InputError


def hashes(paths) -> dict[str, str]:
    """{path: content hash}. A file that cannot be read gets the hash of its path; it is not trained on either."""
    found = image_files.fingerprints(paths)
    return {path: one[1] if one else records.digest(path) for path, one in found.items()}


def decide(file: Path, hash_by_path: dict[str, str], share: float) -> str:
    """The threshold of this run: the stored one, else the one that holds out `share` of the images, at least one image.

    "" if nothing is held out. Raises InputError if the run was started with another share.
    """
    meta = records.meta_path(file)
    if not meta.exists():
        if not share:
            return ""
        ordered = sorted(set(hash_by_path.values()))
        return ordered[max(1, round(share * len(ordered))) - 1] if ordered else ""
    content = records.read_json(meta)
    stored = content.get("settings", {}) if isinstance(content, dict) else {}
    if not isinstance(stored.get("threshold"), str) or not isinstance(stored.get("share"), int | float):
        raise InputError(f"{meta}: does not say what is held out. Start again with another --run.")
    if stored["share"] != share:
        raise InputError(
            f"{file}: this run holds out {stored['share']:g} of the images, not {share:g}. Training images must not "
            "become test images. Use the same share, or choose another --run."
        )
    return stored["threshold"]


def is_held_out(hash_of_image: str, threshold: str) -> bool:
    return bool(threshold) and hash_of_image <= threshold


def write(file: Path, test: list[dict], share: float, threshold: str) -> None:
    """Write the held-out set. Existing records stay, with the paths of images that have moved; new images' are appended.

    Raises InputError if another process has meanwhile decided otherwise what is held out.
    """
    with records.locked(file, wait=True):
        existing = records.read_json(file) if file.exists() else []
        known = {str(r["question_id"]) for r in existing}
        added = [r for r in test if str(r["question_id"]) not in known]
        paths = {(str(r["question_id"]), r["image_hash"]): r["image_path"] for r in test}
        kept = [
            r | {"image_path": paths.get((str(r["question_id"]), r.get("image_hash")), r["image_path"])}
            for r in existing
        ]
        if existing and kept == existing and not added:
            return
        if decide(file, {}, share) not in ("", threshold):
            raise InputError(f"{file}: another process has just made it of other images. Run the same command again.")
        if existing and added:
            total = len(existing) + len(added)
            print(f"PI: {len(added)} questions about new images were added to the held-out set; it now has {total}.")
        records.write_json(records.meta_path(file), {"settings": {"share": share, "threshold": threshold}})
        records.write_json(file, kept + added)


def threshold_of(train_json: Path) -> str:
    """The threshold of the run that made a parity set; "" if nothing was held out."""
    meta_file = records.meta_path(train_json)
    meta = records.read_json(meta_file) if meta_file.exists() else {}
    if not meta.get("held_out"):
        return ""
    held_out = records.meta_path(train_json.parent / meta["held_out"])
    threshold = records.read_json(held_out).get("settings", {}).get("threshold")
    if not isinstance(threshold, str):
        raise InputError(f"{held_out}: does not say which images are held out. Run PI.sh again with another --run.")
    return threshold


def share_of(file: Path) -> float:
    """The share of the images that a run holds out."""
    meta = records.meta_path(file)
    share = records.read_json(meta).get("settings", {}).get("share")
    if not isinstance(share, int | float) or not share:
        raise InputError(f"{meta}: does not say what is held out. Run PI.sh again with another --run.")
    return share


def refuse_trained_on(test: list, train_files: Iterable[Path]) -> None:
    """Raises InputError if a train file shares a question or an image with `test`, a list of `Sample`s."""
    ids, paths = {s.key for s in test}, {s.image_path for s in test}
    for train_json in train_files:
        shared = [
            r["id"] for r in records.read_records(train_json, "train") if str(r["id"]) in ids or r["image"] in paths
        ]
        if shared:
            raise InputError(
                f"{train_json}: {len(shared)} of its samples are also in the held-out set, e.g. {shared[0]!r}. "
                "Training samples cannot be test samples. Run PI.sh and PL.sh again with another --run."
            )
