"""The variants of an experiment file: what PL trains on, and with which settings. `experiments.definition` reads the rest of the file."""

from typing import Annotated, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveInt,
    WrapValidator,
    model_validator,
)

from experiments.flags import OfTrainer
from experiments.yaml_file import Fault, Section
from mpa.answers.answer_types import ANSWER_TYPES
from mpa.answers.matching import MATCHERS
from mpa.files.records import REPOSITORY
from mpa.method.rules.anchors import ANCHOR_BY

STAGES = {
    "PA": REPOSITORY / "scripts/PA.sh",
    "PI": REPOSITORY / "scripts/PI.sh",
    "PL": REPOSITORY / "PL/Qwen2-VL-Finetune/scripts/PL.sh",
    "evaluate": REPOSITORY / "scripts/evaluate.sh",
}
TRAIN = ("mpa", "all_pseudo", "random_pseudo", "human", "human_n", "rejected")
SHARDINGS = tuple(sorted(path.stem for path in STAGES["PL"].parent.glob("zero*.json")))


# --- kinds of values --------------------------------------------------------------------------------------


def one_or_more(given) -> list:
    """A list that is not empty, or the list of a single value."""
    if given == []:
        raise ValueError("the list is empty")
    return given if isinstance(given, list) else [given]


def _distinct(found: list) -> list:
    for place, value in enumerate(found):
        if value in found[:place]:
            raise Fault(f"{value} is repeated", place)
    return found


def _as_written(given, handler) -> str:
    """Checked, but not converted: a job gets 5e-6 as it stands in the file."""
    handler(given)
    return given


T = TypeVar("T")
Several = Annotated[list[T], BeforeValidator(one_or_more), AfterValidator(_distinct)]
Count = Annotated[PositiveInt | None, WrapValidator(_as_written)]
Number = Annotated[NonNegativeFloat | None, WrapValidator(_as_written)]
Share = Annotated[float, Field(gt=0, lt=1)]


# --- variables of the stages' scripts, whose headers say what they do ---------------------------------------


class Asking(Section):
    """Of PA, PI and evaluate."""

    BATCH_SIZE: Count = None
    DTYPE: str | None = None
    MIN_PIXELS: Count = None
    MAX_PIXELS: Count = None
    MAX_TILES: Count = None


class Training(Section):
    """Of PL."""

    PL_BATCH_SIZE: Count = None
    ACCUMULATION: Count = None
    EPOCHS: Number = None
    LEARNING_RATE: Number = None
    MERGER_LR: Number = None
    VISION_LR: Number = None
    ZERO: Literal[SHARDINGS] | None = None
    MIN_PIXELS: Count = None
    MAX_PIXELS: Count = None
    MAX_TILES: Count = None


class Settings(Training, Asking):
    """Of all stages."""


def variables(of: Section, stage: str) -> dict[str, str]:
    """{variable of the stage's script: value} of those that are set."""
    kind = Training if stage == "PL" else Asking
    names = [name for name in type(of).model_fields if name in kind.model_fields]
    return {name: value for name in names if (value := getattr(of, name)) is not None}


# --- variants ---------------------------------------------------------------------------------------------


class Corruption(Section):
    """The L-VLM's answers of one type (mpa.answers.answer_types) are replaced at a share; `where`: "both" or "annotation"."""

    type: Literal[ANSWER_TYPES]
    share: Share
    where: Literal["both", "annotation"] = "both"

    @property
    def name(self) -> str:
        return f"{self.type.replace('/', '-').replace(' ', '-')}-{100 * self.share:g}-{self.where}"


class Variant(Training):
    """What PL trains on, and with which settings. `match` is None for the matcher that all cells share.

    `anchors` per parity sample are added, chosen by `anchor_by`.
    `replay` is the share of samples from the other datasets' train files. `seeds`: those of the experiment's it runs with.
    """

    train: Literal[TRAIN] = "mpa"
    match: Literal[*MATCHERS] | None = None
    flags: OfTrainer = ()
    replay: Share = 0.0
    seeds: Several[NonNegativeInt] | None = None
    anchors: Annotated[float, Field(gt=0, le=100)] = 0.0
    anchor_by: Literal[ANCHOR_BY] = "answer"
    corrupt: Corruption | None = None

    @model_validator(mode="after")
    def _keys_fit(self):
        of_pi, given = ("match", "anchors", "anchor_by"), self.model_fields_set
        all_samples = (
            self.train in ("all_pseudo", "human") and f"no effect on {self.train}: PI does not choose its samples"
        )
        not_parity = self.train != "mpa" and f"is for the parity set (train: mpa), not for {self.train}"
        for key, fault in (
            ("match", all_samples),
            ("anchors", not_parity),
            ("anchor_by", not self.anchors and "needs anchors: R"),
            ("corrupt", not_parity or (given.intersection(of_pi) and f"goes with none of {', '.join(of_pi)}")),
        ):
            if key in given and fault:
                raise Fault(fault, key)
        return self

    @property
    def selection(self) -> str:
        """The end of the name of the train file that it needs: of another matcher, with anchors, or of corrupted answers."""
        if self.corrupt:
            return f"_corrupt-{self.corrupt.name}"
        by = "" if self.anchor_by == "answer" else f"-{self.anchor_by}"
        parts = [
            self.match,
            f"anchors-{self.anchors:g}{by}" if self.anchors else None,
        ]
        return "".join(f"_{part}" for part in parts if part)

    @property
    def selecting_flags(self) -> tuple[str, ...]:
        """PI's flags that select this train file from existing answers of both models; none for the shared parity set."""
        flags = ("--match", self.match) if self.match else ()
        return flags + (("--anchors", f"{self.anchors:g}", "--anchor-by", self.anchor_by) if self.anchors else ())


def suffix(name: str) -> str:
    """The end of a variant's file names: none for `mpa`."""
    return "" if name == "mpa" else f"_{name}"


def by_name(given) -> dict:
    """{name: its keys} of variants that are a list of names, or a mapping of names to keys; a known name says what it trains on."""
    if not isinstance(given, dict):
        given = {str(name): None for name in one_or_more(given)}
    return {name: {"train": name} | (of or {}) if isinstance(of or {}, dict) else of for name, of in given.items()}
