"""lmms-eval's result files, written and read."""

import json
from dataclasses import replace

import pytest
from conftest import DATA, python

from mpa.data.protocol import Sample
from mpa.files.records import InputError, read_json
from mpa.runs import interchange, scoring

OFFICIAL = DATA / "official"


RESULT = [
    {
        **{"question_id": i, "image_path": f"{i}.png", "GT_question": "how many?", "GT_answer": "12"},
        **{"predictions": said, "answers": ["12"], "type": kind},
    }
    for i, (said, kind) in enumerate([("12", "human"), ("12.5", "human"), ("13", "augmented"), (None, "augmented")])
]


def test_lmms_evals_files_are_written_in_its_shape_and_read_back_to_the_same_scores(tmp_path):
    folder = interchange.write_lmms_eval(tmp_path, RESULT, "chartVQA", "paper", "some/model")
    lines = [json.loads(line) for line in (folder / "samples_chartqa.jsonl").read_text().splitlines()]
    assert {"doc_id", "doc", "target", "filtered_resps", "doc_hash", "input", "relaxed_overall"} <= set(lines[0])
    assert [line["filtered_resps"] for line in lines] == ["12", "12.5", "13", ""]
    results = read_json(folder / "results.json")
    assert results["results"]["chartqa"]["relaxed_overall,none"] == 0.5
    assert results["results"]["chartqa"]["relaxed_overall_stderr,none"] == pytest.approx(0.2887, abs=1e-4)
    assert results["n-samples"]["chartqa"] == {"original": 4, "effective": 4}
    assert {"results", "configs", "versions", "n-shot", "higher_is_better", "config", "model_name"} <= set(results)

    back = interchange.read_lmms_eval(folder / "samples_chartqa.jsonl", lines, None)
    assert scoring.score(back, "chartVQA") == scoring.score(RESULT, "chartVQA")

    interchange.write_lmms_eval(tmp_path, RESULT, "okVQA", "paper", "some/model")
    assert set(read_json(folder / "results.json")["results"]) == {"chartqa", "ok_vqa_val2014"}


def test_lines_without_a_doc_take_their_answers_from_the_data_set(tmp_path):
    """As lmms-eval writes them now: without `doc`, and with the question's id in `submission` or not at all."""
    samples = [Sample(70 + i, f"{i}.png", "how many?", [str(i)]) for i in range(3)]
    by_id = [
        {"doc_id": 0, "target": "answer", "filtered_resps": ["2"], "submission": {"question_id": 72, "answer": "2"}}
    ]
    (record,) = interchange.read_lmms_eval(tmp_path, by_id, samples)
    assert (record["question_id"], record["answers"], record["predictions"]) == (72, ["2"], "2")
    by_place = [{"doc_id": 1, "target": "1", "filtered_resps": "one"}]
    assert interchange.read_lmms_eval(tmp_path, by_place, samples)[0]["answers"] == ["1"]
    for bad in ({"doc_id": 1, "target": "2", "filtered_resps": "x"}, {"doc_id": 9, "filtered_resps": "x"}):
        with pytest.raises(InputError, match="line 1: no answers in it"):
            interchange.read_lmms_eval(tmp_path, [bad], samples)


def test_evaluate_scores_compares_and_writes_all_these_files(tmp_path):
    (tmp_path / "samples_chartqa.jsonl").write_text("")
    ours = tmp_path / "Eval_a_chartVQA.json"
    ours.write_text(json.dumps(RESULT))
    interchange.write_lmms_eval(tmp_path, RESULT, "chartVQA", "paper", "m")
    for file in (ours, tmp_path / "samples_chartqa.jsonl"):
        out = tmp_path / "scores.json"
        done = python("evaluate.py", "--dataset", "chartVQA", "--predictions", file, "--out", out)
        assert done.returncode == 0, done.stderr
        scores = read_json(out)
        assert list(scores)[:3] == ["relaxed", "relaxed, augmented", "relaxed, human"]
        assert (scores["relaxed, human"]["score"], scores["relaxed, human"]["n"]) == (1.0, 2)
        assert {"relaxed", "tolerant", "exact", "contains", "anls", "accuracy"} <= set(scores)
    ours.write_text(json.dumps([{**r, "predictions": r["predictions"] or "no"} for r in RESULT]))
    better = tmp_path / "Eval_b_chartVQA.json"
    better.write_text(json.dumps([{**r, "predictions": "12"} for r in RESULT[1:]]))
    done = python("evaluate.py", "--compare", ours, better)
    assert done.returncode == 0, done.stderr
    assert "relaxed +66.7 points 95 % interval -26.9 to +93.9 better on 2, worse on 0 of 3" in " ".join(
        done.stdout.split()
    )
    assert "1 are only in Eval_a_chartVQA.json and 0 only in Eval_b_chartVQA.json" in done.stdout
    for bad, says in (
        ([{**RESULT[0], "predictions": 3}], "'predictions' should be text or null"),
        ([{**RESULT[0], "answers": None, "GT_answer": None}], "no answer to score against"),
        ([{**RESULT[0], "answers": [5, 6]}], "'answers' should be a list of text"),
    ):
        better.write_text(json.dumps(bad))
        done = python("evaluate.py", "--predictions", better)
        assert done.returncode == 1
        assert f"record 0: {says}" in done.stderr


def lines_of(samples: list[Sample], prompt="{}\nAnswer the question with a single word.") -> list[dict]:
    """A sample file's lines about questions, as lmms-eval 0.7.3 writes them for ChartQA: no `doc`, nor a question's id."""
    return [
        {
            **{"doc_id": i, "target": s.answers[0], "filtered_resps": s.answers[0] if i % 3 else "?"},
            **{
                "token_counts": [None],
                "doc_hash": "0" * 64,
                "input": prompt.format(s.question),
                "relaxed_overall": 1.0,
            },
        }
        for i, s in enumerate(samples)
    ]


CHARTS = [Sample(i, f"{i}.png", f"What is the value of bar {i}?", [str(3 * i)]) for i in range(10)]


@pytest.mark.parametrize("without", [(), ("input",), ("target",)])
def test_a_position_counts_only_where_the_prompt_or_the_target_is_that_questions(tmp_path, without):
    """ChartQA in another order: without the check, 70 % silently became 24 %."""
    lines = [{k: v for k, v in line.items() if k not in without} for line in lines_of(CHARTS)]
    scores = [r["predictions"] in r["answers"] for r in interchange.read_lmms_eval(tmp_path, lines, CHARTS)]
    assert sum(scores) == 6
    with pytest.raises(InputError, match=r"line 1: no answers in it, and 'doc_id' 0 .*same order, with --annotations"):
        interchange.read_lmms_eval(tmp_path, lines, CHARTS[::-1])
    with pytest.raises(InputError, match="no 'doc_id' 9"):
        interchange.read_lmms_eval(tmp_path, lines, CHARTS[:9])


def test_a_position_is_never_taken_for_a_questions_id(tmp_path):
    others = [Sample(s.question_id + 1, *(s.image_path, s.question, s.answers)) for s in CHARTS]
    got = interchange.read_lmms_eval(tmp_path, lines_of(CHARTS), others)
    assert [r["question_id"] for r in got] == list(range(1, 11))
    alone = [{"doc_id": 3, "target": "answer", "filtered_resps": "9"}]
    with pytest.raises(InputError, match="no prompt or target to identify"):
        interchange.read_lmms_eval(tmp_path, alone, CHARTS)


def test_the_same_question_with_another_answer_and_an_answer_to_another_question_are_refused(tmp_path):
    twins = [Sample(i, f"{i}.png", "What is the lowest bar?", [str(i)]) for i in range(3)]
    lines = lines_of(twins)
    with pytest.raises(InputError, match="other answers in the dataset than '0'"):
        interchange.read_lmms_eval(tmp_path, lines, twins[::-1])
    with pytest.raises(InputError, match=r"lines 1 and 4 answer the same question, 0"):
        interchange.read_lmms_eval(tmp_path, [*lines, lines[0]], twins)


def test_real_lines_of_okvqa_textvqa_and_stvqa_are_read(tmp_path, capsys):
    """Their `target` is a column's name, and OK-VQA's question id is the name of an image."""
    samples = [
        Sample(2971475, "x.jpg", "What sport can you use this for?", ["race"] * 10, {"raw_answers": ["racing"] * 10})
    ]
    line = {"doc_id": 0, "target": "answer", "filtered_resps": "racing", "exact_match": 0.0}
    line["input"] = (
        "What sport can you use this for?\nWhen the provided information is insufficient, respond with 'Un…'."
    )
    line["submission"] = {"image": "2971475.jpg", "answer": "racing"}
    (record,) = interchange.read_lmms_eval(tmp_path, [line], samples)
    assert (record["question_id"], record["predictions"], record["answers"][0]) == (2971475, "racing", "race")
    # TextVQA's prompt has the question capitalised, ST-VQA's target is a list as Python prints it.
    for_text = [{**line, "input": "What Sport CAN you  use this for?\nAnswer", "submission": {"question_id": 2971475}}]
    assert interchange.read_lmms_eval(tmp_path, for_text, samples)[0]["question_id"] == 2971475
    assert interchange.read_lmms_eval(tmp_path, [{**for_text[0], "target": "['race', 'run']"}], samples)
    for changed in ({"input": "What animal is it?"}, {"target": "['ran']"}, {"submission": {"image": "7.jpg"}}):
        with pytest.raises(InputError, match=r"line 1: no answers in it, and (no )?question"):
            interchange.read_lmms_eval(tmp_path, [{**for_text[0], **changed}], samples)
    assert "by; taken as" not in capsys.readouterr().err
    interchange.read_lmms_eval(tmp_path, [{k: v for k, v in line.items() if k != "input"}], samples)
    assert "1 lines have no prompt and no target" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"doc": {"answers": "nokia"}}, "'answers' should be a list of text: \"nokia\""),
        ({"doc": {"answers": [["nokia"]]}}, "'answers' should be a list of text"),
        ({"doc": {"answers": {"0": "nokia"}}}, "'answers' should be a list of text"),
        ({"doc": {"answers": 5}}, "'answers' should be a list of text"),
        ({"doc": {"answers": [True]}}, "'answers' should be a list of text"),
        ({"doc": {"answers": ["a", None]}}, "'answers' should be a list of text"),
        ({"doc": {"answer": 5}}, "'answer' should be a list of text"),
        ({"doc": {"answers": ["", " "]}}, "'answers' holds no answer to score against"),
        ({"doc": {"answer": ""}}, "'answer' holds no answer to score against"),
        ({"doc": ["nokia"]}, "'doc' should be an object"),
        ({"doc": {"answers": ["a"], "type": ["human"]}}, "'type' should be text"),
        ({"doc": {"answers": ["a"], "raw_answers": "abc"}}, "'raw_answers' should be a list of text"),
        ({"doc": {"answers": ["a"], "question": 3}}, "'question' should be text"),
        ({"doc": {"answers": ["a"], "question_id": [1]}}, "'question_id' should be a number or text"),
        ({"doc": {"answers": ["a"], "question_id": 1.5}}, "'question_id' should be a number or text"),
        ({"doc": {"answers": ["a"], "question_id": True}}, "'question_id' should be a number or text"),
        ({"submission": "x"}, "'submission' should be an object"),
        ({"doc_id": "0"}, "'doc_id' should be a number"),
        ({"doc_id": None}, "no 'doc_id'"),
        ({"filtered_resps": ["a", "b"]}, "'filtered_resps' should be one reply"),
        ({"filtered_resps": []}, "'filtered_resps' should be one reply"),
        ({"filtered_resps": None}, "'filtered_resps' should be one reply"),
        ({"filtered_resps": 7}, "'filtered_resps' should be one reply"),
        ({"filtered_resps": {"a": 1}}, "'filtered_resps' should be one reply"),
    ],
)
def test_a_line_of_another_shape_is_named_not_scored(tmp_path, change, says):
    good = {"doc_id": 0, "doc": {"question_id": 0, "question": "q", "answers": ["a"]}, "filtered_resps": [["a"]]}
    assert interchange.read_lmms_eval(tmp_path, [good], None)[0]["predictions"] == "a"
    with pytest.raises(InputError) as refused:
        interchange.read_lmms_eval(tmp_path, [good, {**good, "doc_id": 1, **change}], None)
    assert f"line 2: {says}" in str(refused.value) or f"line 2: not a sample of lmms-eval: {says}" in str(refused.value)
    with pytest.raises(InputError, match="line 2: not a sample"):
        interchange.read_lmms_eval(tmp_path, [good, ["a"]], None)


def test_a_new_data_set_is_logged_by_its_own_name_and_headline(tmp_path, monkeypatch):
    new = replace(scoring.DATASETS["stVQA"], name="docVQA", lmms_eval=None)
    monkeypatch.setitem(scoring.DATASETS, "docVQA", new)
    interchange.write_lmms_eval(tmp_path, RESULT, "docVQA", "paper", "m")
    assert (tmp_path / "samples_docvqa.jsonl").exists()
    assert "anls,none" in read_json(tmp_path / "results.json")["results"]["docvqa"]


def test_a_results_file_of_another_shape_is_named_not_mixed(tmp_path):
    for content in ("[]", '{"results": []}', "{"):
        (tmp_path / "results.json").write_text(content)
        with pytest.raises(InputError, match=r"results\.json: not"):
            interchange.write_lmms_eval(tmp_path, RESULT, "chartVQA", "paper", "m")
        assert (tmp_path / "results.json").read_text() == content
