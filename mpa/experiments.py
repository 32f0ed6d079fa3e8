"""An experiment file: which models, datasets, presets, seeds and variants; read and checked before anything runs.

    datasets: [textVQA]                    # keys of mpa.datasets.DATASETS, with human labels
    lvlms: [Qwen/Qwen2-VL-7B-Instruct]     # folders (relative to the repository) or hub ids …
    svlms:
      - model: Qwen/Qwen2-VL-2B-Instruct   # … or with an engine, its flags, and GPUs of a job
        gpus: 2
    variants:                              # what PL trains on
      mpa:
      human:
      slow: {train: mpa, match: anls, EPOCHS: 3, LEARNING_RATE: 5e-6}
    settings: {BATCH_SIZE: 32}             # variables of the stage scripts
    flags: {PA: --limit 1000}              # flags of PA, PI, PL, evaluate

`experiments/README.md` lists the keys; `experiments/Snakefile` makes jobs of it.
"""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path

from mpa.datasets import DATASETS
from mpa.engines import ENGINES
from mpa.kinds import ANSWER_TYPES
from mpa.matching import MATCHERS
from mpa.packages import require
from mpa.presets import PRESETS
from mpa.records import REPOSITORY, InputError, short_name
from mpa.yaml_file import YamlFile

STAGES = {
    "PA": REPOSITORY / "scripts/PA.sh",
    "PI": REPOSITORY / "scripts/PI.sh",
    "PL": REPOSITORY / "PL/Qwen2-VL-Finetune/scripts/PL.sh",
    "evaluate": REPOSITORY / "scripts/evaluate.sh",
}
TRAIN = ("mpa", "all_pseudo", "random_pseudo", "human", "human_n", "rejected")
SET_BY_RUNNER = set("DATASET LVLM SVLM MODEL RUN PRESET SEED TRAIN_JSON OUTPUT_DIR GPUS".split())


@dataclass(frozen=True)
class Model:
    """A model; `name` is its name in result files. `gpus` of each of its jobs; None: the experiment's."""

    path: str
    engine: str = "hf"
    flags: tuple[str, ...] = ()
    gpus: int | None = None

    @property
    def name(self) -> str:
        return short_name(self.path)


@dataclass(frozen=True)
class Corruption:
    """The L-VLM's answers of one type (mpa.kinds) are replaced at a share; `where`: "both" or "annotation"."""

    type: str
    share: float
    where: str = "both"

    @property
    def name(self) -> str:
        return f"{self.type.replace('/', '-').replace(' ', '-')}-{100 * self.share:g}-{self.where}"


@dataclass(frozen=True)
class Variant:
    """What PL trains on, and with which settings. `match` is None for the matcher that all cells share.

    `replay` is the share of samples from the other datasets' train files. `seeds`: those of the experiment's it runs with.
    """

    train: str = "mpa"
    match: str | None = None
    settings: dict[str, str] = field(default_factory=dict)
    flags: tuple[str, ...] = ()
    corrupt: Corruption | None = None
    replay: float = 0.0
    seeds: tuple[int, ...] | None = None

    @property
    def selection(self) -> str:
        """The end of the name of the parity set that it needs: of another matcher, or of corrupted answers."""
        return f"_{self.match}" if self.match else f"_corrupt-{self.corrupt.name}" if self.corrupt else ""


@dataclass(frozen=True)
class Experiment:
    name: str
    datasets: list[str]
    lvlms: dict[str, Model]
    svlms: dict[str, Model]
    variants: dict[str, Variant]
    presets: list[str]
    seeds: list[int]
    settings: dict[str, str]
    flags: dict[str, tuple[str, ...]]
    gpus: dict[str, int]
    transfer: bool = False
    data: Path | None = None
    made_by: Path | None = None

    @property
    def corruptions(self) -> dict[str, Corruption]:
        """Those that variants need, by name."""
        return {v.corrupt.name: v.corrupt for v in self.variants.values() if v.corrupt}

    @property
    def answer_all(self) -> bool:
        """Whether the S-VLM answers all questions, so that several parity sets can be selected from its answers."""
        return bool(self.matchers or self.corruptions)

    @property
    def trainings(self) -> list[tuple[str, int, str]]:
        """(preset, seed, variant) of what each pair and dataset is trained with."""
        return [
            (preset, seed, name)
            for preset in self.presets
            for seed in self.seeds
            for name, variant in self.variants.items()
            if variant.seeds is None or seed in variant.seeds
        ]

    @property
    def matchers(self) -> list[str]:
        """The matchers that variants need besides the shared one."""
        return sorted({v.match for v in self.variants.values() if v.match})

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(L-VLM, S-VLM) by name. A model that is in both lists is not paired with itself."""
        return [(lvlm, svlm) for lvlm in self.lvlms for svlm in self.svlms if lvlm != svlm]

    def gpus_of(self, stage: str, model: Model) -> int:
        """GPUs of a job; 0 for a model behind a server."""
        return (model.gpus or self.gpus[stage]) if ENGINES[model.engine].local else 0


def script_settings(stage: str) -> dict[str, str]:
    """{variable: default} of a stage's script, without those that the runner sets."""
    found = re.findall(r"\$\{([A-Z_]+):-((?:\$\(\(.*?\)\)|[^}])*)\}", STAGES[stage].read_text())
    return {name: default for name, default in found if name not in SET_BY_RUNNER}


def suffix(name: str) -> str:
    """The end of a variant's file names: none for `mpa`."""
    return "" if name == "mpa" else f"_{name}"


# --- reading and checking --------------------------------------------------------------------------------


def _known_files() -> str:
    names = sorted(path.name for path in (REPOSITORY / "experiments").glob("*.yaml"))
    return f"Give an experiment file, such as those in experiments/: {', '.join(names)}."


def read(path: str | Path) -> Experiment:
    """The experiment in a YAML file. Raises InputError, with file and line, for anything unknown in it."""
    file = YamlFile(Path(path), _known_files())
    keys = (
        "datasets",
        "lvlms",
        "svlms",
        "variants",
        "presets",
        "seeds",
        "settings",
        "flags",
        "gpus",
        "transfer",
        "data",
    )
    given = file.mapping(file.root, keys, "an experiment file")
    for key in keys[:3]:
        if key not in given:
            raise file.error(file.root, f"the key {key!r} is missing.")
    labelled = [name for name, dataset in DATASETS.items() if dataset.labelled]
    datasets = file.distinct(given["datasets"], "datasets", lambda n: file.choice(n, labelled, "dataset"))
    flags = _flags(file, given.get("flags"), datasets)
    seeds = _list(file, given, "seeds", [0], lambda n: file.number(n, "a seed", 0))
    data, made_by = _data(file, given.get("data"))
    return Experiment(
        name=Path(path).stem,
        datasets=datasets,
        lvlms=_models(file, given["lvlms"], "lvlms", datasets),
        svlms=_models(file, given["svlms"], "svlms", datasets),
        variants=_variants(file, given.get("variants"), seeds),
        presets=_list(file, given, "presets", ["paper"], lambda n: file.choice(n, PRESETS, "preset")),
        seeds=seeds,
        settings=_settings(file, given["settings"], STAGES, "settings") if "settings" in given else {},
        flags=flags,
        gpus=_gpus(file, given.get("gpus")),
        transfer="transfer" in given and file.choice(given["transfer"], ("true", "false"), "transfer") == "true",
        data=data,
        made_by=made_by,
    )


def _data(file: YamlFile, node) -> tuple[Path | None, Path | None]:
    """The data folder, and the script that makes it; paths are relative to the repository."""
    if node is None:
        return None, None
    if not isinstance(node, file.yaml.MappingNode):
        return REPOSITORY / os.path.expanduser(file.text(node, "data")), None
    given = file.mapping(node, ("folder", "made_by"), "data")
    if missing := {"folder", "made_by"} - given.keys():
        raise file.error(node, f"data: the key {min(missing)!r} is missing.")
    script = REPOSITORY / file.text(given["made_by"], "made_by")
    if not script.is_file():
        raise file.error(given["made_by"], f"made_by: no such script: {script}.")
    return REPOSITORY / os.path.expanduser(file.text(given["folder"], "folder")), script


def _list(file: YamlFile, given: dict, key: str, default: list, read_one) -> list:
    return file.distinct(given[key], key, read_one) if key in given else default


def _models(file: YamlFile, node, what: str, datasets: list[str]) -> dict[str, Model]:
    found = {}
    for item in file.items(node, what):
        model = _model(file, item, what, datasets)
        if model.name in found:
            raise file.error(item, f"{what}: two models have the name {model.name!r}, and would share files.")
        if not re.fullmatch(r"[\w.+-]+", model.name):
            raise file.error(item, f"{what}: a model's name may hold letters, digits and . + - _ only: {model.name!r}.")
        found[model.name] = model
    return found


def _model(file: YamlFile, item, what: str, datasets: list[str]) -> Model:
    if not isinstance(item, file.yaml.MappingNode):
        path_node, given = item, {}
    else:
        given = file.mapping(item, ("model", "engine", "flags", "gpus"), f"a model of {what}")
        if "model" not in given:
            raise file.error(item, f"{what}: the key 'model' is missing.")
        path_node = given["model"]
    path = file.text(path_node, f"a model of {what}")
    engine = file.choice(given["engine"], ENGINES, "engine") if "engine" in given else "hf"
    flags = _words(file, given["flags"]) if "flags" in given else ()
    _check_flags(file, given.get("flags", item), "evaluate", ("--engine", engine, *flags), datasets)
    gpus = file.number(given["gpus"], "gpus", 1) if "gpus" in given else None
    if not ENGINES[engine].local:
        return Model(path, engine, flags, gpus)
    folder = Path(os.path.expanduser(path))
    if (REPOSITORY / folder).is_dir():
        return Model(str(REPOSITORY / folder), engine, flags, gpus)
    if path.count("/") != 1 or path.startswith((".", "/", "~")) or (REPOSITORY / folder).parent.is_dir():
        raise file.error(
            path_node, f"no such model folder: {path!r}. Give a folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct."
        )
    return Model(path, engine, flags, gpus)


def _variants(file: YamlFile, node, seeds: list[int]) -> dict[str, Variant]:
    if node is None:
        return {"mpa": Variant()}
    if not isinstance(node, file.yaml.MappingNode):
        return {name: Variant(name) for name in file.distinct(node, "variants", lambda n: _train(file, n))}
    found = {}
    for name, value in file.mapping(node, None, "variants").items():
        if not re.fullmatch(r"[A-Za-z][\w.-]*", name):
            raise file.error(value, f"a variant's name may hold letters, digits and . - _ only: {name!r}.")
        found[name] = _variant(file, name, value, seeds)
    return found


def _train(file: YamlFile, node) -> str:
    return file.choice(node, TRAIN, "variant")


def _variant(file: YamlFile, name: str, node, seeds: list[int]) -> Variant:
    settings = script_settings("PL")
    keys = ("train", "match", "corrupt", "replay", "seeds", "flags", *settings)
    given = {} if file.is_empty(node) else file.mapping(node, keys, "a variant")
    if "train" not in given and name not in TRAIN:
        raise file.error(node, f"unknown variant {name!r}. Known: {', '.join(TRAIN)}; another name needs train: ONE.")
    train = _train(file, given["train"]) if "train" in given else name
    if name in TRAIN and train != name:
        raise file.error(given["train"], f"the variant {name!r} trains on {name}, not on {train}; choose another name.")
    flags = _words(file, given["flags"]) if "flags" in given else ()
    if flags:
        _check_trainer_flags(file, given["flags"], flags)
    match = file.choice(given["match"], MATCHERS, "matcher") if "match" in given else None
    if match and train in ("all_pseudo", "human"):
        raise file.error(given["match"], f"a matcher has no effect on {train}: PI does not choose its samples.")
    corrupt = _corruption(file, given["corrupt"]) if "corrupt" in given else None
    if corrupt and (match or train != "mpa"):
        raise file.error(given["corrupt"], "corrupt is for variants that train on mpa, without another matcher.")
    own = {key: value for key, value in given.items() if key in settings}
    return Variant(
        train,
        match,
        {key: _setting(file, value, key, settings[key]) for key, value in own.items()},
        flags,
        corrupt,
        _share(file, given["replay"], "replay") if "replay" in given else 0.0,
        tuple(file.distinct(given["seeds"], "seeds", lambda n: _seed(file, n, seeds))) if "seeds" in given else None,
    )


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


def _settings(file: YamlFile, node, stages, what: str) -> dict[str, str]:
    known = {name: default for stage in stages for name, default in script_settings(stage).items()}
    return {name: _setting(file, value, name, known[name]) for name, value in file.mapping(node, known, what).items()}


def _setting(file: YamlFile, node, name: str, default: str) -> str:
    value = file.text(node, name)
    if default[:1].isdigit() or default.startswith(("$((", "$LEARNING_RATE")):
        try:
            float(value)
        except ValueError:
            raise file.error(node, f"{name} should be a number: {value!r}.") from None
    return value


def _gpus(file: YamlFile, node) -> dict[str, int]:
    if node is None:
        return dict.fromkeys(STAGES, 1)
    if not isinstance(node, file.yaml.MappingNode):
        return dict.fromkeys(STAGES, file.number(node, "gpus", 1))
    return dict.fromkeys(STAGES, 1) | {
        stage: file.number(value, f"gpus of {stage}", 1) for stage, value in file.mapping(node, STAGES, "gpus").items()
    }


def _words(file: YamlFile, node) -> tuple[str, ...]:
    try:
        return tuple(shlex.split(file.text(node, "flags")))
    except ValueError as error:
        raise file.error(node, f"flags: {error}.") from None


def _flags(file: YamlFile, node, datasets: list[str]) -> dict[str, tuple[str, ...]]:
    found = dict.fromkeys(STAGES, ())
    for stage, value in file.mapping(node, STAGES, "flags").items() if node is not None else ():
        found[stage] = _words(file, value)
        if stage == "PL":
            _check_trainer_flags(file, value, found[stage])
        else:
            _check_flags(file, value, stage, found[stage], datasets)
    return found


def stage_arguments(stage: str, flags):
    """The arguments that PA, PI or evaluate makes of these flags; it exits, as usual, if it does not know them."""
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    arguments = import_module(stage).arguments
    sys.path.pop(0)
    return arguments([*flags, "--run", "run"])


def _check_flags(file: YamlFile, node, stage: str, flags: tuple[str, ...], datasets: list[str]) -> None:
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            stage_arguments(stage, ("--dataset", datasets[0], *flags))
    except (SystemExit, InputError) as error:
        text = str(error) if isinstance(error, InputError) else said.getvalue().strip().splitlines()[-1]
        raise file.error(node, re.sub(r"^\S+: error: ", f"flags of {stage}: ", text)) from None


def _check_trainer_flags(file: YamlFile, node, flags: tuple[str, ...]) -> None:
    """Let the trainer's own parser check its flags, in a process of its own, as it loads torch."""
    code = "import sys, params\ntry: params.parse(sys.argv[1:])\nexcept params.DataError as error: sys.exit(str(error))"
    needed = ["--model_id", "m", "--data_path", "d", "--output_dir", "o", "--use_cpu", "True"]
    done = subprocess.run(
        [sys.executable, "-c", code, *needed, *flags],
        cwd=STAGES["PL"].parents[1] / "src",
        capture_output=True,
        text=True,
    )
    if done.returncode:
        raise file.error(node, f"flags of PL: {done.stderr.strip().splitlines()[-1]}")


if __name__ == "__main__":  # python -m mpa.experiments FILE: check an experiment file, and make its data
    try:
        require("scripts/reproduce.sh", "reproduce", "snakemake")
        experiment = read(sys.argv[1])
        if experiment.made_by:
            subprocess.run([sys.executable, str(experiment.made_by), "--data", str(experiment.data)], check=True)
    except InputError as failure:
        sys.exit(f"error: {failure}")
