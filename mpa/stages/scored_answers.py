"""The body of evaluate: a model’s answers to test or held-out questions, each with its scores."""

from mpa.answers.metrics import most_common
from mpa.data.protocol import Sample
from mpa.files import records
from mpa.runs import scoring
from mpa.stages.answering import Answers, Question, question_request
from mpa.stages.stage import AskedModel, run_files


class ScoredAnswers(Answers):
    """A model's answers to the test questions, each with its scores. The meta file has the means."""

    def record(self, question: Question, reply: dict) -> dict:
        record = super().record(question, reply)
        names = scoring.metric_names(self.model.args.scored_as, self.preset)
        image = self.prints[question.request.image_path]
        record["image_hash"] = image and image[1]
        return record | {"scores": {name: scoring.values([record], name)[0] for name in names}}

    def changed(self, samples: list[Sample]) -> dict[str, dict]:
        """A reply for each question whose image is another one than the held-out set was made from: it cannot be answered."""
        error = {"error": "the image has changed since PI", "permanent": True}
        known = {s.key: s.more.get("image_hash") for s in samples}
        found = {}
        for request in (q.request for q in self.questions):
            image = self.prints[request.image_path]
            if image and known[request.key] not in (None, image[1]):
                found[request.key] = {"key": request.key, **error}
        return found

    def summary(self, result: list[dict]) -> dict:
        few = scoring.few_answers_of(result, self.model.args.scored_as)
        facts = {"scores": scoring.score(result, self.model.args.scored_as, self.preset)}
        facts |= {"few_answers": few} if few else {}
        return facts | (super().summary(result) if self.model.args.held_out else {})


def evaluation(args, model: AskedModel, samples: list[Sample]) -> ScoredAnswers:
    name, files = records.short_name(model.path), run_files(args)
    out = args.out or (files.guard_answers(name) if args.held_out else files.evaluation(name))
    questions = []
    for s in samples:
        before = {"question_id": s.question_id, "image_path": s.image_path, "GT_question": s.question}
        before["GT_answer"] = most_common(s.answers)
        request = question_request(args, s.key, s.image_path, s.question)
        more = {name: value for name, value in s.more.items() if name != "image_hash"}
        questions.append(Question(request, before, {"answers": s.answers, **more}))
    return ScoredAnswers(model, out, f"evaluate {name}", "Eval", questions)
