"""The study of bad inputs: its verdicts by hand, and a few of its cases as they are run."""

from pathlib import Path

import bad_inputs
import processes
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
        (2, "error: lr is nan\n" + "usage\n" * 12, [], "unhelpful"),
        (2, f"error: lr is {'9' * 5000}\n", [], "unhelpful"),
    ],
)
def test_verdicts(code, output, lost, verdict):
    assert bad_inputs.judge(CASE, code, output, lost)[0] == verdict


def test_verdict_of_a_run_that_went_on_to_another_model():
    assert [bad_inputs.judge(CASE, code, "lr", [], same=False)[0] for code in (0, 2)] == ["wrong exit code", "unhelpful"]
    fine = CASE._replace(code=(0, 2))
    assert [bad_inputs.judge(fine, 0, "lr", [], same)[0] for same in (True, False)] == ["good", "wrong model"]


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
    tools = [f"tests/tools/{name}.py" for name in ("on_policy", "answers", "will_it_fit", "toy", "clean")]
    studies = [f"tests/studies/{name}.py" for name in ("diversify", "lorr", "tr_dpo")]
    assert len({case.name for case in cases}) == len(cases)
    assert files == {"train.py", "data.py", "distributed.py", *tools, *studies}


def test_cases_run_and_what_is_not_good_is_told(tmp_path):
    """Three good ones; a command that is fine, so that its exit code is 0; a rule that destroys a file; and a run that goes on
    from other weights than its own."""
    script = tmp_path / "cases.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(STUDY.parent)!r})
from bad_inputs import Case, SCORE, SHOW, STOPPED, all_cases, main, write
cases = [case for case in all_cases() if case.name in {GOOD!r}]
rule = "def f(row, response):\\n    open('pairs.jsonl', 'w')\\n    raise ValueError\\n"
cases += [Case("fine", SHOW + " pairs.jsonl"), Case("harm", SCORE + " --rule harm.py:f", "harm", write("harm.py", rule))]
def other(folder):
    place = folder / "stopped" / "checkpoints"
    for name in ("complete", "shard-00001-model-00001-of-00001.safetensors"):
        (place / "step-000004" / name).unlink()
    import json, shutil, zlib
    shutil.copy(next((place / "step-000002").glob("*.safetensors")), place / "step-000004")
    files = {{p.name: p.read_bytes() for p in (place / "step-000004").iterdir()}}
    sums = {{name: [len(text), zlib.crc32(text)] for name, text in files.items()}}
    (place / "step-000004" / "complete").write_text(json.dumps(sums))
cases += [Case("other", STOPPED, "", other, (0,), ("stopped/*",), model="stopped/model")]
sys.exit(main(["--jobs", "2"], cases))
""")
    done = processes.run([str(script)], tmp_path)
    assert done.code == 1, done.err
    lines = done.out.splitlines()
    assert lines[-1] == "6 cases: 3 good, 1 file lost, 1 wrong exit code, 1 wrong model"
    told = [tuple(line.strip("| ").split(" | ")[:2]) for line in lines[2:5]]
    assert told == [("fine", "wrong exit code"), ("harm", "file lost"), ("other", "wrong model")]
    assert "exit code 0" in lines[2] and "pairs.jsonl" in lines[3]
