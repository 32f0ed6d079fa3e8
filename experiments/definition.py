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

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    AfterValidator,
    BeforeValidator,
    Field,
    NonNegativeInt,
    PositiveInt,
    ValidationInfo,
    field_validator,
    model_validator,
)

from experiments import yaml_file
from experiments.flags import Flags, Words, known_to, stage_arguments
from experiments.variants import TRAIN, Corruption, Settings, Several, Variant, by_name, one_or_more
from experiments.yaml_file import Fault, Section
from mpa.data import DATASETS
from mpa.engines import ENGINES
from mpa.files.records import REPOSITORY, InputError, short_name
from mpa.method.presets import ANCHORED, PRESETS


def _in_repository(folder: str | Path) -> Path:
    return REPOSITORY / os.path.expanduser(folder)


def _script(words: tuple[str, ...]) -> tuple[str, ...]:
    if not words or not (REPOSITORY / words[0]).is_file():
        raise ValueError(f"no such script: {REPOSITORY.joinpath(*words[:1])}")
    return (str(REPOSITORY / words[0]), *words[1:])


Script = Annotated[Words, AfterValidator(_script)]


class Folder(Section):
    """A folder, and the script that makes it, with its flags. Paths are relative to the repository."""

    text_is = "folder"
    folder: Annotated[Path, AfterValidator(_in_repository)]
    made_by: Script = ()


class Made(Folder):
    made_by: Script


class Model(Section):
    """A model; `name` is its name in result files. `gpus` of each of its jobs; None: the experiment's."""

    text_is = "model"
    path: str = Field(alias="model", min_length=1)
    engine: Literal[*ENGINES] = "hf"
    flags: Words = ()
    gpus: PositiveInt | None = None

    @field_validator("flags")
    @classmethod
    def _known_flags(cls, given, info: ValidationInfo):
        known_to("evaluate", ("--engine", info.data.get("engine", "hf"), *given))
        return given

    @property
    def name(self) -> str:
        return short_name(self.path)

    @property
    def local(self) -> bool:
        return ENGINES[self.engine].local

    def located(self, made_in: Path | None, place: int) -> "Model":
        """The model with its folder's whole path. Raises Fault if it is neither there, nor in `made_in`, nor a hub id."""
        folder = _in_repository(self.path)
        if self.local and (folder.is_dir() or folder.parent == made_in):
            return self.model_copy(update={"path": str(folder)})
        hub_id = self.path.count("/") == 1 and not self.path.startswith((".", "/", "~")) and not folder.parent.is_dir()
        if self.local and not hub_id:
            remedy = "Give a folder, or a hub id such as Qwen/Qwen2-VL-2B-Instruct"
            raise Fault(f"no such model folder: {self.path!r}. {remedy}", place, "model")
        return self


Models = Annotated[list[Model], BeforeValidator(one_or_more)]
Name = Annotated[str, Field(pattern=r"^[A-Za-z][\w.-]*$")]
Variants = Annotated[dict[Name, Variant], BeforeValidator(by_name)]


class Gpus(Section):
    """Of each job of a stage."""

    PA: PositiveInt = 1
    PI: PositiveInt = 1
    PL: PositiveInt = 1
    evaluate: PositiveInt = 1

    @model_validator(mode="before")
    @classmethod
    def _of_number(cls, given):
        return given if isinstance(given, dict) else dict.fromkeys(cls.model_fields, given)


class Experiment(Section):
    """The keys of an experiment file; `experiments/README.md` says what each means. The order is that of the checks."""

    datasets: Several[Literal[*(name for name, dataset in DATASETS.items() if dataset.labelled)]]
    data: Folder | None = None
    models: Made | None = None
    lvlms: Models
    svlms: Models
    seeds: Several[NonNegativeInt] = Field([0])
    variants: Variants = Field({"mpa": Variant()})
    presets: Several[Literal[*PRESETS, ANCHORED]] = Field(["paper"])
    settings: Settings = Settings()
    flags: Flags = Flags()
    gpus: Gpus = Gpus()
    transfer: bool = False

    @field_validator("lvlms", "svlms")
    @classmethod
    def _by_name(cls, models: list[Model], info: ValidationInfo) -> dict[str, Model]:
        found, made = {}, info.data.get("models")
        for place, model in enumerate(models):
            if model.name in found:
                raise Fault(f"two models have the name {model.name!r}, and would share files", place)
            if not re.fullmatch(r"[\w.+-]+", model.name):
                raise Fault(f"a model's name may hold letters, digits and . + - _ only: {model.name!r}", place)
            found[model.name] = model.located(made and made.folder, place)
        return found

    @field_validator("variants")
    @classmethod
    def _go_with_the_rest(cls, variants: dict[str, Variant], info: ValidationInfo) -> dict[str, Variant]:
        seeds = info.data.get("seeds", ())
        for name, variant in variants.items():
            if name in TRAIN and variant.train != name:
                raise Fault(f"it trains on {name}, not on {variant.train}; choose another name", name, "train")
            if unknown := set(variant.seeds or ()).difference(seeds):
                raise Fault(
                    f"the experiment has no seed {min(unknown)}; known: {', '.join(map(str, seeds))}", name, "seeds"
                )
            if variant.replay and len(info.data.get("datasets", ())) == 1:
                raise Fault("needs another dataset to replay from", name, "replay")
        return variants

    @property
    def missing_models(self) -> list[str]:
        """The paths of models that `models.made_by` has to make."""
        return [m.path for m in (self.lvlms | self.svlms).values() if self.models and not Path(m.path).exists()]

    @property
    def corruptions(self) -> dict[str, Corruption]:
        """Those that variants need, by name."""
        return {v.corrupt.name: v.corrupt for v in self.variants.values() if v.corrupt}

    def holds_out(self, preset: str) -> bool:
        """Whether PI holds out images, whose questions are then asked before and after PL."""
        return bool(stage_arguments("PI", ("--dataset", self.datasets[0], "--preset", preset, *self.flags.PI)).hold_out)

    @property
    def answer_all(self) -> bool:
        """Whether the S-VLM answers all questions, so that several parity sets can be selected from its answers."""
        return any(v.match or v.corrupt for v in self.variants.values())

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
    def selections(self) -> dict[str, tuple[str, ...]]:
        """{end of a train file's name: PI's flags that select it from existing answers}."""
        return {v.selection.removeprefix("_"): v.selecting_flags for v in self.variants.values() if v.selecting_flags}

    @property
    def pairs(self) -> list[tuple[str, str]]:
        """(L-VLM, S-VLM) by name. A model that is in both lists is not paired with itself."""
        return [(lvlm, svlm) for lvlm in self.lvlms for svlm in self.svlms if lvlm != svlm]

    def gpus_of(self, stage: str, model: Model) -> int:
        """GPUs of a job; 0 for a model behind a server."""
        return (model.gpus or getattr(self.gpus, stage)) if model.local else 0

    @property
    def most_gpus(self) -> int:
        """GPUs of the job that has the most."""
        asked = {"PA": self.lvlms, "PI": self.lvlms | self.svlms, "PL": self.svlms, "evaluate": self.lvlms | self.svlms}
        return max(self.gpus_of(stage, model) for stage, models in asked.items() for model in models.values())


# --- reading and checking --------------------------------------------------------------------------------


def read(path: str | Path) -> Experiment:
    """The experiment in a YAML file. Raises InputError, with file and line, for anything unknown in it."""
    names = sorted(path.name for path in (REPOSITORY / "experiments").glob("*.yaml"))
    hint = f"Give an experiment file, such as those in experiments/: {', '.join(names)}."
    return yaml_file.read(Path(path), Experiment, hint)


def prepare(experiment: Experiment) -> None:
    """Make the data and the models that scripts of the experiment make."""
    if experiment.data and experiment.data.made_by:
        folder = str(experiment.data.folder)
        subprocess.run([sys.executable, *experiment.data.made_by, "--data", folder], check=True)
    if experiment.missing_models:
        subprocess.run([sys.executable, *experiment.models.made_by], check=True)
    if experiment.missing_models:
        raise InputError(f"{experiment.models.made_by[0]} has not made {experiment.missing_models[0]}.")


if __name__ == "__main__":  # python -P -m experiments.definition FILE
    try:
        experiment = read(sys.argv[1])
        os.chdir(REPOSITORY)  # the current folder may be gone
        prepare(experiment)
    except InputError as failure:
        sys.exit(f"error: {failure}")
