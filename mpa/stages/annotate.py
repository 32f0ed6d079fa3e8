"""The body of PA: the L-VLM writes a question and its answer for each image, tries again, and differs from what it wrote before."""

from dataclasses import replace
from pathlib import Path

from rapidfuzz import fuzz

from mpa.answers.finish_reasons import canonical
from mpa.answers.metrics import most_common
from mpa.answers.normalise import normalise
from mpa.data.protocol import Sample
from mpa.engines import Request, ask, cut_off
from mpa.files import records
from mpa.files.journal import Journal, is_temporary
from mpa.method.presets import PRESETS
from mpa.method.prompts import A_MARK, Annotation, holds_mark, parse_annotation
from mpa.stages.stage import Stage, counted


def own_prompt(file: Path) -> str:
    """The user's own task prompt. Raises InputError if it does not ask for the lines that the parser reads."""
    try:
        prompt = file.read_text(encoding="utf-8-sig").strip()
    except (OSError, UnicodeDecodeError) as error:
        raise records.InputError(f"{file}: cannot be read as text: {error}.") from None
    if not ("question:" in prompt.lower() and "answer:" in prompt.lower()):
        raise records.InputError(f"{file}: must ask for the two lines 'Question: …' and 'Answer: …', which are parsed.")
    return prompt


def request(sample: Sample, attempt: int, args, earlier: list[str]) -> Request:
    """The request for one annotation, unlike the `earlier` questions. Retries are sampled, as a greedy one would return the same."""
    return Request(
        key=f"{sample.key}#{attempt}",
        image_path=sample.image_path,
        prompt="\n".join([args.prompt, "The question must differ from these:", *earlier] if earlier else [args.prompt]),
        max_new_tokens=args.max_new_tokens,
        temperature=args.temperature if attempt == 0 else args.temperature or 1.0,
        top_p=args.top_p,
        seed=args.seed,
        stop="" if PRESETS[args.preset].whole_reply else "annotation",
        follow_up=args.preset if args.fused else "",
    )


def repeated(question: str, earlier: list[str]) -> bool:
    """Is the question nearly one of the earlier ones? Nearly: 90 % of the characters, normalised, are the same in order."""
    asked = normalise(question)
    return any(fuzz.ratio(asked, normalise(other)) >= 90 for other in earlier)


def annotation(reply: dict, args, marks: frozenset[str], earlier: list[str]) -> Annotation:
    """The annotation in a reply, with the reason if it cannot be used."""
    if "text" not in reply:
        return Annotation(None, None, reply["error"])
    parsed = parse_annotation(reply["text"], args.preset, args.keep_refusals, marks)
    if PRESETS[args.preset].checked and (cut := cut_off(reply)):
        return Annotation(parsed.question, parsed.answer, cut)
    if (
        parsed.question
        and parsed.answer
        and not parsed.left_out
        and holds_mark(f"{parsed.question}\n{parsed.answer}", marks)
    ):
        return Annotation(parsed.question, parsed.answer, A_MARK)  # in every preset
    if parsed.question and not parsed.left_out and repeated(parsed.question, earlier):
        return Annotation(parsed.question, parsed.answer, "asked before about this image")
    return parsed


def record(sample: Sample, attempt: int, reply: dict, parsed: Annotation, image: tuple[int, str] | None) -> dict:
    return {
        "question_id": sample.question_id,
        "image_path": sample.image_path,
        "ground_truth_question": sample.question,
        "ground_truth_answer": most_common(sample.answers) if sample.answers else None,
        "predicted_question": None if parsed.left_out else parsed.question,
        "predicted_answer": None if parsed.left_out else parsed.answer,
        "left_out": parsed.left_out,
        "tries": attempt + 1,
        "reply": reply.get("text"),
        "logprob": reply.get("logprob"),
        "follow_up": reply.get("follow_up"),
        "finish_reason": reply.get("finish_reason"),
        "image_bytes": image and image[0],
        "image_hash": image and image[1],
    }


def another(sample: Sample, place: int) -> Sample:
    """The sample of an image's question number `place`. Labels belong to the first."""
    return sample if place == 1 else replace(sample, question_id=f"{sample.key}/{place}", question=None, answers=[])


def annotate_all(
    samples: list[Sample], tries: int, engine, stage: Stage, marks: frozenset[str], images: dict
) -> list[dict]:
    """The records of all images, by image. A further question is asked only where the one before could be used."""
    found = {s.key: [] for s in samples}
    for place in range(1, stage.model.args.questions_per_image + 1):
        asked = [s for s in samples if len(found[s.key]) == place - 1 and not any(r["left_out"] for r in found[s.key])]
        if not asked:
            break
        earlier = {another(s, place).key: [r["predicted_question"] for r in found[s.key]] for s in asked}
        result = annotate([another(s, place) for s in asked], tries, engine, stage, marks, images, earlier)
        for s, r in zip(asked, result, strict=True):
            found[s.key].append(r)
    return [r for of_image in found.values() for r in of_image]


def annotate(
    samples: list[Sample], tries: int, engine, stage: Stage, marks: frozenset[str], images: dict, earlier: dict
) -> list[dict]:
    """A record for each sample. Unusable replies are retried; images that cannot be read are not. `earlier`: {key: questions}."""
    done, pending, args = {}, samples, stage.model.args
    for attempt in range(tries + 1):
        label = "PA" if attempt == 0 else f"PA, try {attempt + 1}"
        ask(engine, [request(sample, attempt, args, earlier[sample.key]) for sample in pending], stage.journal, label)
        for sample in pending:
            reply = stage.journal[f"{sample.key}#{attempt}"]
            if attempt and "error" in reply:  # keep the earlier reply; the next call asks again
                continue
            parsed = annotation(reply, args, marks, earlier[sample.key])
            done[sample.key] = record(sample, attempt, reply, parsed, images.get(sample.image_path))
        pending = [s for s in pending if done[s.key]["left_out"] and done[s.key]["reply"] is not None]
    return [done[sample.key] for sample in samples]


def failed(samples: list[Sample], tries: int, journal: Journal) -> int:
    """How many samples have a reply that failed with a temporary error."""
    keys = ([f"{s.key}#{attempt}" for attempt in range(tries + 1)] for s in samples)
    return sum(any(key in journal and is_temporary(journal[key]) for key in of_sample) for of_sample in keys)


def make(args, stage: Stage, samples: list[Sample], questions: list[Sample], tries: int, images: dict) -> None:
    """Annotate the images and write the PA file."""
    marks, out = stage.model.marks, stage.out
    if args.prompt_file and holds_mark(args.prompt, marks):
        raise records.InputError(
            f"{args.prompt_file}: contains a special token of the model's prompt format, such as <image>; remove it."
        )
    with stage.running() as engine:
        result = annotate_all(samples, tries, engine, stage, marks, images)
    reasons = [r["left_out"] for r in result if r["left_out"]]
    counts = {"pictures": len(samples), "parsed": len(result) - len(reasons), "left_out": counted(reasons)}
    if args.questions_per_image == 1:
        print(f"PA: {counts['parsed']} of {len(samples)} images annotated. {counts['left_out']}".rstrip())
    else:
        print(f"PA: {counts['parsed']} questions about {len(samples)} images. {counts['left_out']}".rstrip())
    cut = sum(canonical(r["finish_reason"]) == "length" for r in result if r["left_out"])
    if cut > len(result) / 2:
        print(
            "PA: most replies were cut off at the token limit: raise --max-new-tokens. A model that thinks needs much more."
        )
    elif len(reasons) > len(result) / 2:
        example = next(r for r in result if r["left_out"])
        print(
            f"PA: most images were left out. One reply: {str(example['reply'])[:200]!r}. Check the model, --prompt-file and"
        )
        print("    --min-pixels and --max-pixels, which can override the sizes that the model was trained with.")
    stage.write(result, failed(questions, tries, stage.journal), counts["parsed"], prompt=args.prompt, counts=counts)
    if not counts["parsed"]:
        raise records.InputError(f"{out}: no image could be annotated; its fields `reply` and `left_out` say why.")
    print(f"Wrote {out}. Next: scripts/PI.sh with the same --run and --dataset.")
