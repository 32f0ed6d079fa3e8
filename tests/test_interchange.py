"""Other tools' files, written and read: lmms-eval's results, and the parity set for other trainers."""

import json

import datasets
import evaluate
import export
import pytest
from conftest import DATA, script
from PIL import Image

from mpa import interchange, scoring
from mpa.datasets import Sample
from mpa.records import InputError, read_json, train_record

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
    """As lmms-eval writes them today: `doc` is dropped, a question's id stands in `submission` or nowhere."""
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
        done = script("evaluate.py", "--dataset", "chartVQA", "--predictions", file, "--out", out)
        assert done.returncode == 0, done.stderr
        scores = read_json(out)
        assert list(scores)[:3] == ["relaxed", "relaxed, augmented", "relaxed, human"]
        assert (scores["relaxed, human"]["score"], scores["relaxed, human"]["n"]) == (1.0, 2)
        assert {"relaxed", "tolerant", "exact", "contains", "anls", "accuracy"} <= set(scores)
    better = tmp_path / "Eval_b_chartVQA.json"
    better.write_text(json.dumps([{**r, "predictions": "12"} for r in RESULT[1:]]))
    done = script("evaluate.py", "--compare", ours, better)
    assert done.returncode == 0, done.stderr
    assert "relaxed +66.7 points 95 % interval +0.0 to +100.0 better on 2, worse on 0 of 3" in " ".join(
        done.stdout.split()
    )
    assert "1 questions only in the first file and 0 only in the second" in done.stdout
    for bad, says in (
        ([{**RESULT[0], "predictions": 3}], "'predictions' should be text or null"),
        ([{**RESULT[0], "answers": None, "GT_answer": None}], "no answer to score against"),
        ([{**RESULT[0], "answers": [5, 6]}], "'answers' should be a list of text"),
    ):
        better.write_text(json.dumps(bad))
        done = script("evaluate.py", "--predictions", better)
        assert done.returncode == 1
        assert f"record 0: {says}" in done.stderr


def test_a_released_result_file_takes_all_ten_answers_from_the_annotations(tmp_path):
    eval_file = OFFICIAL / "Eval_Qwen2-VL-2B-Instruct_textVQA.json"
    released = read_json(eval_file)
    data = [
        {"question_id": r["question_id"], "image_id": "x", "question": r["GT_question"], "answers": ["?"] * 9 + ["!"]}
        for r in released
    ]
    (tmp_path / "val.json").write_text(json.dumps({"data": data}))
    args = evaluate.arguments(["--predictions", str(eval_file), "--annotations", str(tmp_path / "val.json")])
    assert args.dataset == "textVQA"
    assert all(r["answers"][-1] == "!" for r in evaluate.read_predictions(args, eval_file))
    data[0]["question"] = "what else?"
    (tmp_path / "val.json").write_text(json.dumps({"data": data}))
    with pytest.raises(InputError, match="these are not the same questions"):
        evaluate.read_predictions(args, eval_file)
    (tmp_path / "val.json").write_text(json.dumps({"data": data[1:]}))
    with pytest.raises(InputError, match="questions are in the annotation file: another data set or part"):
        evaluate.read_predictions(args, eval_file)


def test_files_of_other_questions_with_the_same_ids_are_not_compared():
    other = [{**r, "GT_question": "how few?"} for r in RESULT]
    with pytest.raises(InputError, match="question 0 is 'how many\\?' in the one file and 'how few\\?' in the other"):
        scoring.compare(RESULT, other, "chartVQA")


@pytest.fixture
def parity_set(tmp_path):
    """Two samples and what PI says of them."""
    for name, color in (("a.png", "red"), ("b.jpg", "blue")):
        Image.new("RGB", (32, 32), color).save(tmp_path / name)
    samples = [
        train_record(7, str(tmp_path / "a.png"), "what color is it? Answer", "red"),
        train_record("x/8", str(tmp_path / "b.jpg"), "welche Farbe? Antworte", "blau"),
    ]
    path = tmp_path / "PI_big_train_big_small_images.json"
    path.write_text(json.dumps(samples))
    meta = {"settings": {"preset": "paper"}, "funnel": {"pictures": 9, "parity": 2}, "model_path_lvlm": "big"}
    (tmp_path / "PI_big_train_big_small_images.meta.json").write_text(json.dumps(meta))
    return path


def exported(parity_set, to: str):
    out = parity_set.parent / f"out-{to}"
    export.main([str(parity_set), "--to", to, "--out", str(out)])
    return out


def test_llava_and_sharegpt(parity_set):
    assert read_json(exported(parity_set, "llava")) == read_json(parity_set)
    out = exported(parity_set, "sharegpt")
    first = read_json(out)[0]
    assert first["images"] == [str(parity_set.parent / "a.png")]
    assert first["conversations"][0]["value"].count("<image>") == len(first["images"])
    info = read_json(parity_set.parent / "dataset_info.json")["out-sharegpt"]
    assert info["columns"] == {"messages": "conversations", "images": "images"}


def test_ms_swift(parity_set):
    lines = [json.loads(line) for line in exported(parity_set, "ms-swift").read_text().splitlines()]
    assert lines[0] == {
        "messages": [
            {"role": "user", "content": "<image>what color is it? Answer"},
            {"role": "assistant", "content": "red"},
        ],
        "images": [str(parity_set.parent / "a.png")],
    }


def test_the_folder_for_trl_loads_with_its_pictures(parity_set, tmp_path):
    loaded = datasets.load_dataset(str(exported(parity_set, "trl")), split="train", cache_dir=tmp_path / "cache")
    row = loaded[0]
    (user,) = row["prompt"]
    assert [part["type"] for part in user["content"]] == ["image", "text"]
    assert user["content"][1]["text"] == "what color is it? Answer"
    assert row["completion"] == [{"role": "assistant", "content": [{"type": "text", "text": "red"}]}]
    assert [picture.getpixel((0, 0)) for picture in row["images"]] == [(255, 0, 0)]


def test_the_hugging_face_folder_loads_and_its_card_says_what_it_is(parity_set, tmp_path):
    folder = exported(parity_set, "hf")
    loaded = datasets.load_dataset(str(folder), split="train", cache_dir=tmp_path / "cache")
    assert (loaded["id"][:], loaded["answer"][:]) == (["7", "x/8"], ["red", "blau"])
    assert loaded[1]["image"].getpixel((0, 0))[2] > 250
    card = (folder / "README.md").read_text()
    assert "9 pictures → 2 parity" in card
    assert "visual-question-answering" in card


def test_a_picture_that_is_not_there_is_named_before_a_folder_is_written(parity_set):
    (parity_set.parent / "a.png").unlink()
    with pytest.raises(InputError, match=r"a\.png: no such picture"):
        exported(parity_set, "hf")
    assert not (parity_set.parent / "out-hf").exists()
    (parity_set.parent / "b.jpg").unlink()
    with pytest.raises(InputError, match="no such picture, and none of the others"):
        exported(parity_set, "ms-swift")
