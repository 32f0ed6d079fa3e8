"""scripts/show.py: samples in the terminal."""

import answered_runs
from conftest import python


def test_a_real_run(easy_run):
    shown = python("show.py", easy_run, "-n", "2", "--rejected")
    assert shown.returncode == 0 and shown.stdout.count("verdict") == 2
    missing = python("show.py", easy_run, "--fixed")
    assert missing.returncode == 1 and "Run evaluate.sh first" in missing.stderr


def test_no_control_characters_are_shown(tmp_path):
    texts = ["\x1b[31mred\x1b]0;title\x07", "[bold]markup[/bold]", "nul \0"]
    answered_runs.whole(tmp_path / "run", tmp_path / "images", texts, n=3)
    done = python("show.py", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout and "[bold]markup[/bold]" in done.stdout
    broken = python("show.py", tmp_path / "run", "--broken", "-n", "1")
    assert broken.returncode == 0 and "change" in broken.stdout
