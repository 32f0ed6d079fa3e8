import json
import os
import subprocess
import sys

import pytest
from conftest import ROOT

from mpa.files.journal import Journal, finished
from mpa.files.records import InputError, write_result

SETTINGS = {"limit": 10, "model": "a"}


def lines(journal: Journal) -> list[dict]:
    return [json.loads(line) for line in journal.path.read_text().splitlines()]


def test_replies_come_back_and_none_is_kept_twice(tmp_path):
    journal = Journal(tmp_path / "PA.json", SETTINGS)
    journal.append([{"key": "1", "text": "a"}, {"key": "2", "text": "ü\n"}])
    journal.append([{"key": "2", "text": "other"}, {"key": "3", "text": "c"}])
    assert [entry.get("key") for entry in lines(journal)] == [None, "1", "2", "3"]
    journal.close()
    again = Journal(tmp_path / "PA.json", SETTINGS)
    assert [again[key]["text"] for key in "123"] == ["a", "ü\n", "c"]
    assert len(again) == 3
    with pytest.raises(KeyError):
        again["4"]


@pytest.mark.parametrize("torn", range(1, 40, 3))
def test_a_line_torn_anywhere_is_dropped_and_the_rest_is_whole(tmp_path, torn):
    journal = Journal(tmp_path / "PA.json", SETTINGS)
    journal.append([{"key": "1", "text": "a"}, {"key": "2", "text": "b" * 40}])
    journal.close()
    os.truncate(journal.path, journal.path.stat().st_size - torn)
    again = Journal(tmp_path / "PA.json", SETTINGS)
    assert ("1" in again, "2" in again, len(again)) == (True, False, 1)
    again.append([{"key": "2", "text": "b"}])
    assert [entry.get("key") for entry in lines(again)] == [None, "1", "2"]


def test_other_settings_are_refused_with_the_difference_named(tmp_path):
    Journal(tmp_path / "PA.json", SETTINGS).close()
    with pytest.raises(InputError, match="limit was 10, is now 20"):
        Journal(tmp_path / "PA.json", {**SETTINGS, "limit": 20})
    restarted = Journal(tmp_path / "PA.json", {**SETTINGS, "limit": 20}, restart=True)
    assert lines(restarted) == [{"settings": {**SETTINGS, "limit": 20}}]


def test_one_writer_at_a_time(tmp_path):
    journal = Journal(tmp_path / "PA.json", SETTINGS)
    with pytest.raises(InputError, match="another process"):
        Journal(tmp_path / "PA.json", SETTINGS, restart=True)
    journal.append([{"key": "1"}])
    journal.close()
    assert "1" in Journal(tmp_path / "PA.json", SETTINGS)


def test_a_result_counts_as_finished_only_with_the_same_settings(tmp_path):
    path = tmp_path / "PA.json"
    assert not finished(path, SETTINGS, restart=False)
    write_result(path, [], SETTINGS)
    assert finished(path, SETTINGS, restart=False)
    assert not finished(path, SETTINGS, restart=True)
    with pytest.raises(InputError, match="model was 'a', is now 'b'"):
        finished(path, {**SETTINGS, "model": "b"}, restart=False)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small disk needs root")
def test_a_full_disk_leaves_whole_lines(tmp_path):
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=32k", "tmpfs", tmp_path], capture_output=True)
    if mounted.returncode:
        pytest.skip("tmpfs cannot be mounted here")
    try:
        journal = Journal(tmp_path / "PA.json", SETTINGS)
        kept = 0
        with pytest.raises(OSError, match="No space left"):
            for kept in range(1000):
                journal.append([{"key": str(kept), "text": "x" * 500}])
        journal.close()
        again = Journal(tmp_path / "PA.json", SETTINGS)
        assert [again[str(i)]["key"] for i in range(kept)] == [str(i) for i in range(kept)]
        assert len(again) == kept
    finally:
        subprocess.run(["umount", "--lazy", tmp_path], check=True)


@pytest.mark.slow
def test_stages_killed_at_random_moments_lose_double_and_change_nothing():
    """A short version of benchmarks/faults.py, which does 200 kills."""
    done = subprocess.run(
        [sys.executable, ROOT / "benchmarks/faults.py", "--kills", "6"], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    figures = json.loads(done.stdout.splitlines()[-1])
    assert figures["kills"] >= 6
    assert (figures["differing"], figures["failed_calls"]) == (0, 0)
