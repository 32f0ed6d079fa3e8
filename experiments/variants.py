"""The variants of an experiment file: what PL trains on, and with which settings. `experiments.definition` reads the rest of the file."""

import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field

from mpa.answers.kinds import ANSWER_TYPES
from mpa.answers.matching import MATCHERS
from mpa.files.records import REPOSITORY
from mpa.files.yaml_file import YamlFile
from mpa.method.rules.anchors import ANCHOR_BY

STAGES = {
    "PA": REPOSITORY / "scripts/PA.sh",
    "PI": REPOSITORY / "scripts/PI.sh",
    "PL": REPOSITORY / "PL/Qwen2-VL-Finetune/scripts/PL.sh",
    "evaluate": REPOSITORY / "scripts/evaluate.sh",
}
TRAIN = ("mpa", "all_pseudo", "random_pseudo", "human", "human_n", "rejected")
SET_BY_RUNNER = set("DATASET LVLM SVLM MODEL RUN PRESET SEED TRAIN_JSON OUTPUT_DIR GPUS".split())
WORDS = ("DTYPE", "ZERO", "IMAGES")  # the variables that are not numbers


@dataclass(frozen=True)
class Corruption:
    """The L-VLM's answers of one type (mpa.answers.kinds) are replaced at a share; `where`: "both" or "annotation"."""

    type: str
    share: float
    where: str = "both"

    @property
    def name(self) -> str:
        return f"{self.type.replace('/', '-').replace(' ', '-')}-{100 * self.share:g}-{self.where}"


@dataclass(frozen=True)
class Variant:
    """What PL trains on, and with which settings. `match` is None for the matcher that all cells share.

    `anchors` per parity sample are added, chosen by `anchor_by`; with `weights` each sample has one, and with
    `max_svlm_probability` the S-VLM's probability decides, not its answer. `replay` is the share of samples from the other datasets' train files. `seeds`: those of the experiment's it runs with.
    """

    train: str = "mpa"
    match: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    corrupt: Corruption | None = None
    replay: float = 0.0
    seeds: tuple[int, ...] | None = None
    anchors: float = 0.0
    anchor_by: str = "answer"
    weights: bool = False
    max_svlm_probability: float = 0.0

    @property
    def scores(self) -> bool:
        """Whether its train file needs the probabilities that the S-VLM gives the annotated answers."""
        return bool(self.weights or self.max_svlm_probability)

    @property
    def selection(self) -> str:
        """The end of the name of the train file that it needs: of another matcher, with anchors, or of corrupted answers."""
        if self.corrupt:
            return f"_corrupt-{self.corrupt.name}"
        by = "" if self.anchor_by == "answer" else f"-{self.anchor_by}"
        parts = [
            self.match,
            f"anchors-{self.anchors:g}{by}" if self.anchors else None,
            "weights" if self.weights else None,
        ]
        parts.append(f"p-{self.max_svlm_probability:g}" if self.max_svlm_probability else None)
        return "".join(f"_{part}" for part in parts if part)

    @property
    def selecting_flags(self) -> tuple[str, ...]:
        """PI's flags that select this train file from existing answers of both models; none for the shared parity set."""
        flags = ("--match", self.match) if self.match else ()
        flags += ("--anchors", f"{self.anchors:g}", "--anchor-by", self.anchor_by) if self.anchors else ()
        flags += ("--weights",) if self.weights else ()
        return flags + (
            ("--max-svlm-probability", f"{self.max_svlm_probability:g}") if self.max_svlm_probability else ()
        )


def script_settings(stage: str) -> list[str]:
    """The variables that a stage's script reads, without those that the runner sets."""
    found = re.findall(r"\$\{([A-Z_]+):[-+]", STAGES[stage].read_text())
    return [name for name in dict.fromkeys(found) if name not in SET_BY_RUNNER]


def suffix(name: str) -> str:
    """The end of a variant's file names: none for `mpa`."""
    return "" if name == "mpa" else f"_{name}"


def read_variants(file: YamlFile, node, seeds: list[int], datasets: list[str]) -> dict[str, Variant]:
    if node is None:
        return {"mpa": Variant()}
    if not isinstance(node, file.yaml.MappingNode):
        return {name: Variant(name) for name in file.distinct(node, "variants", lambda n: _train(file, n))}
    found = {}
    for name, value in file.mapping(node, None, "variants").items():
        if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
            raise file.error(value, f"a variant's name may hold letters, digits and . - _ only: {name!r}.")
        found[name] = _variant(file, name, value, seeds)
        if found[name].replay and len(datasets) == 1:
            raise file.error(value, f"{name}: replay needs another dataset to replay from.")
    return found


def _train(file: YamlFile, node) -> str:
    return file.choice(node, TRAIN, "variant")


def _variant(file: YamlFile, name: str, node, seeds: list[int]) -> Variant:
    settings = script_settings("PL")
    of_pi = ("match", "anchors", "anchor_by", "weights", "max_svlm_probability")
    keys = ("train", *of_pi, "corrupt", "replay", "seeds", "flags", *settings)
    given = {} if file.is_empty(node) else file.mapping(node, keys, "a variant")
    if "train" not in given and name not in TRAIN:
        raise file.error(node, f"unknown variant {name!r}. Known: {', '.join(TRAIN)}; another name needs train: ONE.")
    train = _train(file, given["train"]) if "train" in given else name
    if name in TRAIN and train != name:
        raise file.error(given["train"], f"the variant {name!r} trains on {name}, not on {train}; choose another name.")
    flags = words(file, given["flags"]) if "flags" in given else ()
    if flags:
        check_trainer_flags(file, given["flags"], flags)
    match = file.choice(given["match"], MATCHERS, "matcher") if "match" in given else None
    if match and train in ("all_pseudo", "human"):
        raise file.error(given["match"], f"a matcher has no effect on {train}: PI does not choose its samples.")
    corrupt = _corruption(file, given["corrupt"]) if "corrupt" in given else None
    anchors = _anchors(file, given["anchors"], train) if "anchors" in given else 0.0
    if "anchor_by" in given and not anchors:
        raise file.error(given["anchor_by"], "anchor_by needs anchors: R.")
    for name in ("weights", "max_svlm_probability"):
        if name in given and train != "mpa":
            raise file.error(given[name], f"{name} is for the parity set (train: mpa), not for {train}.")
    if corrupt and (train != "mpa" or not {*of_pi}.isdisjoint(given)):
        raise file.error(given["corrupt"], f"corrupt is for variants that train on mpa, without {', '.join(of_pi)}.")
    own = {key: value for key, value in given.items() if key in settings}
    return Variant(
        train,
        match,
        {key: setting(file, value, key) for key, value in own.items()},
        flags,
        corrupt,
        _share(file, given["replay"], "replay") if "replay" in given else 0.0,
        tuple(file.distinct(given["seeds"], "seeds", lambda n: _seed(file, n, seeds))) if "seeds" in given else None,
        anchors,
        file.choice(given["anchor_by"], ANCHOR_BY, "anchor_by") if "anchor_by" in given else "answer",
        "weights" in given and file.choice(given["weights"], ("true", "false"), "weights") == "true",
        _share(file, given["max_svlm_probability"], "max_svlm_probability") if "max_svlm_probability" in given else 0.0,
    )


def _anchors(file: YamlFile, node, train: str) -> float:
    if train != "mpa":
        raise file.error(node, f"anchors are added to the parity set (train: mpa), not to {train}.")
    value = file.text(node, "anchors")
    try:
        anchors = float(value)
    except ValueError:
        anchors = 0.0
    if not 0 < anchors <= 100:
        raise file.error(node, f"anchors should be a number per parity sample, above 0 and up to 100: {value!r}.")
    return anchors


def _seed(file: YamlFile, node, seeds: list[int]) -> int:
    return int(file.choice(node, list(map(str, seeds)), "seed of a variant"))


def _share(file: YamlFile, node, what: str) -> float:
    value = file.text(node, what)
    try:
        share = float(value)
    except ValueError:
        share = -1.0
    if not 0 < share < 1:
        raise file.error(node, f"{what} should be a share between 0 and 1: {value!r}.")
    return share


def _corruption(file: YamlFile, node) -> Corruption:
    given = file.mapping(node, ("type", "share", "where"), "corrupt")
    if missing := {"type", "share"} - given.keys():
        raise file.error(node, f"corrupt: the key {min(missing)!r} is missing.")
    where = file.choice(given["where"], ("both", "annotation"), "where") if "where" in given else "both"
    kind = file.choice(given["type"], ANSWER_TYPES, "answer type")
    return Corruption(kind, _share(file, given["share"], "share"), where)


def setting(file: YamlFile, node, name: str) -> str:
    value = file.text(node, name)
    if name not in WORDS:
        try:
            float(value)
        except ValueError:
            raise file.error(node, f"{name} should be a number: {value!r}.") from None
    return value


def words(file: YamlFile, node) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(file.text(node, "flags")))
    except ValueError as error:
        raise file.error(node, f"flags: {error}.") from None


def check_trainer_flags(file: YamlFile, node, flags: tuple[str, ...]) -> None:
    """Let the trainer's own parser check its flags, in a process of its own, as it loads torch."""
    code = "import sys, params\ntry: params.parse(sys.argv[1:])\nexcept params.DataError as error: sys.exit(str(error))"
    needed = ["--model_id", "m", "--data_path", "d", "--output_dir", "o", "--use_cpu", "True"]
    done = subprocess.run(
        [sys.executable, "-c", code, *needed, *flags],
        cwd=STAGES["PL"].parents[1] / "src",
        env={**os.environ, "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise file.error(node, f"flags of PL: {done.stderr.strip().splitlines()[-1]}")
