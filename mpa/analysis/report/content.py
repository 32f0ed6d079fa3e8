"""What a report shows of one cell of a run, as plain data; what is not there yet is named."""

from collections import Counter
from collections.abc import Callable
from functools import cached_property
from pathlib import Path

from mpa.analysis import calibration
from mpa.analysis.calibration import Reliability
from mpa.analysis.check_tables import coverage_table, reasons_table
from mpa.analysis.diagnosis import Finding, diagnose
from mpa.analysis.report.texts import shortened
from mpa.analysis.run_summary import ROWS, model_of
from mpa.answers.answer_types import answer_type, question_type
from mpa.answers.normalise import normalise
from mpa.data import DATASETS
from mpa.files import records
from mpa.files.records import InputError
from mpa.method.verdict import in_order
from mpa.runs import comparable
from mpa.runs.case import Case, finite
from mpa.runs.comparable import NotComparable, changes
from mpa.runs.evaluations import Evaluation
from mpa.runs.folders import run_name
from mpa.runs.layout import ANY, MPA, Cell, train_meta


class CellContent:
    """One dataset and pair of models in one run folder."""

    def __init__(self, folder: Path, cell: Cell):
        self.folder, self.cell, self.case = folder, cell, Case(folder, cell)
        self.title = f"{run_name(folder)}: {cell.dataset}, {cell.svlm or 'no S-VLM yet'} from {cell.lvlm}"
        self.what = "accuracy" if DATASETS[cell.dataset].labelled else "agreement with the L-VLM"
        self.broken: list[str] = []  # why files are not in the report
        self.differing: list[str] = []  # why evaluations are not compared
        self.before, self.after = (self._evaluation(model) for model in (cell.svlm, self.case.model))

    def attempt(self, make: Callable, without=None):
        """`make()`; `without`, and a line in `broken` or `differing`, where files do not allow that."""
        try:
            return make()
        except InputError as error:
            told = self.differing if isinstance(error, NotComparable) else self.broken
            told += [] if str(error) in told else [str(error)]
            return without

    def _evaluation(self, model: str) -> Evaluation | None:
        """None also for one whose records are broken."""
        found = self.attempt(lambda: self.case.evaluation(model))
        return found if found and self.attempt(lambda: found.usable) is not None else None

    def _meta(self, file: Path) -> dict:
        """The meta file of a result or of a model's folder; {} if it is not there."""
        return self.attempt(lambda: self.case.run.meta(file), {})

    @property
    def method(self) -> str:
        return self.attempt(lambda: self.case.method, "MPA")

    # --- overview ---

    @property
    def missing(self) -> list[str]:
        """The names of the files that later stages will write."""
        names = [path.name for path in self.case.missing]
        names += [] if self.cell.svlm else ["the S-VLM's answers", "the parity set"]
        if self.cell.svlm:
            files, model = self.case.files, self.case.model
            names += [] if train_meta(files.levelled()).exists() else [f"{model}/"]
            for file in map(files.evaluation, (self.cell.svlm, model)):
                names += [path.name for path in (file, records.meta_path(file)) if not path.exists()][:1]
        return names

    def funnel(self) -> list[tuple[str, int]]:
        case, steps = self.case, [("images", len(self.case.samples)), ("annotated", len(self.case.annotated))]
        if case.usable:
            steps.append(("L-VLM repeats itself", len(case.consistent)))
        if case.train_json.exists():
            steps.append(("parity set", len(case.kept)))
        return steps

    def losses(self) -> list[tuple[str, int]]:
        """What is not in the parity set, by cause, in the order in which PI finds it."""
        counts = Counter(s.reason for s in self.case.samples if not s.kept)
        return [(reason, counts[reason]) for reason in in_order(counts)]

    @cached_property
    def evaluations(self) -> dict[str, tuple[str, str, Evaluation]]:
        """{key: (row name, model, evaluation)} of the S-VLM before PL, after it on each train set, and of the L-VLM."""
        case, found_of = self.case, {}
        variants = self.attempt(lambda: case.run.variants(self.cell, case.files.evaluation(ANY)), {})
        names = ROWS | {MPA: self.method} | {variant: variant for variant in variants if variant not in ROWS}
        models = {key: model_of(case, key) if key in ROWS else variants[key] for key in names}
        for key in [key for key in names if key != "lvlm"] + ["lvlm"] * DATASETS[self.cell.dataset].labelled:
            if found := self._evaluation(models[key]):
                found_of[key] = (names[key], models[key], found)
        return found_of

    def results(self) -> list[dict]:
        """key, name, train samples, what was lost, and `score`, `ci95` and `n`, by evaluation."""
        rows = []
        for key, (name, model, found) in self.evaluations.items():
            samples = self._meta(self.folder / model).get("samples")
            rows.append({"key": key, "name": name, "samples": samples, "lost": found.lost} | found.summary)
        return rows

    def trained(self) -> list[tuple[list[str], Evaluation]]:
        """(what tells it from others, evaluation) of the S-VLM after PL: by MPA first, then on the other train sets."""
        cell = self.cell
        of = [(k, name, found) for k, (name, _, found) in self.evaluations.items() if k not in ("base", "lvlm")]
        of.sort(key=lambda one: one[0] != MPA)
        run = [run_name(self.folder), cell.dataset, f"{cell.svlm} from {cell.lvlm}"]
        return [([*run, name], found) for _, name, found in of]

    def gain(self) -> dict | None:
        """`paired.summary` with "notes". None without two evaluations that can be compared."""
        both = self.before and self.after
        pairs = self.attempt(lambda: comparable.compare(self.before, self.after)) if both else None
        return pairs and pairs.summary() | {"notes": pairs.notes}

    @cached_property
    def _changes(self) -> list | None:
        """Each test question before and after PL; None if the evaluations cannot be compared."""
        return self.attempt(lambda: changes(self.before, self.after))

    def facts(self) -> list[tuple[str, str]]:
        """Models, settings, versions and commands."""
        metas = self._metas
        settings = metas["PA"].get("settings", {}) | metas["PI"].get("settings", {})
        made_by = next((m["made_by"] for m in metas.values() if m.get("made_by")), {})
        versions = made_by.get("packages") or {}
        facts = [
            ("dataset", self.cell.dataset),
            ("L-VLM", metas["PA"].get("model_path") or self.cell.lvlm),
            ("S-VLM", metas["PI"].get("model_path_svlm") or self.cell.svlm),
            ("preset, matcher", ", ".join(str(settings[k]) for k in ("preset", "match") if k in settings)),
            ("task prompt", metas["PA"].get("prompt")),
            ("device", ", ".join(dict.fromkeys(str(m["device"]) for m in metas.values() if m.get("device")))),
            ("commit", f"{made_by.get('commit')}{' and changes' if made_by.get('uncommitted_changes') else ''}"),
            ("versions", ", ".join(f"{name} {version}" for name, version in versions.items())),
        ]
        commands = [(f"command, {s}", " ".join(m["made_by"]["command"])) for s, m in metas.items() if m.get("made_by")]
        return [(name, value) for name, value in [*facts, *commands] if value and value != "None"]

    @cached_property
    def _metas(self) -> dict[str, dict]:
        files = {"PA": self.case.pa_json, "PI": self.case.train_json, "PL": self.case.files.levelled()}
        metas = {stage: self._meta(file) for stage, file in files.items()}
        return metas | {"evaluate": self.after.meta if self.after else {}}

    def seconds(self) -> dict[str, float]:
        """Of each stage; PI's are those of both models' answers, evaluate's those of before and after."""
        answers = list(map(self._meta, self.case.answers_json.values()))
        parts = {"PA": [self._metas["PA"]], "PI": answers, "PL": [self._metas["PL"]]}
        parts["evaluate"] = [e.meta for e in (self.before, self.after) if e]
        found = {stage: sum(m.get("seconds") or 0 for m in of) for stage, of in parts.items()}
        return {stage: seconds for stage, seconds in found.items() if seconds}

    def costs(self) -> dict[str, float]:
        """What the run has paid for each stage and model, of all its cells, in the currency of --price-in."""
        file = self.folder / "spending.json"
        book = self.attempt(lambda: records.read_json(file)) if file.exists() else {}
        spent = book.get("spent") if isinstance(book, dict) else None
        accounts = spent.items() if isinstance(spent, dict) else ()
        costs = {stage: account.get("cost") for stage, account in accounts if isinstance(account, dict)}
        return {stage: float(cost) for stage, cost in costs.items() if isinstance(cost, int | float)}

    # --- parity ---

    def most_frequent(self, n: int = 8) -> dict[str, list[tuple[str, int]]]:
        """The most frequent questions and answers of the parity set, and of the annotations without one."""
        samples = self.case.kept or self.case.annotated
        tables = {}
        for name in ("question", "annotation"):
            texts = {}
            counts = Counter()
            for s in samples:
                key = normalise(getattr(s, name))
                texts.setdefault(key, getattr(s, name))
                counts[key] += 1
            tables[name] = [(shortened(texts[key]), count) for key, count in counts.most_common(n)]
        return tables

    def repeats(self) -> list[tuple[str, list[int]]]:
        """(set, [samples, distinct questions, distinct questions with their answers, distinct images]).

        An image is its content where PA recorded its hash, else its path.
        """
        hashes = {str(r["question_id"]): r.get("image_hash") for r in self.case.annotations}
        found = []
        for name, samples in (("D_PA", self.case.annotated), ("parity set", self.case.kept)):
            questions = [normalise(s.question) for s in samples]
            pairs = {(q, normalise(s.annotation)) for q, s in zip(questions, samples, strict=True)}
            images = {hashes.get(s.question_id) or s.image_path for s in samples}
            found.append((name, [len(samples), len(set(questions)), len(pairs), len(images)]))
        return found

    def distributions(self) -> tuple[dict, dict]:
        groups = {"kept": self.case.kept, "rejected": [s for s in self.case.annotated if s.rejected]}
        lengths = {
            name: {
                "question": [len(s.question.split()) for s in found],
                "answer": [len(s.annotation.split()) for s in found],
            }
            for name, found in groups.items()
        }
        of = {name: [s.annotation_logprob for s in g if s.annotation_logprob is not None] for name, g in groups.items()}
        return lengths, of

    @cached_property
    def calibration(self) -> list[Reliability]:
        return self.attempt(lambda: calibration.of_case(self.case), [])

    def history(self) -> list[dict]:
        return self.attempt(lambda: self.case.history, [])

    def training_facts(self) -> list[tuple[str, str]]:
        meta = self._metas["PL"]
        names = ("samples", "tokens", "steps", "loss", "seconds")
        facts = [(name, meta[name]) for name in names if meta.get(name) is not None]
        last = next((e for e in reversed(self.history()) if "loss" in e), {})
        facts += [
            (f"{key.replace('_', ' ')} at step {last['step']}", last[key])
            for key in [*sorted(k for k in last if k.startswith("lr_")), "grad_norm", "samples_per_second"]
            if isinstance(last.get(key), int | float)
        ]
        return [
            (name, f"{v:.4g}" if isinstance(v, float) else f"{v:,}" if isinstance(v, int) else v) for name, v in facts
        ]

    def coverage(self):
        return self.attempt(lambda: [coverage_table(self.case, of) for of in ("answer", "question")], [])

    def reasons(self):
        return self.attempt(lambda: reasons_table(self.case))

    @cached_property
    def findings(self) -> list:
        found = self.attempt(lambda: diagnose(self.case))
        if found is None:  # never "nothing unusual"
            why, remedy = "A file that it reads is broken.", "Make it again, or move it away."
            return [Finding("not diagnosed", "problem", "; ".join(self.broken).rstrip("."), why, remedy)]
        return found

    # --- gallery ---

    def records(self) -> list[dict]:
        """The samples of the gallery: annotated images, then test questions. `image` is a path."""
        task = self.case.task
        found = [
            {
                "source": "annotated",
                "id": s.question_id,
                "image": s.image_path,
                "question": shortened(s.question),
                "answer": shortened(s.annotation),
                "lvlm": shortened(s.lvlm_answer),
                "svlm": shortened(s.svlm_answer),
                "verdict": s.reason,
                "detail": shortened(s.detail),
                "logprob": s.annotation_logprob,
                "answerType": answer_type(s.annotation or "", task),
                "questionType": question_type(s.question or ""),
            }
            for s in self.case.samples
        ]
        return found + self.attempt(lambda: self._tested(task), [])

    def _tested(self, task: str) -> list[dict]:
        if not self.before:
            return []
        lvlm = self._evaluation(self.cell.lvlm)
        after = self.after if self.after and self._changes is not None else None
        tested = self._changes if after else changes(self.before, self.before)
        of_lvlm = {str(r["question_id"]): r["predictions"] for r in lvlm.records} if lvlm else {}
        logprobs = {str(r["question_id"]): r.get("logprob") for r in (after or self.before).records}
        return [
            {
                "source": "test",
                "id": c.question_id,
                "image": c.image_path,
                "question": shortened(c.question),
                "answer": shortened(", ".join(dict.fromkeys(c.answers))),
                "lvlm": shortened(of_lvlm.get(c.question_id)),
                "svlm": shortened(c.before),
                "after": shortened(c.after) if after else None,
                "verdict": c.kind if after else "before PL only",
                "logprob": finite(logprobs.get(c.question_id)),
                "answerType": answer_type(c.answers[0] if c.answers else "", task),
                "questionType": question_type(c.question),
            }
            for c in tested
        ]


def compared(cells: list[CellContent]) -> list[dict]:
    """Paired differences of trained S-VLMs that were asked the same questions, and the questions that flipped.

    A pair that cannot be compared is left out, with a line in the first cell's `differing`.

    Within a cell each other train set is compared with MPA, which is second; of different cells MPA with MPA.
    """
    found = []
    for i, one in enumerate(cells):
        pairs = [(other, one.trained()[0]) for other in one.trained()[1:]] if one.after else []
        for other in cells[i + 1 :]:
            same = (one.cell.dataset, one.cell.svlm) == (other.cell.dataset, other.cell.svlm)
            if same and one.after and other.after:
                pairs.append((one.trained()[0], other.trained()[0]))
        found += filter(None, (one.attempt(lambda pair=pair: _pair(*pair)) for pair in pairs))
    return found


def _pair(first: tuple[list[str], Evaluation], second: tuple[list[str], Evaluation]) -> dict:
    """`of` is what both have in common, `first` and `second` what they have not. Raises NotComparable."""
    pairs = comparable.compare(first[1], second[1])
    flips = [c for c in changes(first[1], second[1]) if c.kind in ("fixed", "broken")]
    both = list(zip(first[0], second[0], strict=True))
    one, other = (", ".join(pair[i] for pair in both if pair[0] != pair[1]) or both[-1][i] for i in (0, 1))
    of = ", ".join(a for a, b in both if a == b)
    notes = [f"{one} and {other}: {note}" for note in pairs.notes]
    return {"of": of, "first": one, "second": other, "change": pairs.summary(), "flips": flips, "notes": notes}
