"""An experiment file: which models, datasets, presets, seeds and variants; read and checked before anything runs.

    datasets: [textVQA]                    # keys of mpa.data.DATASETS, with human labels
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
import subprocess
import sys
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

from experiments.variants import (
    STAGES,
    Corruption,
    Variant,
    check_trainer_flags,
    read_variants,
    script_settings,
    setting,
    words,
)
from mpa.data import DATASETS
from mpa.engines import ENGINES
from mpa.files.packages import require
from mpa.files.records import REPOSITORY, InputError, short_name
from mpa.files.yaml_file import YamlFile
from mpa.method.presets import ANCHORED, PRESETS


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
    data_maker: tuple[str, ...] = ()
    model_maker: tuple[str, ...] = ()

    @property
    def missing_models(self) -> list[str]:
        """The paths of models that `model_maker` has to make."""
        return [m.path for m in (self.lvlms | self.svlms).values() if self.model_maker and not Path(m.path).exists()]

    @property
    def corruptions(self) -> dict[str, Corruption]:
        """Those that variants need, by name."""
        return {v.corrupt.name: v.corrupt for v in self.variants.values() if v.corrupt}

    def holds_out(self, preset: str) -> bool:
        """Whether PI holds out images, whose questions are then asked before and after PL."""
        return preset == ANCHORED or any(flag.partition("=")[0] == "--hold-out" for flag in self.flags["PI"])

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
    def selections(self) -> dict[str, tuple[str, ...]]:
        """{end of a train file's name: PI's flags that select it from existing answers}."""
        return {v.selection.removeprefix("_"): v.selecting_flags for v in self.variants.values() if v.selecting_flags}

    @property
    def scored_selections(self) -> set[str]:
        """Those `selections` that need the S-VLM's probabilities of the annotated answers."""
        return {v.selection.removeprefix("_") for v in self.variants.values() if v.scores}

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(L-VLM, S-VLM) by name. A model that is in both lists is not paired with itself."""
        return [(lvlm, svlm) for lvlm in self.lvlms for svlm in self.svlms if lvlm != svlm]

    def gpus_of(self, stage: str, model: Model) -> int:
        """GPUs of a job; 0 for a model behind a server."""
        return (model.gpus or self.gpus[stage]) if ENGINES[model.engine].local else 0


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
        "models",
    )
    given = file.mapping(file.root, keys, "an experiment file")
    for key in keys[:3]:
        if key not in given:
            raise file.error(file.root, f"the key {key!r} is missing.")
    labelled = [name for name, dataset in DATASETS.items() if dataset.labelled]
    datasets = file.distinct(given["datasets"], "datasets", lambda n: file.choice(n, labelled, "dataset"))
    flags = _flags(file, given.get("flags"), datasets)
    seeds = _list(file, given, "seeds", [0], lambda n: file.number(n, "a seed", 0))
    data, data_maker = _data(file, given.get("data"))
    made_in, model_maker = _made_models(file, given.get("models"))
    return Experiment(
        name=Path(path).stem,
        datasets=datasets,
        lvlms=_models(file, given["lvlms"], "lvlms", datasets, made_in),
        svlms=_models(file, given["svlms"], "svlms", datasets, made_in),
        variants=read_variants(file, given.get("variants"), seeds, datasets),
        presets=_list(file, given, "presets", ["paper"], lambda n: file.choice(n, (*PRESETS, ANCHORED), "preset")),
        seeds=seeds,
        settings=_settings(file, given["settings"], STAGES, "settings") if "settings" in given else {},
        flags=flags,
        gpus=_gpus(file, given.get("gpus")),
        transfer="transfer" in given and file.choice(given["transfer"], ("true", "false"), "transfer") == "true",
        data=data,
        data_maker=data_maker,
        model_maker=model_maker,
    )


def _data(file: YamlFile, node) -> tuple[Path | None, tuple[str, ...]]:
    """The data folder, and the script that makes it, with its flags; paths are relative to the repository."""
    if node is None:
        return None, ()
    if not isinstance(node, file.yaml.MappingNode):
        return REPOSITORY / os.path.expanduser(file.text(node, "data")), ()
    return _made(file, node, "data")


def _made_models(file: YamlFile, node) -> tuple[Path | None, tuple[str, ...]]:
    """The folder of models that a script makes, and the script with its flags."""
    return (None, ()) if node is None else _made(file, node, "models")


def _made(file: YamlFile, node, what: str) -> tuple[Path, tuple[str, ...]]:
    """{folder: …, made_by: SCRIPT FLAGS}: the folder, and the script with its flags."""
    given = file.mapping(node, ("folder", "made_by"), what)
    if missing := {"folder", "made_by"} - given.keys():
        raise file.error(node, f"{what}: the key {min(missing)!r} is missing.")
    script, *flags = words(file, given["made_by"]) or [""]
    if not (REPOSITORY / script).is_file():
        raise file.error(given["made_by"], f"made_by: no such script: {REPOSITORY / script}.")
    folder = REPOSITORY / os.path.expanduser(file.text(given["folder"], "folder"))
    return folder, (str(REPOSITORY / script), *flags)


def _list(file: YamlFile, given: dict, key: str, default: list, read_one) -> list:
    return file.distinct(given[key], key, read_one) if key in given else default


def _models(file: YamlFile, node, what: str, datasets: list[str], made_in: Path | None) -> dict[str, Model]:
    found = {}
    for item in file.items(node, what):
        model = _model(file, item, what, datasets, made_in)
        if model.name in found:
            raise file.error(item, f"{what}: two models have the name {model.name!r}, and would share files.")
        if not re.fullmatch(r"[\w.+-]+", model.name):
            raise file.error(item, f"{what}: a model's name may hold letters, digits and . + - _ only: {model.name!r}.")
        found[model.name] = model
    return found


def _model(file: YamlFile, item, what: str, datasets: list[str], made_in: Path | None) -> Model:
    if not isinstance(item, file.yaml.MappingNode):
        path_node, given = item, {}
    else:
        given = file.mapping(item, ("model", "engine", "flags", "gpus"), f"a model of {what}")
        if "model" not in given:
            raise file.error(item, f"{what}: the key 'model' is missing.")
        path_node = given["model"]
    path = file.text(path_node, f"a model of {what}")
    engine = file.choice(given["engine"], ENGINES, "engine") if "engine" in given else "hf"
    flags = words(file, given["flags"]) if "flags" in given else ()
    _check_flags(file, given.get("flags", item), "evaluate", ("--engine", engine, *flags), datasets)
    gpus = file.number(given["gpus"], "gpus", 1) if "gpus" in given else None
    if not ENGINES[engine].local:
        return Model(path, engine, flags, gpus)
    folder = Path(os.path.expanduser(path))
    if (REPOSITORY / folder).is_dir() or (REPOSITORY / folder).parent == made_in:
        return Model(str(REPOSITORY / folder), engine, flags, gpus)
    if path.count("/") != 1 or path.startswith((".", "/", "~")) or (REPOSITORY / folder).parent.is_dir():
        raise file.error(
            path_node, f"no such model folder: {path!r}. Give a folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct."
        )
    return Model(path, engine, flags, gpus)


def _settings(file: YamlFile, node, stages, what: str) -> dict[str, str]:
    known = [name for stage in stages for name in script_settings(stage)]
    return {name: setting(file, value, name) for name, value in file.mapping(node, known, what).items()}


def _gpus(file: YamlFile, node) -> dict[str, int]:
    if node is None:
        return dict.fromkeys(STAGES, 1)
    if not isinstance(node, file.yaml.MappingNode):
        return dict.fromkeys(STAGES, file.number(node, "gpus", 1))
    return dict.fromkeys(STAGES, 1) | {
        stage: file.number(value, f"gpus of {stage}", 1) for stage, value in file.mapping(node, STAGES, "gpus").items()
    }


def _flags(file: YamlFile, node, datasets: list[str]) -> dict[str, tuple[str, ...]]:
    found = dict.fromkeys(STAGES, ())
    for stage, value in file.mapping(node, STAGES, "flags").items() if node is not None else ():
        found[stage] = words(file, value)
        if stage == "PL":
            check_trainer_flags(file, value, found[stage])
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


if (
    __name__ == "__main__"
):  # python -m experiments.definition FILE: check an experiment file, and make its data and models
    try:
        require("scripts/reproduce.sh", "reproduce", "snakemake")
        experiment = read(sys.argv[1])
        if experiment.data_maker:
            subprocess.run([sys.executable, *experiment.data_maker, "--data", str(experiment.data)], check=True)
        if experiment.missing_models:
            subprocess.run([sys.executable, *experiment.model_maker], check=True)
        if experiment.missing_models:
            raise InputError(f"{experiment.model_maker[0]} has not made {experiment.missing_models[0]}.")
    except InputError as failure:
        sys.exit(f"error: {failure}")
