"""Which images are kept from training to evaluate on: one rule, decided once per run and L-VLM, stored and checked.

An image's content decides, not its path: of all that are trained on or tested with, those whose hash is at most the
threshold are held out, so that copies are on one side, more images change nothing for those that were there, and the S-VLM
does not matter. The threshold stands in the meta file of PI_<lvlm>_heldout_<dataset>.json, the test set.
"""

from pathlib import Path

from mpa import image_files, records
from mpa.records import InputError


def file_of(folder: Path, lvlm: str, dataset: str) -> Path:
    return folder / f"PI_{lvlm}_heldout_{dataset}.json"


def hashes(paths) -> dict[str, str]:
    """{path: content hash}; a file that cannot be read, which is not trained on either, counts by its path."""
    found = image_files.fingerprints(paths)
    return {path: one[1] if one else records.digest(path) for path, one in found.items()}


def decide(file: Path, of: dict[str, str], share: float) -> str:
    """The threshold of this run: as stored, or so that `share` of the images `of` ({path: hash}) are held out, at least one.

    "" for none. Raises InputError where the run was begun with another share.
    """
    meta = records.meta_path(file)
    if not meta.exists():
        if not share:
            return ""
        ordered = sorted(set(of.values()))
        return ordered[max(1, round(share * len(ordered))) - 1] if ordered else ""
    made = records.read_json(meta)
    decided = made.get("settings", {}) if isinstance(made, dict) else {}
    if not isinstance(decided.get("threshold"), str) or not isinstance(decided.get("share"), int | float):
        raise InputError(f"{meta}: does not say what is held out. Choose another --run, and begin anew there.")
    if decided["share"] != share:
        raise InputError(
            f"{file}: this run holds out {decided['share']:g} of the images, not {share:g}, and what was trained on must not "
            "become a test set. Go on with that share, or choose another --run."
        )
    return decided["threshold"]


def is_held_out(hash_of_image: str, threshold: str) -> bool:
    return bool(threshold) and hash_of_image <= threshold


def write(file: Path, test: list[dict], share: float, threshold: str) -> None:
    """Write the test set. What stands there already stays as it is; questions about new images are added."""
    there = records.read_json(file) if file.exists() else []
    known = {str(r["question_id"]) for r in there}
    added = [r for r in test if str(r["question_id"]) not in known]
    if there and not added:
        return
    if there:
        print(
            f"PI: {len(added)} questions about new images are added to the held-out set, {len(there) + len(added)} now."
        )
    records.write_json(records.meta_path(file), {"settings": {"share": share, "threshold": threshold}})
    records.write_json(file, there + added)


def threshold_of(train_json: Path) -> str:
    """The threshold of the run that made a parity set; "" where nothing was held out."""
    meta = records.meta_path(train_json)
    made = records.read_json(meta) if meta.exists() else {}
    if not made.get("held_out"):
        return ""
    held_out = records.meta_path(train_json.parent / made["held_out"])
    threshold = records.read_json(held_out).get("settings", {}).get("threshold")
    if not isinstance(threshold, str):
        raise InputError(f"{held_out}: does not say which images are held out. Run PI.sh again, in another --run.")
    return threshold


def refuse_trained_on(test: list, folder: Path, dataset: str) -> None:
    """Raises InputError where a parity set in `folder` has a question or an image of the test set, `test` (`Sample`s)."""
    ids, paths = {s.key for s in test}, {s.image_path for s in test}
    for train_json in sorted(folder.glob(f"PI_*_train_*_{dataset}*.json")):
        if train_json.name.endswith(".meta.json"):
            continue
        mixed = [
            r["id"] for r in records.read_records(train_json, "train") if str(r["id"]) in ids or r["image"] in paths
        ]
        if mixed:
            raise InputError(
                f"{train_json}: {len(mixed)} of its samples are in the held-out set, too, such as {mixed[0]!r}: what was trained "
                "on cannot be a test. Run PI.sh and PL.sh again in another --run."
            )
