"""Flags of the stages in an experiment file: each stage's own parser checks them."""

import contextlib
import io
import os
import re
import shlex
import subprocess
import sys
from functools import partial
from importlib import import_module
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator

from experiments.yaml_file import Section
from mpa.data import DATASETS
from mpa.files.records import REPOSITORY, InputError


def stage_arguments(stage: str, flags):
    """The arguments that PA, PI or evaluate makes of these flags; it exits, as usual, if it does not know them."""
    sys.path.insert(0, str(REPOSITORY / "scripts"))
    of_stage = import_module(stage).arguments
    sys.path.pop(0)
    return of_stage([*flags, "--run", "run"])


def known_to(stage: str, flags: tuple[str, ...]) -> tuple[str, ...]:
    """The flags. Raises ValueError with what PA, PI or evaluate says of them."""
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            stage_arguments(stage, ("--dataset", next(iter(DATASETS)), *flags))
    except InputError as error:
        raise ValueError(str(error)) from None
    except SystemExit:
        raise ValueError(re.sub(r"^\S+: error: ", "", said.getvalue().strip().splitlines()[-1])) from None
    return flags


def known_to_trainer(flags: tuple[str, ...]) -> tuple[str, ...]:
    """The flags. Raises ValueError with what the trainer says of them, in a process of its own, as it loads torch."""
    code = "import sys, params\nfrom mpa.files.records import InputError\n"
    code += "try: params.parse(sys.argv[1:])\nexcept InputError as error: sys.exit(str(error))"
    needed = ["--model_id", "m", "--data_path", "d", "--output_dir", "o", "--use_cpu", "True"]
    command, source = [sys.executable, "-c", code, *needed, *flags], REPOSITORY / "PL/Qwen2-VL-Finetune/src"
    environment = os.environ | {"PYTHONPATH": str(REPOSITORY)}
    if (
        flags
        and (done := subprocess.run(command, cwd=source, env=environment, capture_output=True, text=True)).returncode
    ):
        raise ValueError(done.stderr.strip().splitlines()[-1])
    return flags


Words = Annotated[tuple[str, ...], BeforeValidator(lambda text: shlex.split(text) if isinstance(text, str) else text)]
OfTrainer = Annotated[Words, AfterValidator(known_to_trainer)]


class Flags(Section):
    PA: Annotated[Words, AfterValidator(partial(known_to, "PA"))] = ()
    PI: Annotated[Words, AfterValidator(partial(known_to, "PI"))] = ()
    PL: OfTrainer = ()
    evaluate: Annotated[Words, AfterValidator(partial(known_to, "evaluate"))] = ()
