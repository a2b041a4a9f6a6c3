"""The KL by enumeration, the table by hand, and the whole study on an untrained model with a made-up reward."""

import itertools
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import frontier
import miniature
import pytest
import torch
from frontier import ARMS, TEMPLATES, THINGS
from test_alpha_dpo import InThisProcess
from transformers import LlamaConfig, LlamaForCausalLM

import train
from data import Example, UserError
from logprobs import response_logprob

RUN = {"kl": [1.0, 3.0], "words": 9.5, "unfinished": 0.25, "distinct": 0.5, "repetition": 0.125, "answers": ["so\nso", "a|b"]}


def test_kl_is_that_of_whole_answers_by_enumeration():
    """Every answer of up to three tokens of two words and an end: Σ_y π(y) kl(y) = Σ_y π(y) (log π(y) − log π_start(y))."""
    models = []
    for seed in range(2):
        torch.manual_seed(seed)
        shape = dict(vocab_size=3, hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
        models.append(LlamaForCausalLM(LlamaConfig(**shape, bos_token_id=None, eos_token_id=2, pad_token_id=2)).train(False))
        for p in models[-1].parameters():
            p.data.mul_(8.0)
    policy, start = models
    answers = [list(y) for n in (1, 2, 3) for y in itertools.product(range(3), repeat=n)]
    answers = [y for y in answers if 2 not in y[:-1] and (len(y) == 3 or y[-1] == 2)]
    for prompt in ([0, 1], [1, 1, 0]):
        with torch.no_grad():
            own, ref = (torch.stack([response_logprob(m, prompt, y) for y in answers]) for m in models)
        assert own.exp().sum().item() == pytest.approx(1.0, abs=1e-5)
        whole = (own.exp() * (own - ref)).sum().item()
        each = frontier.kl_of(policy, start, [Example(prompt, answers[i : i + 2]) for i in range(0, len(answers), 2)])
        for model in models:
            model.set_attn_implementation("sdpa")
        assert each.shape == (len(answers),) and whole > 0.1
        assert (own.exp() * each).sum().item() == pytest.approx(whole, rel=1e-4)
        assert each.std() < (own - ref).std()


def test_held_out_prompts_are_about_other_things():
    (training, held_out), things = frontier.prompts(0), " ".join(THINGS.split()).split(", ")
    assert len(set(things)) == len(things) and (training, held_out) == frontier.prompts(0) != frontier.prompts(1)
    assert len(set(training)) == len(training) == 400 and len(set(held_out)) == len(held_out) == 100

    def about(part):
        return {t for t in things if any(p == x.format(t) for p in part for x in TEMPLATES)}

    assert not about(training) & about(held_out) and about(training) | about(held_out) == set(things)


def test_every_arm_is_understood():
    asked = frontier.jobs_of(frontier.Study("x", arms=["simper", "dpo"], rates=[1e-5, 2e-5], seeds=1))
    assert [(j["objective"], j["lr"]) for j in asked["dpo"]] == [("dpo(beta=0.1)", 1e-5), ("dpo(beta=0.1)", 2e-5)]
    jobs = frontier.everything(frontier.jobs_of(frontier.Study("x", seeds=2)))
    assert len(jobs) == 2 * (1 + sum(map(len, [*rates(ARMS)]))) and {job["seed"] for job in jobs} == {0, 1}
    for text in itertools.chain.from_iterable(ARMS.values()):
        train.try_objective(train.parse_objective(text))


def rates(arms: dict):
    return itertools.chain.from_iterable(calls.values() for calls in arms.values())


# ---- the reward ------------------------------------------------------------------------------------------------------


@pytest.fixture
def no_analyzer():
    """None is remembered, before and after."""
    frontier.analyzer.cache_clear()
    yield
    frontier.analyzer.cache_clear()


def test_the_reward_is_the_compound_score(no_analyzer):
    pytest.importorskip("vaderSentiment")
    good, none, bad = (frontier.compound({}, text) for text in ("A lovely, happy place.", "It is a place.", "A vile place."))
    assert 1 > good > 0.5 and none == 0.0 and -1 < bad < -0.3


def test_a_missing_package_is_said_before_anything_is_written(no_analyzer, small, tmp_path, monkeypatch, capsys):
    for name in ("vaderSentiment", "vaderSentiment.vaderSentiment"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setattr(frontier, "make_pairs", None)
    with pytest.raises(SystemExit) as stop:
        frontier.main(["--model", str(small / "model"), "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "pip install vaderSentiment" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


class LikesItShort:
    def polarity_scores(self, text: str) -> dict:
        return {"compound": 1 / (1 + len(text.split()))}


@pytest.fixture
def made_up(no_analyzer, monkeypatch):
    """A package vaderSentiment that likes short answers; jobs run in this process; two arms, one run each."""
    package = SimpleNamespace(SentimentIntensityAnalyzer=LikesItShort)
    for name in ("vaderSentiment", "vaderSentiment.vaderSentiment"):
        monkeypatch.setitem(sys.modules, name, package)
    monkeypatch.setattr(miniature, "ProcessPoolExecutor", InThisProcess)
    monkeypatch.setattr(miniature, "task_of", lambda job: pytest.fail("a real model needs no toy task"))
    monkeypatch.setattr(frontier, "ARMS", {"dpo": {"dpo(beta=0.1)": (3e-3,)}, "kto": {"kto(beta=0.5)": (1e-3,)}})


# ---- the whole study -------------------------------------------------------------------------------------------------


def test_the_whole_study_and_its_resumption(made_up, small, tmp_path, monkeypatch, capsys):
    """An untrained model of the toy task's words, two seeds. What is finished stays, byte for byte; a line that was cut is run
    again."""
    out = tmp_path / "out"
    line = ["--model", str(small / "model"), "--out", str(out), "--prompts", "24", "--held-out", "3", "--steps", "2"]
    done = frontier.main([*line, "--batch-size", "4"])["results"]
    (start,), (dpo,), (kto,) = done["the start"], done["dpo"], done["kto"]
    assert start["kl"] == [0.0] * 6 and min(dpo["kl"] + kto["kl"]) > 0
    assert all(len(run["reward"]) == len(run["kl"]) == 6 and len(run["answers"]) == 3 for run in (start, dpo, kto))
    table = (out / "table.md").read_text()
    assert table.count("\n| `") == 2 * 2 and table in capsys.readouterr().out
    files = [(out / f"seed-{seed}/pairs.jsonl").read_text() for seed in range(2)]
    pairs = [json.loads(text) for file in files for text in file.splitlines()]
    assert files[0] != files[1] and all(len(p["chosen"].split()) < len(p["rejected"].split()) for p in pairs)

    kept = {path.relative_to(out): path.read_bytes() for path in out.rglob("*.jsonl")}
    with monkeypatch.context() as patch:
        patch.setattr(frontier, "experiment", lambda out, job: pytest.fail(f"run again: {job}"))
        frontier.main([*line, "--batch-size", "4", "--resume"])
    assert {path.relative_to(out): path.read_bytes() for path in out.rglob("*.jsonl")} == kept

    last = json.loads(kept[Path("runs.jsonl")].splitlines()[-1])["job"]["objective"]  # whichever was finished last
    (out / "runs.jsonl").write_bytes(kept[Path("runs.jsonl")][:-100])
    (out / "table.md").unlink()
    again = frontier.main([*line, "--batch-size", "4", "--resume"])["results"]
    assert all(again[name][0]["kl"] == done[name][0]["kl"] for name in done) and (out / "table.md").read_text() == table
    assert all(again[name] == done[name] for name in done if done[name][0]["job"]["objective"] != last)


def test_refuses_what_cannot_be_meant(made_up, small, tmp_path, capsys):
    (tmp_path / "file").touch()
    for changes, said in (
        (["--arms", "dop"], "arms is 'dop'; accepted are dpo"), (["--prompts", "401"], "prompts is 401; it is from 1 to 400"),
        (["--held-out", "0"], "held_out is 0"), (["--draws", "0"], "draws is 0"), (["--steps", "0"], "steps is 0"),
        (["--rates", "1e-5", "0"], "rates are [1e-05, 0.0]"),
        (["--model", str(tmp_path / "none")], "none: no such file or folder"), (["--lr", "1"], "unknown setting --lr"),
        (["--out", str(tmp_path / "file")], "Not a directory"), (["--out", str(small)], "already holds"),
        (["--resume"], "holds no run to resume"), (["--dtype", "fp16"], "dtype is 'fp16'"), (["--seeds", "0"], "seeds is 0"),
    ):  # fmt: skip
        with pytest.raises(SystemExit) as stop:
            frontier.main(["--model", str(small / "model"), "--out", str(tmp_path / "out"), *changes])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and said in error and "Traceback" not in error, (changes, error)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("objective", ["dpo(beta=0.1)", "kto(beta=0.1)"])
def test_a_step_is_of_as_many_pairs_for_every_objective(tmp_path, monkeypatch, objective):
    """A row is a pair for KTO too, with two completions. 4 steps of 3 of 5 pairs are 12 rows: 3 epochs."""
    (tmp_path / "seed-0").mkdir()
    (tmp_path / "seed-0/pairs.jsonl").write_text('{"prompt": "a"}\n' * 5)
    asked = []

    def stopped(s):
        asked.append(s)
        raise UserError("enough")

    monkeypatch.setattr(train, "train", stopped)
    job = {"model": "x", "objective": objective, "lr": 1e-3, "dtype": "fp32", "seed": 0, "steps": 4, "batch_size": 3}
    assert frontier.experiment(tmp_path, job)["error"] == "enough"
    assert (asked[0].batch_size, asked[0].max_steps, asked[0].epochs) == (3, 4, 3)


def test_a_run_that_ends_early_says_why(small, tmp_path):
    job = frontier.jobs_of(frontier.Study(str(small / "model")))["the start"][0] | {"objective": "dpo(beta=0.1)", "lr": 1e-3}
    result = frontier.experiment(tmp_path, job)
    assert result["job"] == job and "pairs.jsonl" in result["error"] and set(result) == {"job", "error"}


# ---- the table -------------------------------------------------------------------------------------------------------


def results_by_hand() -> dict[str, list[dict]]:
    """Mean KL 0, 2, 1, 4 and rewards 0, 0.2, 0.3, 0.5: the second is beaten by the third, with less KL."""

    def of(kl, reward, **job):
        return {**RUN, "kl": kl, "reward": reward, "job": {"objective": "", "lr": 0.0} | job}

    return {
        "the start": [of([0.0, 0.0], [-0.1, 0.1])],
        "dpo": [of([1.0, 3.0], [0.1, 0.3], objective="dpo(beta=0.1)", lr=2e-5),
                of([4.0, 4.0], [0.5, 0.5], objective="dpo(beta=0.05)", lr=5e-5)],
        "sft": [of([1.0, 1.0], [0.3, 0.3], objective="sft", lr=2e-5),
                {"job": {"objective": "sft", "lr": 1.0}, "error": "not finite"}],
    }  # fmt: skip


def test_table_by_hand():
    """Two prompts: 1 and 3 have mean 2 and standard error √2/√2 = 1. Each has 0.2 more than at the start."""
    lines = frontier.table(results_by_hand()).splitlines()
    assert lines[2] == "| the start | – | 0.00 ± 0.00 | **0.000 ± 0.100** |  | 9.5 | 25.0 | 50.0 | 12.5 |"
    assert lines[3] == "| `dpo(beta=0.1)` | 2e-05 | 2.00 ± 1.00 | 0.200 ± 0.100 | +0.200 ± 0.000 | 9.5 | 25.0 | 50.0 | 12.5 |"
    assert lines[4].startswith("| `dpo(beta=0.05)` | 5e-05 | 4.00 ± 0.00 | **0.500 ± 0.000** | +0.500 ± 0.100 |")
    assert lines[5].startswith("| `sft` | 2e-05 | 1.00 ± 0.00 | **0.300 ± 0.000** | +0.300 ± 0.100 |")
    assert lines[6] == "| `sft` | 1 | ended early: not finite |  |  |  |  |  |  |" and len(lines) == 7
    assert len({line.count("|") for line in lines}) == 1


def test_rewards_at_equal_kl_by_hand():
    """In √KL 0.5 lies halfway between the start and a KL of 1, and a KL of 2 at √2 of the way. DPO's first setting has KL 2."""
    results = results_by_hand()
    start = results["the start"][0]
    assert frontier.at_level(start, results["sft"], 0.25).tolist() == pytest.approx([0.1, 0.2])
    assert frontier.at_level(start, results["dpo"], 1).tolist() == pytest.approx([-0.1 + 0.2 / 2**0.5, 0.1 + 0.2 / 2**0.5])
    lines = frontier.at_equal_kl(results).splitlines()
    assert lines[0] == "| objective | reward at KL 1 | over DPO | reward at KL 2 | over DPO | reward at KL 5 | over DPO |"
    assert lines[2] == "| `dpo(beta=0.1)` | 0.141 ± 0.100 |  | 0.200 ± 0.100 |  | – |  |"
    assert lines[3] == "| `sft` | 0.300 ± 0.000 | +0.159 ± 0.100 | – | – | – | – |" and len(lines) == 4
    del results["dpo"]
    assert frontier.at_equal_kl(results).splitlines()[2] == "| `sft` | 0.300 ± 0.000 | – | – | – | – | – |"


def test_seeds_are_joined_prompt_by_prompt():
    """And one that ended early makes an early end of all."""

    def of(seed, **more):
        return {**RUN, "job": {"objective": "sft", "lr": 1e-5, "seed": seed}, "reward": [seed, 0.5], **more}

    (both,) = frontier.together([of(0), of(1, words=10.5, answers=["z"])])
    assert (both["reward"], both["kl"], both["words"]) == ([0, 0.5, 1, 0.5], [1.0, 3.0, 1.0, 3.0], 10.0)
    assert both["answers"] == RUN["answers"]
    ended = {"job": of(1)["job"], "error": "not finite"}
    assert frontier.together([of(0), ended]) == [ended]


def test_the_frontier_begins_at_the_start():
    runs = frontier.everything(results_by_hand())
    assert [frontier.mean(run, "kl") for run in frontier.frontier(runs)] == [0.0, 1.0, 4.0]


def test_answers_of_the_start_and_three_points_side_by_side():
    lines = frontier.shown(results_by_hand(), ["p", "q", "r"]).splitlines()[2:]
    assert lines[0] == "| p | 0.00 | the start | so so |" and lines[1].endswith("| `sft`, lr 2e-05 | so so |")
    assert len(lines) == 2 * 3 and lines[3].endswith("a\\|b |")  # two prompts have answers; start and two points


def test_the_picture_names_each_arm_where_it_got_to(tmp_path, monkeypatch):
    """At the end of its own frontier; one that never beats the start at its furthest point; one without any result nowhere."""
    pytest.importorskip("matplotlib")
    named, name_points = {}, miniature.name_points
    monkeypatch.setattr(miniature, "name_points", lambda axis, points: (named.update(points), name_points(axis, points)))
    results = results_by_hand()
    results["simpo"] = [{**results["sft"][0], "kl": [kl], "reward": [-0.1 * kl]} for kl in (2.0, 1.0)]
    results["ipo"] = results["sft"][1:]
    frontier.draw(results, tmp_path / "frontier.png")
    expected = {"the start": (0.0, 0.0), "dpo": (4.0, 0.5), "sft": (1.0, 0.3), "simpo": (2.0, -0.2)}
    assert set(named) == set(expected) and all(named[name][:2] == pytest.approx(at) for name, at in expected.items())
    assert (tmp_path / "frontier.png").stat().st_size > 10_000
