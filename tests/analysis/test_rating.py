"""scripts/rate.py: the real server, asked as a browser asks it; and table 4 from what it saved."""

import csv
import http.client
import io
import json
import os
import signal
import subprocess
import sys
from contextlib import contextmanager
from urllib.parse import quote, urlsplit

import psutil
import pytest
import rate
from conftest import ROOT, python
from PIL import Image

from mpa.analysis import ratings
from mpa.files import records
from mpa.runs.layout import Cell, RunFiles

CELL = Cell("chartVQA", "L", "S_1")
NAME = "L_S_1_chartVQA"
HOSTILE = "<img src=x onerror=alert(1)>?"


@pytest.fixture
def run(tmp_path):
    """A run folder: 12 annotations, of which PI kept 4, and one of which the L-VLM left out."""
    annotations = []
    for i in range(12):
        Image.new("RGB", (20 + i, 20), (20 * i, 0, 99)).save(tmp_path / f"{i}.png")
        record = {"question_id": i, "image_path": str(tmp_path / f"{i}.png"), "ground_truth_question": None}
        record |= {"ground_truth_answer": None, "predicted_question": f"what is {i}?" if i else HOSTILE}
        annotations.append(record | {"predicted_answer": str(i), "left_out": "two questions" if i == 11 else None})
    folder = tmp_path / "run"
    records.write_json(folder / "PA_L_chartVQA.json", annotations)
    kept = [records.train_record(i, annotations[i]["image_path"], "q", str(i)) for i in range(0, 12, 3)]
    models = {"model_path_lvlm": "hub/L", "model_path_svlm": "hub/S_1"}
    records.write_result(folder / "PI_L_train_L_S_1_chartVQA.json", kept, {"match": "exact"}, **models)
    return folder


class Server:
    """What a browser can ask of the running server."""

    def __init__(self, process: subprocess.Popen, address: str):
        self.process, self.host = process, urlsplit(address).netloc

    def ask(self, method: str, path: str, body=None, **headers) -> tuple[int, http.client.HTTPMessage, bytes]:
        connection = http.client.HTTPConnection(self.host, timeout=30)
        text = json.dumps(body) if body is not None else None
        kind = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(
            method, path, text, kind | {name.replace("_", "-"): value for name, value in headers.items()}
        )
        reply = connection.getresponse()
        return reply.status, reply.headers, reply.read()

    def get(self, path: str):
        status, _, content = self.ask("GET", path)
        assert status == 200, content
        return json.loads(content)

    def click(self, rater: str, position: int, aspect: str, value, **headers) -> int:
        body = {"rater": rater, "position": position, "aspect": aspect, "value": value}
        return self.ask("POST", "/ratings", body, **headers)[0]


@contextmanager
def serving(folder, *flags):
    command = [sys.executable, ROOT / "scripts/rate.py", folder, "--port", "0", *flags]
    process = subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    lines = iter(process.stdout.readline, "")
    address = next((word for line in lines for word in line.split() if word.startswith("http://")), None)
    assert address, process.stderr.read()
    try:
        yield Server(process, address)
    finally:
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=30)


def saved(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / f"ratings_{NAME}.jsonl").read_text().splitlines()]


def test_every_click_is_saved_at_once_and_rating_goes_on_after_a_kill(run):
    with serving(run, "--samples", "4") as server:
        assert {c.laddr.ip for c in psutil.Process(server.process.pid).net_connections("inet")} == {"127.0.0.1"}
        assert server.get("/items?rater=Ada") == {"items": 8, "left": 8, "next": 0}
        for aspect in ratings.ASPECTS:
            assert server.click("Ada", 0, aspect, True) == 200
        assert server.click("Ada", 1, "human", False) == 200
        assert [line["value"] for line in saved(run)] == [True, True, True, False]
        server.process.kill()
    with open(run / f"ratings_{NAME}.jsonl", "a") as file:
        file.write('{"rater": "Ada", "quest')  # what a crash may leave
    with serving(run, "--samples", "4") as server:
        assert server.get("/items?rater=Ada") == {"items": 8, "left": 7, "next": 1}
        assert server.get("/items/1?rater=Ada")["values"] == {"human": False}
        assert server.get(f"/items?rater={quote('Бо')}")["left"] == 8
        assert server.click("Бо", 1, "human", True) == 200
        assert server.click("Ada", 1, "human", None) == 200  # taken back
        assert server.get("/items/1?rater=Ada")["values"] == {}
    assert [(line["rater"], line["value"]) for line in saved(run)[3:]] == [("Ada", False), ("Бо", True), ("Ada", None)]


def test_the_page_is_inert_and_a_client_sees_neither_sets_nor_files(run):
    with serving(run, "--samples", "4") as server:
        for path, word in (
            ("/", "<title>"),
            ("/page.js", "textContent"),
            ("/page.css", "#image"),
            ("/icon.svg", "<svg"),
        ):
            status, headers, content = server.ask("GET", path)
            assert status == 200 and word in content.decode()
            assert "default-src 'none'" in headers["Content-Security-Policy"] and "unsafe" not in str(headers)
            assert headers["X-Content-Type-Options"] == "nosniff"
        page = server.ask("GET", "/")[2].decode()
        assert page.count("<script") == page.count('<script src="/page.js"') == 1 and "onclick" not in page
        assert "innerHTML" not in server.ask("GET", "/page.js")[2].decode()
        shown = [server.get(f"/items/{i}?rater=Ada") for i in range(8)]
        assert {tuple(item) for item in shown} == {("question", "answer", "values")}
        assert HOSTILE in {item["question"] for item in shown}
        os.truncate(run.parent / f"{shown.pop()['answer']}.png", 10)
        assert server.ask("GET", "/images/7")[0] == 404
        for i, item in enumerate(shown):  # the image of each item is that of its question
            _, headers, content = server.ask("GET", f"/images/{i}")
            assert headers["Content-Type"] == "image/png"
            assert Image.open(io.BytesIO(content)).width == 20 + int(item["answer"])
        for path in (
            "/images/8",
            "/images/-1",
            "/images/..%2f..%2f0.png",
            "/images//etc/passwd",
            "/docs",
            "/openapi.json",
        ):
            assert server.ask("GET", path)[0] in (404, 422), path
        assert server.ask("GET", "/images/0?path=/etc/passwd")[1]["Content-Type"] == "image/png"


def test_other_sites_and_wrong_clicks_are_refused_and_write_nothing(run):
    with serving(run, "--samples", "4") as server:
        assert server.ask("GET", "/items/0?rater=Ada", Host="evil.example")[0] == 403
        assert server.click("Ada", 0, "human", True, Origin="http://evil.example") == 403
        assert server.click("Ada", 0, "human", True, Origin="null") == 403
        assert server.ask("POST", "/ratings", Content_Type="text/plain")[0] == 422
        wrong = [
            ("", 0, "human", True),
            ("a\nb", 0, "human", True),
            ("x" * 41, 0, "human", True),
            ("Ada", 8, "human", True),
        ]
        wrong += [
            ("Ada", -1, "human", True),
            ("Ada", 0, "nice", True),
            ("Ada", 0, "human", "yes"),
            ("Ada", "0/1", "human", 1),
        ]
        assert {server.click(*click) for click in wrong} <= {404, 422}
        assert saved(run) == []
        assert server.click("Ada", 0, "human", True, Origin=f"http://{server.host}") == 200
        assert len(saved(run)) == 1


def test_long_and_broken_requests_are_refused_with_a_short_reply(run):
    with serving(run, "--samples", "4") as server:
        click = {"rater": "Ada", "position": 0, "aspect": "human", "value": True}
        for body in (
            *(click | {name: "x" * 3000} for name in click),
            *(click | {name: "\ud800"} for name in click),  # half of a surrogate pair
            *(click | {"rater": name} for name in ("\ud800Ada", "a\0b", "\u202eAda", {"a": ["b"] * 500})),
            click | {"\ud800": 1, "value": "\udfff"},
            *([["\ud800"]], "\ud800", None, 1e400, {"position": 10**999} | click | {"position": 10**300}),
        ):
            status, _, said = server.ask("POST", "/ratings", body)
            assert status in (400, 404, 422) and len(said) < 600, said
        for text in (b"[" * 4000, b"\xff\xfe", b"1" * 4000, b"{", b"\xed\xa0\x80"):
            connection = http.client.HTTPConnection(server.host, timeout=30)
            connection.request("POST", "/ratings", text, {"Content-Type": "application/json"})
            reply = connection.getresponse()
            assert reply.status in (400, 422) and len(reply.read()) < 600
        for path in (
            f"/items?rater={'x' * 5000}",
            "/items",
            "/items/x?rater=Ada",
            f"/items/{9**999}",
        ):
            status, _, said = server.ask("GET", path)
            assert status in (404, 422) and len(said) < 600, said
        assert saved(run) == [] and server.click("Ada", 0, "human", True) == 200
        server.process.send_signal(signal.SIGINT)
        assert "Traceback" not in server.process.stderr.read()


@pytest.mark.parametrize("how", ["length", "padded length", "chunked"])
def test_a_long_body_is_refused_before_it_is_read(run, how):
    with serving(run, "--samples", "4") as server:
        connection = http.client.HTTPConnection(server.host, timeout=30)
        connection.putrequest("POST", "/ratings")
        connection.putheader("Content-Type", "application/json")
        if how == "chunked":
            connection.putheader("Transfer-Encoding", "chunked")
        else:
            connection.putheader("Content-Length", "60000000".zfill(20 if how == "padded length" else 8))
        connection.endheaders()
        reply = connection.getresponse()  # nothing of the body has been sent
        assert reply.status in (400, 411, 413) and len(reply.read()) < 100


def test_the_selection_is_seeded_balanced_and_without_what_pa_left_out(run):
    files = run / "PA_L_chartVQA.json", run / "PI_L_train_L_S_1_chartVQA.json"
    by_set = ratings.pools(*files, set(), {}, None)
    assert {name: len(items) for name, items in by_set.items()} == {"before": 7, "after": 4}
    assert ratings.select(by_set, 3, 0) == ratings.select(by_set, 3, 0) != ratings.select(by_set, 3, 1)
    items = ratings.select(by_set, 3, 0)
    assert sorted(item.set for item in items) == ["after"] * 3 + ["before"] * 3
    assert [item.set for item in items] != sorted(item.set for item in items)
    held_out = {by_set["before"][0].image}
    assert len(ratings.pools(*files, held_out, {}, None)["before"]) == 6


def test_table_4_is_what_the_raters_said_with_kappa(run):
    by_set = ratings.pools(run / "PA_L_chartVQA.json", run / "PI_L_train_L_S_1_chartVQA.json", set(), {}, None)
    items = ratings.select(by_set, 4, 0)
    store = ratings.Ratings(RunFiles(run, CELL).ratings, CELL, items, by_set, 4, 0)
    for i, item in enumerate(items):
        store.add("Ada", i, "correct", item.set == "before")
        store.add("Ada", i, "correct", item.set == "after")  # the last click counts
        if i < 7:
            store.add("Бо", i, "correct", item.set == "after" and i > 0)
    store.close()
    done = python("tables.py", run, "--table", "ratings", "--format", "csv")
    lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
    rows = {row["rated"]: row for row in csv.DictReader(lines)}
    row = rows["answer correct"]
    assert (row["dataset"], row["L-VLM"], row["S-VLM"], row["raters"], row["items"]) == (
        "chartVQA",
        "L",
        "S_1",
        "2",
        "4 + 4",
    )
    disagree = items[0].set == "after"
    after = 100 * (1 - 0.5 * disagree / 4)
    assert float(row["D_PI, after PI"]) == pytest.approx(after)
    assert float(row["not kept by PI"]) == 0
    assert float(row["D_PA, before PI"]) == pytest.approx(after * 4 / 11, abs=1e-3)  # 4 of the 11 are in D_PI
    assert float(row["change"]) == pytest.approx(after * 7 / 11, abs=1e-3)
    yes = sum(item.set == "after" for item in items[:7])
    observed, chance = (7 - disagree) / 7, (yes * (yes - disagree) + (7 - yes) * (7 - yes + disagree)) / 49
    assert float(row["kappa"]) == pytest.approx((observed - chance) / (1 - chance), abs=1e-3)
    assert "7 of 8 items" in row["notes"]
    n0, n1 = (7 - yes) * 2 + disagree, yes * 2 - disagree  # of the items that both rated
    assert float(row["alpha"]) == pytest.approx(1 - 13 * 2 * disagree / (2 * n0 * n1), abs=1e-3)
    assert row["alpha, items"] == "7" and float(row["alpha low"]) <= float(row["alpha"]) <= float(row["alpha high"])
    assert (row["before, paper"], row["after, paper"]) == ("68", "84")
    assert rows["answerable"]["D_PI, after PI"] == "" and rows["answerable"]["after, paper"] == "92"


def test_a_stray_name_with_two_clicks_does_not_turn_the_agreement_of_the_others(run):
    by_set = ratings.pools(run / "PA_L_chartVQA.json", run / "PI_L_train_L_S_1_chartVQA.json", set(), {}, None)
    items = ratings.select(by_set, 4, 0)
    store = ratings.Ratings(RunFiles(run, CELL).ratings, CELL, items, by_set, 4, 0)

    def agreement() -> dict:
        done = python("tables.py", run, "--table", "ratings", "--format", "csv")
        lines = [line for line in done.stdout.splitlines() if not line.startswith("#")]
        return next(row for row in csv.DictReader(lines) if row["rated"] == "answerable")

    for i in range(8):
        store.add("Ada", i, "answerable", i % 2 == 0)
        store.add("Bo", i, "answerable", i % 2 == 0 or i > 5)
    before = agreement()
    for i in range(2):
        store.add("bo", i, "answerable", i % 2 == 1)
    store.close()
    after = agreement()
    assert (after["alpha, items"], after["raters"], before["raters"]) == ("8", "3", "2")
    assert after["kappa"] == before["kappa"] and "Without bo." in after["notes"]
    assert 0 < float(after["alpha"]) < float(before["alpha"])


def test_ratings_of_another_selection_are_not_mixed_and_choices_are_asked_for(run):
    by_set = ratings.pools(run / "PA_L_chartVQA.json", run / "PI_L_train_L_S_1_chartVQA.json", set(), {}, None)
    store = ratings.Ratings(RunFiles(run, CELL).ratings, CELL, ratings.select(by_set, 4, 0), by_set, 4, 0)
    store.add("Ada", 0, "human", True)
    with pytest.raises(records.InputError, match=r"another rate\.py serves"):
        rate.main([str(run), "--samples", "4", "--port", "0"])
    store.close()
    with pytest.raises(records.InputError, match="begun with another seed, content"):
        rate.main([str(run), "--samples", "4", "--seed", "1", "--port", "0"])
    other = run / "PI_L_train_L_T_chartVQA.json"
    records.write_result(other, [], {}, model_path_lvlm="L", model_path_svlm="T")
    with pytest.raises(records.InputError, match=r"2 parity sets; choose one: .*--svlm S_1; .*--svlm T"):
        rate.main([str(run)])
    with pytest.raises(records.InputError, match="PI kept 0"):
        rate.main([str(run), "--svlm", "hub/T"])
    (run.parent / "3.png").write_text("root:x:0:0")
    with pytest.raises(records.InputError, match=r"3.png: cannot be read .*--image-root"):
        rate.main([str(run), "--svlm", "S_1"])


def test_a_broken_ratings_file_is_named_by_its_line(run):
    file = RunFiles(run, CELL).ratings
    file.write_text('{"rater": "Ada", "question_id": "1", "set": "during", "aspect": "human", "value": true}\n')
    with pytest.raises(records.InputError, match=r"chartVQA.jsonl, line 1: not a rating"):
        ratings.latest(file)
    done = python("tables.py", run)
    assert done.returncode == 1 and "meta" in done.stderr
