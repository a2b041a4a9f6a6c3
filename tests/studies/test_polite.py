"""The search for a rate and the tables by hand, and the whole study on an untrained model and the toy task's pairs."""

import json

import miniature
import polite
import pytest
from test_alpha_dpo import InThisProcess


def run_of(lr: float, loss: float, **job) -> dict:
    """Two evaluations: accuracy ½ before; after a step 0.75, margin 0.3."""
    before = {"step": 0, "eval_loss": 0.7, "eval_reward_accuracy": 0.5, "eval_reward_margin": 0.0}
    before |= {"eval_logp_w_per_token": -2.0, "eval_logp_l_per_token": -2.5}
    after = {**before, "step": 20, "eval_loss": loss, "eval_reward_accuracy": 0.75, "eval_reward_margin": 0.3}
    after |= {"eval_reward_accuracy_se": 0.04, "eval_reward_margin_se": 0.01, "eval_logp_l_per_token": -3.0}
    job = {"objective": "dpo(beta=0.1)", "lr": lr, "batch_size": 16} | job
    return {
        "job": job,
        "curve": [before, after],
        "answers": [["p", "c\nd"]],
        "kl": [1.0, 3.0],
        "minutes": 2.0,
        "gib": 3.5,
    }


FAILED = {"job": {"objective": "dpo(beta=0.1)", "lr": 1e-3}, "error": "not finite"}


@pytest.mark.parametrize(
    "runs, rate",
    [
        ([(1e-5, 0.6), (3e-5, 0.5), (1e-4, 0.7)], None),
        ([(1e-5, 0.6), (3e-5, 0.5), (1e-4, 0.4)], 3e-4),  # 1e-4 · 10/3
        ([(1e-5, 0.3), (3e-5, 0.5), (1e-4, 0.4)], 3e-6),  # 1e-5 / 3
        ([(1e-5, 0.3)], None),
    ],
)
def test_a_rate_beyond_an_end(runs, rate):
    assert polite.beyond([run_of(*run) for run in runs]) == rate


def test_the_best_rate_keeps_the_chosen_responses_likely():
    """Half a nat per token less is too much, however low the loss."""
    runs = [run_of(1e-5, 0.6), run_of(3e-5, 0.5), run_of(1e-4, 0.4), FAILED]
    runs[2]["curve"][1]["eval_logp_w_per_token"] = -2.5
    assert polite.lowest(runs) is runs[2] and polite.best_of(runs) is runs[1]
    assert polite.best_of(runs[2:]) is None


def test_an_epoch_that_spoils_takes_the_next_lower_rate(monkeypatch):
    """dpo's epochs lose too much above 1e-5, kto's nowhere, orpo's everywhere; ipo has no rate that a search could take."""
    monkeypatch.setattr(polite, "ARMS", {name: name for name in ("dpo", "kto", "orpo", "ipo")})
    allowed = {"dpo": 1e-5, "kto": 1.0, "orpo": 0.0}

    def run_all(groups):
        found = {}
        for name, (job,) in groups.items():
            run = run_of(job["lr"], 0.5)
            run["curve"][1]["eval_logp_w_per_token"] -= 0.6 * (job["lr"] > allowed[name])
            found[name] = [run]
        return found

    rates = [run_of(1e-5, 0.6), run_of(3e-5, 0.5), run_of(1e-4, 0.4)]
    tried = polite.settle(polite.Study("x"), {"dpo": rates, "kto": rates, "orpo": rates, "ipo": [FAILED]}, run_all)
    assert tried == {"dpo": [1e-4, 3e-5, 1e-5], "kto": [1e-4], "orpo": [1e-4, 3e-5, 1e-5]}


def test_a_run_that_ended_early_is_an_end_too():
    assert polite.beyond([run_of(1e-4, 0.6), run_of(3e-4, 0.5), FAILED]) is None and polite.beyond([FAILED]) is None


def test_search_goes_on_until_the_best_is_inside(monkeypatch):
    """A loss that is lowest at 3e-6; one that falls without end gets MORE rates."""
    lowest = {"dpo": 3e-6, "kto": 1.0}
    monkeypatch.setattr(polite, "ARMS", {"dpo": "dpo(beta=0.1)", "kto": "kto(beta=0.1)"})

    def run_all(groups):
        return {name: [run_of(job["lr"], abs(job["lr"] - lowest[name])) for job in jobs] for name, jobs in groups.items()}

    found = polite.search(polite.Study("x"), run_all)
    assert [run["job"]["lr"] for run in found["dpo"]] == [1e-5, 3e-5, 1e-4, 3e-6, 9e-7]
    assert [run["job"]["lr"] for run in found["kto"]] == [1e-5, 3e-5, 1e-4, 3e-4, 9e-4, 3e-3]


def test_tables_by_hand():
    """Two seeds whose prompts' KL are 1 and 3: mean 2, standard error √2/√2 = 1. A margin of 0.3 is 3 without β."""
    runs = {"dpo": [run_of(1e-5, 0.5), run_of(1e-5, 0.6, seed=1)]}
    cells = polite.table(runs).splitlines()[2].split(" | ")
    assert cells[:4] == ["| `dpo(beta=0.1)`", "1e-05", "0.500", "0.750 ± 0.040 (0.750–0.750)"]
    assert cells[4:7] == ["0.300 ± 0.010 (0.300–0.300)", "0.7000", "0.5500"]
    assert cells[7:] == ["-2.00 → -2.00", "-2.50 → -3.00", "2.00 ± 1.00", "2.0 |"]
    answers = polite.answers_table([["p", "a|b"]], runs["dpo"][:1]).splitlines()[2:]
    assert answers == ["| p | before | a\\|b |", "|  | `dpo(beta=0.1)`, lr 1e-05 | c d |"]
    searched = polite.rates_table({"dpo": [run_of(1e-5, 0.5), run_of(3e-5, 0.4), FAILED]}).splitlines()
    assert searched[0] == "| held-out loss at lr | 1e-05 | 3e-05 | 1e-03 |"
    assert searched[2] == "| `dpo(beta=0.1)` | 0.5000 (+0.00) | **0.4000 (+0.00)** | ended early |"
    curve = polite.curve_table(runs["dpo"][0]).splitlines()
    assert curve[4] == "| 0 | 0 | 0.7000 | 0.500 | 0.000 | -2.000 | -2.500 |"
    assert curve[5] == "| 20 | 320 | 0.5000 | 0.750 ± 0.040 | 3.000 | -2.000 | -3.000 |"
    assert "not finite" in polite.curve_table(FAILED)


@pytest.fixture
def made_small(monkeypatch):
    monkeypatch.setattr(miniature, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(polite, "ARMS", {"dpo": "dpo(beta=0.1)", "kto": "kto(beta=0.5)"})
    monkeypatch.setattr(polite, "MORE", 1)
    monkeypatch.setattr(polite, "TOKENS", 4)


def test_the_whole_study_and_its_resumption(made_small, small, tmp_path, monkeypatch, capsys):
    """What is finished stays, byte for byte."""
    rows, out = str(small / "pairs.jsonl"), tmp_path / "out"
    line = ["--model", str(small / "model"), "--out", str(out), "--dataset", f"{rows}[:32]", "--eval-dataset", f"{rows}[32:40]"]
    line += ["--rates", "1e-3", "3e-3", "--seeds", "2", "--hh", f"{rows}[:220]"]
    done = polite.main(line)
    assert all(len(done["searched"][name]) == 3 and len(done["seeds"][name]) == 2 for name in ("dpo", "kto"))
    run = done["seeds"]["dpo"][0]
    assert (
        [line["step"] for line in run["curve"]] == [0, 2] and len(run["answers"]) == len(run["kl"]) == 8 and min(run["kl"]) > 0
    )
    held_out = [json.loads(text) for text in (small / "pairs.jsonl").read_text().splitlines()[32:40]]
    assert [prompt for prompt, _ in run["answers"]] == [row["prompt"][0]["content"] for row in held_out]
    assert done["seeds"]["dpo"][0]["curve"] != done["seeds"]["dpo"][1]["curve"]  # another seed is another order
    assert [run["job"]["lr"] for run in done["public"]] == [5e-6, 3e-5]
    assert done["public"][0]["job"]["objective"] == polite.PUBLIC and done["hh"][0]["job"]["epochs"] == 3
    table = (out / "table.md").read_text()
    assert table in capsys.readouterr().out and table.count("\n| `dpo(beta=0.1)` |") == 2
    kept = (out / "runs.jsonl").read_bytes()
    assert len(kept.splitlines()) == 2 * (3 + 2) + 2 + 1 and "error" not in json.loads(kept.splitlines()[0])
    with monkeypatch.context() as patch:
        patch.setattr(polite, "experiment", lambda out, job: pytest.fail(f"run again: {job}"))
        polite.main([*line, "--resume"])
    assert (out / "runs.jsonl").read_bytes() == kept and (out / "table.md").read_text() == table


def test_refused_epochs_stand_in_a_table_of_their_own(made_small, small, tmp_path, monkeypatch):
    """An epoch above 1e-3 is refused by decree: the best rate is 1e-3, and every refused one is trained once."""
    monkeypatch.setattr(polite, "kept", lambda run: "max_steps" in run["job"] or run["job"]["lr"] <= 1e-3)
    rows = str(small / "pairs.jsonl")
    line = ["--model", str(small / "model"), "--out", str(tmp_path / "out"), "--dataset", f"{rows}[:32]"]
    line += ["--eval-dataset", f"{rows}[32:40]", "--arms", "dpo", "--rates", "1e-3", "3e-3", "--seeds", "2"]
    done = polite.main(line)
    searched = done["searched"]["dpo"]
    least = polite.lowest(searched)["job"]["lr"]
    assert least > 1e-3  # else there is nothing to refuse
    assert [run["job"]["lr"] for run in done["seeds"]["dpo"]] == [1e-3, 1e-3]
    refused = [run["job"]["lr"] for run in searched if 1e-3 < run["job"]["lr"] <= least]
    assert list(done["spoilt"]) == [("dpo", lr) for lr in sorted(refused)]
    jobs = (tmp_path / "out" / "runs.jsonl").read_text().splitlines()
    assert len(jobs) == len(searched) + 2 + len(refused) + 2  # of the seeds, and beside the public log


def test_a_run_that_ends_early_says_why(small, tmp_path):
    job = polite.job_of(polite.Study(str(small / "model"), dataset="none.jsonl"), "dpo(beta=0.1)", 1e-3)
    result = polite.experiment(tmp_path, job)
    assert result["job"] == job and "none.jsonl" in result["error"] and set(result) == {"job", "error"}


def test_refuses_what_cannot_be_meant(made_small, small, tmp_path, capsys):
    rows = str(small / "pairs.jsonl")
    for changes, said in (
        (["--arms", "dop"], "arms is 'dop'; accepted are dpo"), (["--rates", "1e-5", "0"], "rates are [1e-05, 0.0]"),
        (["--seeds", "0"], "seeds is 0"), (["--dtype", "fp16"], "dtype is 'fp16'"),
        (["--model", str(tmp_path / "none")], "none: no such file or folder"),
        (["--dataset", str(tmp_path / "none.jsonl")], "none.jsonl"), (["--hh", str(tmp_path / "no.jsonl")], "no.jsonl"),
        (["--out", str(small)], "already holds"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            polite.main(["--model", str(small / "model"), "--dataset", rows, "--eval-dataset", rows,
                         "--out", str(tmp_path / "out"), *changes])  # fmt: skip
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and "Traceback" not in error, (changes, error)
    assert not (tmp_path / "out").exists()


def test_the_picture_names_each_objective_at_its_end(tmp_path, monkeypatch):
    pytest.importorskip("matplotlib")
    named, name_points = [], miniature.name_points
    monkeypatch.setattr(miniature, "name_points", lambda axis, points: (named.append(points), name_points(axis, points)))
    polite.draw({"dpo": [run_of(1e-5, 0.5), run_of(1e-5, 0.6)], "kto": [run_of(1e-5, 0.5)]}, tmp_path / "polite.png")
    assert [points["dpo"][:2] for points in named] == [(320, 0.75), (320, 0.0), (320, -0.5)]  # -3.0 after -2.5
    assert (tmp_path / "polite.png").stat().st_size > 10_000
