"""The study of bad inputs: its verdicts by hand, and a few of its cases as they are run."""

import re
import subprocess
import sys
from pathlib import Path

import bad_inputs
import pytest
from bad_inputs import Case

STUDY = Path(bad_inputs.__file__)
GOOD = ("objective: unknown", "settings: lr ten", "data.py: an unknown command")
CASE = Case("a case", "train.py --lr nan", "lr")


@pytest.mark.parametrize(
    "code, output, lost, verdict",
    [
        (2, "settings: …\nerror: lr is nan\n", [], "good"),
        (None, "error: lr is nan\n", [], "hang"),
        (2, "Traceback (most recent call last):\nValueError: lr\n", [], "traceback"),
        (2, "error: lr is nan\n", ["thesis.txt"], "file lost"),
        (1, "error: lr is nan\n", [], "wrong exit code"),
        (-11, "", [], "wrong exit code"),
        (2, "error: a number is wrong\n", [], "unhelpful"),
        (2, "lr is nan\n", [], "unhelpful"),
        (2, "lr\nerror: a number is wrong\n", [], "unhelpful"),
        (2, "error: lr is nan\n" + "usage\n" * 4, [], "unhelpful"),
        (2, f"error: lr is {'9' * 5000}\n", [], "unhelpful"),
    ],
)
def test_verdicts(code, output, lost, verdict):
    assert bad_inputs.judge(CASE, code, output, lost)[0] == verdict


def test_a_snapshot_knows_what_changed_and_what_went(tmp_path):
    for name in ("kept", "changed", "gone"):
        (tmp_path / name).write_text("x")
    (tmp_path / "link").symlink_to("nowhere")
    before = bad_inputs.snapshot(tmp_path)
    (tmp_path / "changed").write_text("y")
    (tmp_path / "gone").unlink()
    (tmp_path / "new").mkdir()
    after = bad_inputs.snapshot(tmp_path)
    assert {name for name in before if before[name] != after.get(name)} == {"changed", "gone"}


def test_names_are_different_and_commands_are_of_the_project():
    cases = bad_inputs.all_cases()
    files = {bad_inputs.words(case.command)[0] for case in cases if not case.shell}
    assert len({case.name for case in cases}) == len(cases) and files == {"train.py", "data.py", "distributed.py"}


def test_cases_run_and_what_is_not_good_is_told():
    """Three good ones; one of a setting that is fine, so that its exit code is 0; one whose file a rule destroys."""
    script = f"""
import sys
sys.path.insert(0, {str(STUDY.parent)!r})
from bad_inputs import Case, SCORE, SHOW, all_cases, main, write
cases = [case for case in all_cases() if case.name in {GOOD!r}]
rule = "def f(row, response):\\n    open('pairs.jsonl', 'w')\\n    raise ValueError\\n"
cases += [Case("fine", SHOW + " pairs.jsonl"), Case("harm", SCORE + " --rule harm.py:f", "harm", write("harm.py", rule))]
sys.exit(main(["--jobs", "2"], cases))
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert lines[-1] == "5 cases: 3 good, 1 file lost, 1 wrong exit code"
    assert [re.split(r" \| ", line.strip("| "))[:2] for line in lines[2:4]] == [
        ["fine", "wrong exit code"],
        ["harm", "file lost"],
    ]
    assert "exit code 0" in lines[2] and "pairs.jsonl" in lines[3]
