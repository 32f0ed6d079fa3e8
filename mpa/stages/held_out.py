"""The held-out part of a run in PI: which images it takes from the train set, and the questions about them."""

from typing import NamedTuple

from mpa.files import distributed
from mpa.method import holdout
from mpa.stages import cli
from mpa.stages.stage import run_files


class HeldOut(NamedTuple):
    """The run's threshold ("" if nothing is held out), and the content hashes of images by path."""

    threshold: str
    hashes: dict[str, str]

    def __contains__(self, image_path: str) -> bool:
        return image_path in self.hashes and holdout.is_held_out(self.hashes[image_path], self.threshold)

    @property
    def images(self) -> int:
        """How many are held out, by path."""
        return sum(path in self for path in self.hashes)


def decide(args, consistent: list[dict]) -> HeldOut:
    """`consistent` are PI records on which the L-VLM agrees with itself. The first call of a run decides, see `mpa.method.holdout`."""
    file = run_files(args).held_out
    hashes = holdout.hashes(r["image_path"] for r in consistent) if args.hold_out or file.exists() else {}
    return HeldOut(holdout.decide(file, hashes, args.hold_out), hashes)


def write(args, consistent: list[dict], held_out: HeldOut) -> None:
    """Write the held-out set: the questions about held-out images, with the L-VLM's answers as right ones."""
    test = [
        {
            "question_id": r["question_id"],
            "image_path": r["image_path"],
            "question": r["PA_question"],
            "answers": [r["PA_answer"]],
            "image_hash": held_out.hashes[r["image_path"]],
        }
        for r in consistent
        if r["image_path"] in held_out
    ]
    if test and distributed.FIRST:
        cli.open_log(args, writes=True)
        holdout.write(run_files(args).held_out, test, args.hold_out, held_out.threshold)
