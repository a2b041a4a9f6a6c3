"""The comparison and the sweeps: what is run, what is chosen, what is written, and that nothing is run twice.

Runs are made up where only their results matter; the real ones are of 2 steps on a small toy task.
"""

import json
import math
import multiprocessing
import subprocess
import sys
import time
from dataclasses import asdict, fields
from pathlib import Path

import lorr
import miniature
import processes
import pytest
import torch
from miniature import GRID, MEASURES, SWEEPS

import train
from losses import OBJECTIVES

ALWAYS = {".lock", "run.json", "settings.json"}  # in the folder of a study


@pytest.fixture
def made_up(monkeypatch) -> list[dict]:
    """Instead of runs, results that follow from the job; the list of jobs that were asked for."""
    asked = []

    def run(job):
        asked.append(job)
        if job["objective"] == "simper":
            return {"job": job, "error": "the loss is not finite"}
        rate = 0.5 + 100 * job.get("lr", 0) * ("0.5" in job["objective"])
        measures = dict.fromkeys(MEASURES, 1.0) | {"win_rate": rate + 0.01 * (job["seed"] % 100)}
        return {"job": job, **measures, "start": dict.fromkeys(MEASURES, 0.5)}

    monkeypatch.setattr(miniature, "run_jobs", lambda jobs, file, work=None: [run(job) for job in jobs])
    return asked


def test_comparison(tmp_path, made_up, capsys):
    """Six rates of each setting in the first world, the best quarter in the second, of these a quarter in the third; the best
    mean goes on to every seed. A run that ended early has won nothing and is a dash; nothing is run twice."""
    line = ["--compare", "dpo", "simper", "--sweeps", "gamma", "--seeds", "3", "--out", str(tmp_path / "out"), "--epochs", "2"]
    done = miniature.main(line)
    assert all(job["epochs"] == 2 and "batch_size" not in job for job in made_up)
    counts = [[job["seed"] for job in made_up].count(seed) for seed in miniature.TUNING_SEEDS]
    assert counts == [3 * 6 + 6, 5 + 2, 2 + 1] and len(made_up) == sum(counts) + 2 * 3 + 5 * 3
    assert (miniature.tuning_runs(3), miniature.tuning_runs(1)) == (18 + 5 + 2, 6 + 2 + 1)
    assert done["best"]["dpo"]["objective"] == "dpo(beta=0.5)" and done["best"]["dpo"]["lr"] == 3.2e-3
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    # 0.5 + 0.32 + 0, 0.01, 0.02: mean 83 %, standard error 1/√3 = 0.6 %
    assert table[3].startswith("| `dpo(beta=0.5)` | 0.0032 | 25 | 83.0 ± 0.6 |") and table[4].startswith(
        "| `simper` | 0.0001 | 9 | – |"
    )
    assert table[6] == "The best learning rate is at an edge of the grid for 2 of 2: dpo, simper."
    assert "\n".join(table) in capsys.readouterr().out
    pictures = {"length.png", "drift.png", "kl.png", "sweep-gamma.png"}
    assert {p.name for p in (tmp_path / "out").iterdir()} == ALWAYS | pictures | {"sweep-gamma.md", "table.md"}


def test_sweep_table(tmp_path, made_up):
    """A line for every value of every series, in order; nothing is tuned, and the learning rate is the toy task's own."""
    miniature.main(["--sweeps", "alpha", "--seeds", "2", "--out", str(tmp_path / "out"), "--annotator-noise", "0.5"])
    title, values, series = SWEEPS["alpha"]
    table = (tmp_path / "out" / "sweep-alpha.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in table[2:]] == [[f"| {label}", f"{x:g}"] for label in series for x in values]
    # win rates 0.5 and 0.51 of seeds 0 and 1: mean 50.5 %, standard error 1 %/√2·1/√2 = 0.5 %
    assert title in table[0] and table[2].startswith("| alpha_dpo | 0 | 50.5 ± 0.5 | 1.0 ± 0.0 | 1.00 ± 0.00 |")
    assert [job["seed"] for job in made_up] == [0, 1] * 10 and all(job["annotator_noise"] == 0.5 for job in made_up)
    assert not any("lr" in job for job in made_up)
    assert {p.name for p in (tmp_path / "out").iterdir()} == ALWAYS | {"sweep-alpha.md", "sweep-alpha.png"}


def test_where_every_run_ended_early(tmp_path, made_up):
    """Dashes, and no picture of nothing."""
    miniature.main(["--compare", "simper", "--seeds", "1", "--out", str(tmp_path / "out")])
    assert (tmp_path / "out" / "table.md").read_text().splitlines()[3] == "| `simper` | 0.0001 | 9 |" + " – |" * len(MEASURES)
    assert {p.name for p in (tmp_path / "out").iterdir()} == ALWAYS | {"table.md"}


def test_a_job_holds_what_differs_from_the_default(tmp_path):
    """And no setting that is the study's own; so the jobs of an earlier comparison are found again."""
    default = miniature.Study()
    line = ["--compare", "simpo", "--seeds", "2", "--cache", "here", "--length-bias", "0.5", "--lr", "1", "--seed", "7"]
    s = miniature.parse([*line, "--annotator-noise", str(default.annotator_noise), "--out", "there"])
    assert miniature.common_settings(s) == {"world": "plain", "cache": "here", "length_bias": 0.5}
    assert s.seeds == 2 and s.lr == 1.0


def test_settings_are_those_of_the_trainer_three_of_the_task_and_four_more(tmp_path):
    more = {f.name for f in fields(miniature.Study)} - {f.name for f in fields(train.Settings)}
    assert more == {"annotator_noise", "length_bias", "world", "compare", "sweeps", "paper", "seeds"}
    (tmp_path / "s.yaml").write_text("model: m\ndataset: d\nepochs: 3\nmax-steps: 5\n")
    s = miniature.parse([str(tmp_path / "s.yaml"), "--sweeps", "alpha", "gamma", "--max-steps", "6"])
    assert (s.epochs, s.max_steps, s.sweeps, s.compare, s.seeds) == (3, 6, ["alpha", "gamma"], None, 5)


def test_jobs_are_run_once(small_task, tmp_path, monkeypatch):
    """Two real runs in processes of their own, forks of this one, and one that ends early; a second call finds all in the
    file."""
    monkeypatch.setattr(miniature.multiprocessing, "get_context", lambda _, of=multiprocessing.get_context: of("fork"))
    job = small_task | {"max_steps": 2}
    changes = {"objective": "simpo"}, {"objective": "sft", "lr": 1e-2}, {"objective": "simpo(tau=1.0)", "lr": 1e-3}
    jobs = [job | change for change in changes]
    results = miniature.run_jobs(jobs, tmp_path / "runs.jsonl")
    assert [x["job"] for x in results] == jobs and "no argument 'tau'" in results[2]["error"]
    for result in results[:2]:
        assert set(result) == {"job", "start", "seconds", *MEASURES} and result["start"]["win_rate"] == 0.5
        assert set(result["start"]) == set(MEASURES) - {"chosen", "rejected"}
    assert [name for name in MEASURES if math.isnan(results[1][name])] == ["rejected"]  # sft scores none
    assert results[0]["start"] == results[1]["start"] and results[0]["chosen"] != results[1]["chosen"]
    assert all(math.isfinite(results[0][name]) for name in MEASURES)
    with open(tmp_path / "runs.jsonl", "a") as f:
        f.write('{"job": {"mod')  # killed while it wrote
    text = (tmp_path / "runs.jsonl").read_text()
    again = miniature.run_jobs(jobs[::-1], tmp_path / "runs.jsonl")
    assert json.dumps(again) == json.dumps(results[::-1]) and (tmp_path / "runs.jsonl").read_text() == text


STUDY = """
import os, sys, time
from pathlib import Path
sys.path.insert(0, {folder!r})
import miniature

def work(job):
    Path({pid!r}).write_text(str(os.getpid()))
    time.sleep(600)

if __name__ == "__main__":
    miniature.run_jobs([{{"seed": 0}}], Path({pid!r} + ".jsonl"), work)
"""


def test_a_killed_study_leaves_no_process_behind(tmp_path):
    pid = tmp_path / "pid"
    (tmp_path / "study.py").write_text(STUDY.format(folder=str(Path(miniature.__file__).parent), pid=str(pid)))
    study = subprocess.Popen([sys.executable, str(tmp_path / "study.py")], stderr=subprocess.DEVNULL)
    wait_until(lambda: pid.exists() and pid.read_text())
    worker = Path("/proc", pid.read_text())
    assert worker.exists()
    study.kill()
    study.wait()
    wait_until(lambda: not worker.exists())


def wait_until(true, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_every_call_of_the_grid_and_the_sweeps_is_understood():
    assert set(GRID) == set(OBJECTIVES)
    for name, texts in GRID.items():
        for text in texts:
            train.try_objective(train.parse_objective(text))
            assert train.parse_objective(text).name == name
    for _, values, series in SWEEPS.values():
        for change in series.values():
            for x in values:
                of_trainer = {k: v for k, v in change(x).items() if k not in miniature.OF_THE_TASK}
                kind = lorr.Settings if "replays" in of_trainer else train.Settings
                s = kind(**{"model": "m", "dataset": "d", "lr": 1e-4, **of_trainer})
                train.check_settings(s)
                train.try_objective(train.parse_objective(s.objective))


BAD = {
    "nothing to do": ([], ["nothing to do", "--compare", "--sweeps", "alpha, gamma, length"]),
    "a real model": (
        ["--compare", "dpo", "--model", "m", "--dataset", "d"],
        ["trains on tasks that it builds, without --model"],
    ),
    "a real dataset": (["--compare", "dpo", "--dataset", "d"], ["model is missing"]),
    "unknown paper": (["--paper", "x"], ["paper", "'x'", "alpha_dpo"]),
    "unknown sweep": (["--sweeps", "x"], ["unknown sweep 'x'", "alpha, gamma, length"]),
    "unknown objective": (["--compare", "dpo", "simp"], ["unknown objective 'simp'", "simpo"]),
    "a call out of range": (["--compare", "dpo(beta=0.0)"], ["beta"]),
    "no seeds": (["--compare", "dpo", "--seeds", "0"], ["seeds is 0", "at least 1"]),
    "a bad setting of the task": (["--compare", "dpo", "--annotator-noise", "-1"], ["annotator's noise is -1"]),
    "an unknown world": (["--compare", "dpo", "--world", "x"], ["world is 'x'", "plain, stock"]),
    "a bad setting of the trainer": (["--compare", "dpo", "--batch-size", "0"], ["batch_size is 0"]),
    "unknown setting": (["--compare", "dpo", "--seed-count", "3"], ["unknown setting --seed-count 3", "--help"]),
    "an out that holds files": (["--compare", "dpo", "--out", "OUT"], ["already holds files"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_end_with_a_message_and_code_2(tmp_path, capsys, made_up, name):
    line, expected = BAD[name]
    (tmp_path / "letter.txt").write_text("mine")
    with pytest.raises(SystemExit) as stop:
        miniature.main([str(tmp_path) if part == "OUT" else part for part in line])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(part in error for part in expected) and not made_up


def test_not_under_torchrun(monkeypatch, capsys, made_up):
    monkeypatch.setenv("RANK", "0")
    with pytest.raises(SystemExit) as stop:
        miniature.main(["--compare", "dpo"])
    assert stop.value.code == 2 and "torchrun" in capsys.readouterr().err and not made_up


@pytest.mark.parametrize("number", ["0", "two", ""])
def test_workers_is_a_number(monkeypatch, capsys, made_up, number):
    monkeypatch.setenv("WORKERS", number)
    with pytest.raises(SystemExit) as stop:
        miniature.main(["--compare", "dpo"])
    assert stop.value.code == 2 and f"WORKERS is '{number}'" in capsys.readouterr().err and not made_up


def test_the_command_line_itself(tmp_path):
    """As typed in a shell: the message on stderr, nothing on stdout, exit code 2."""
    done = processes.run([miniature.__file__, "--compare", "dpo", "--seeds", "0"], tmp_path)
    assert done.code == 2 and done.out == "" and done.err.startswith("error: seeds is 0")


def test_the_settings_file_of_a_study_says_all(tmp_path, made_up):
    line = ["--compare", "sft", "--seeds", "1", "--out", str(tmp_path / "out")]
    miniature.main(line)
    assert json.loads((tmp_path / "out" / "settings.json").read_text()) == asdict(miniature.parse(line))


def test_names_cover_neither_each_other_nor_points():
    """Forty points, half of them in a tenth of the width: the boxes that matplotlib itself gives the names are apart."""
    plt, text = pytest.importorskip("matplotlib.pyplot"), pytest.importorskip("matplotlib.text")
    at = torch.rand(40, 2, generator=torch.Generator().manual_seed(0))
    at[::2] = 0.5 + 0.1 * at[::2]
    figure, axis = plt.subplots(figsize=(9.5, 8))
    axis.plot(*at.T.numpy(), "o", ms=4)
    miniature.name_points(axis, {f"objective_{i}": (*at[i].tolist(), "C0") for i in range(40)})
    figure.draw_without_rendering()
    boxes = [text.Text.get_window_extent(name).shrunk(0.95, 0.7) for name in axis.texts]  # without the lines to the points
    dots = axis.transData.transform(at.numpy())
    plt.close(figure)
    assert len(boxes) == 40
    assert not [(i, j) for i in range(40) for j in range(i) if boxes[i].overlaps(boxes[j])]
    assert not [(i, j) for i in range(40) for j in range(40) if boxes[i].contains(*dots[j])]
