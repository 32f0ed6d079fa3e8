"""The judge that made a train file, from its meta file's settings and the answers in its run folder."""

from mpa.files import records
from mpa.files.records import InputError
from mpa.method import rules
from mpa.method.prompts import Annotation
from mpa.method.verdict import Judge
from mpa.runs.layout import RunFiles


def judge_of(settings: dict, files: RunFiles) -> Judge:
    """Raises InputError if answers that a rule needs are not there."""
    chosen = rules.of(settings)
    for rule in chosen:
        if rule.asks:
            file = files.further(rule.asks)
            if not file.exists():
                raise InputError(
                    f"{file}: no such file. Run PI.sh with --{rule.asks} first, with this LVLM and without --lvlm-json."
                )
            rule.see(records.read_records(file, "PI"))
    return Judge.of(settings, chosen)


def annotation_of(record: dict) -> Annotation:
    """The annotation that a PI record is about. The released code reads it from the S-VLM's record where there is one."""
    return Annotation(record["PA_question"], record["PA_answer"])
