"""Token classes, measures at matched KL, the variations and the second world. Most runs are made up."""

import hashlib
import json
import math
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path

import miniature
import numpy as np
import pytest
import torch
import toy
import trails
from torch import tensor
from trails import ARMS, CLASSES, at_kl, classes_after, classes_of

import data
import losses
import train
from data import Example

ALWAYS = {".lock", "run.json", "settings.json"}

# (prompt, answer, classes by hand)
ANSWERS = [
    ("name two animals", "so cat dog <end>", "idle, fresh, fresh, complete"),
    ("name two animals", "cat cat red <end>", "fresh, repeated, wrong kind, early"),
    ("name two animals", "cat dog cow cow <end>", "fresh, fresh, surplus, repeated, complete"),
    ("name two animals and three colors", "cat and red red blue <end>", "fresh, and, fresh, repeated, fresh, early"),
    ("name two animals", "red red two <end>", "wrong kind, wrong kind, other, early"),
    ("name two animals", "<end>", "early"),
]


@pytest.mark.parametrize("prompt, answer, expected", ANSWERS)
def test_classes_of_an_answer(prompt, answer, expected):
    ends = {"complete": "end, all given", "early": "end, too early"}
    assert classes_of(prompt, answer.split()) == [ends.get(name, name) for name in expected.split(", ")]


def test_classes_of_every_next_word():
    words = ["cat", "dog", "red", "so", "and", "<end>", "name", "<user>"]
    expected = ["repeated", "fresh", "wrong kind", "idle", "and", "end, too early", "other", "other"]
    assert classes_after("list two animals", ["so", "cat"], words) == expected


@pytest.mark.parametrize("world", toy.WORLDS)
def test_classes_add_up_to_the_true_quality(world):
    """A fresh item is a right one: (fresh − ½ (other items)) / n − 0.1 idle is toy.quality, which knows no classes."""
    rng = np.random.default_rng(3)
    for prompt in toy.all_prompts(0)[:200]:
        answer = toy.demonstration(prompt, rng, toy.WORLDS[world])
        n, count = sum(toy.wanted(prompt).values()), Counter(classes_of(prompt, answer.split()))
        bad = count["wrong kind"] + count["repeated"] + count["surplus"]
        assert toy.quality(prompt, answer) == pytest.approx((count["fresh"] - 0.5 * bad) / n - 0.1 * count["idle"])
        assert count["other"] == 0


# ---- the second world ------------------------------------------------------------------------------------------------


def test_the_plain_world_is_what_it_was():
    """Its demonstrations, and with them every start and every published number, to the last byte."""
    shown = []
    for prompt, (response,), *label_and_margin, _ in toy.demonstrations(0, 8192):
        shown.append([prompt, [response["content"]], *label_and_margin])
    assert (
        hashlib.sha256(json.dumps(shown).encode()).hexdigest()
        == "3aae9be41bba0d716b328cff2fd8c609b0628abe4fd4b7c81717c5fc25227390"
    )


def test_habits_of_the_second_world():
    """Half of the answers open with the stock phrase; an item is a repeat, or of the next kind, more often than a fresh one."""
    who, rng, opened, count = toy.WORLDS["stock"], np.random.default_rng(0), 0, Counter()
    for prompt in toy.all_prompts(0):
        words = toy.demonstration(prompt, rng, who).split()
        opened += words[:3] == list(toy.STOCK)
        count.update(classes_of(prompt, words))
    assert abs(opened / 3168 - who.stock) < 0.03
    assert count["wrong kind"] + count["repeated"] > count["fresh"] + count["surplus"]


def test_the_usual_confusion_is_the_next_kind():
    who, rng = toy.Demonstrator(wrong=0.0, repeated=0.0, confused=1.0), np.random.default_rng(0)
    for prompt, kind in (("name two animals", "fruits"), ("name two clothes", "animals")):
        words = toy.demonstration(prompt, rng, who).split()
        assert {toy.KIND_OF[w] for w in words if w in toy.KIND_OF} == {kind}


def test_an_unknown_world_is_refused(tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        toy.main(["build", "--world", "stok", "--out", str(tmp_path / "out")])
    assert stop.value.code == 2 and "world is 'stok'; accepted are plain, stock" in capsys.readouterr().err


# ---- variations ------------------------------------------------------------------------------------------------------

PAIR = tensor([-12.0]), tensor([-24.0]), tensor([10]), tensor([12])  # a_w = −1.2, a_l = −2


def test_variations_by_hand():
    held, sides = (trails.VARIATIONS[name] for name in ("held", "sides"))
    assert held(*PAIR, lam=0.5).item() == pytest.approx(math.log1p(math.exp(-0.6)) + 0.5 * 1.2)  # −logσ(2·0.8 − 1) − λ a_w
    assert sides(*PAIR, up=1.0, down=1.0).item() == pytest.approx(1.2 - 2.0)
    assert sides(*PAIR, up=0.24).item() == pytest.approx(0.24 * 1.2 + math.exp(-2.0))
    assert sides(*PAIR, down=0.11).item() == pytest.approx(-math.exp(-1.2) - 0.11 * 2.0)
    assert torch.equal(sides(*PAIR), losses.simper(*PAIR))


def test_variations_of_the_pair_weights_by_hand():
    """Two pairs alike, d = 0.8 now; the start ranks the first right, d̄ = 0.5, and the second wrong, d̄ = −0.5."""
    ranked, weighed = (trails.VARIATIONS[name] for name in ("ranked", "weighed"))
    logps, lengths = (tensor([-12.0] * 2), tensor([-24.0] * 2)), (tensor([10] * 2), tensor([12] * 2))
    ref = tensor([-10.0, -20.0]), tensor([-18.0, -18.0])  # averages −1 and −1.5; −2 and −1.5

    def softplus(x):
        return math.log1p(math.exp(x))

    assert ranked(*logps, *ref, *lengths).tolist() == pytest.approx([softplus(-0.6), 0.0])
    assert ranked(*logps, *ref, *lengths, beta=4.5, reference=True).tolist() == pytest.approx([softplus(-4.5 * 0.3), 0.0])
    expected = [2 / (1 + math.exp(0.0)) * softplus(-4.5 * 0.3), 2 / (1 + math.exp(-2.0)) * softplus(-4.5 * 1.3)]
    assert weighed(*logps, *ref, *lengths).tolist() == pytest.approx(expected)


def test_variations_are_no_objectives_elsewhere():
    assert not set(trails.VARIATIONS) & set(losses.OBJECTIVES)
    assert set(trails.VARIATIONS) == {"held", "sides", "ranked", "weighed"}


def test_every_arm_is_understood(monkeypatch):
    monkeypatch.setattr(losses, "OBJECTIVES", losses.OBJECTIVES)
    with pytest.MonkeyPatch.context() as patch:
        for name, loss in trails.VARIATIONS.items():
            patch.setitem(losses.OBJECTIVES, name, loss)
        for settings, rates, _ in ARMS.values():
            of_trainer = {k: v for k, v in settings.items() if k != "without_end"}
            s = train.Settings(model="m", dataset="d", lr=rates[0], **of_trainer)
            train.check_settings(s)
            train.try_objective(train.parse_objective(s.objective))


@dataclass
class Listed:
    """Rows that are in a list."""

    examples: list

    def mapped(self, change):
        return [change(e) for e in self.examples]


@pytest.mark.parametrize(
    "sides, expected", [("", [[4, 5, 3], [6, 3]]), ("rejected", [[4, 5, 3], [6]]), ("both", [[4, 5], [6]])]
)
def test_the_end_is_left_out(sides, expected):
    def load():
        return Listed([Example([1], [[4, 5, 3], [6, 3]])]), Listed([]), {}

    rows, _, _ = trails.without_end(load, sides)()
    assert (rows if sides else rows.examples)[0].responses == expected


# ---- measures --------------------------------------------------------------------------------------------------------


def run_of(kl: float, quality: float, seed: int = 0, lr: float = 1e-4) -> dict:
    return {"job": {"seed": seed, "lr": lr}, "kl": kl, "quality": quality, "start": {"kl": 0.0, "quality": 1.0}}


def test_at_matched_kl_by_hand():
    """Straight in √KL: knots (0, 1), (½, 2), (1, 4), whatever the order of the runs."""
    runs = [run_of(1.0, 4.0), {"job": {"seed": 0}, "error": "not finite"}, run_of(0.25, 2.0)]
    found = [at_kl(runs, level, "quality") for level in (0.0, 0.0625, 0.25, 0.5625, 1.0)]
    assert found == pytest.approx([1.0, 1.5, 2.0, 3.0, 4.0])
    assert math.isnan(at_kl(runs, 1.1, "quality")) and math.isnan(at_kl([], 0.5, "quality"))


def test_each_world_is_read_off_by_itself():
    runs = [run_of(1.0, 2.0, seed=0), run_of(1.0, 4.0, seed=1), run_of(4.0, 9.0, seed=1)]
    assert trails.at_level(runs, 1.0, "quality").tolist() == [2.0, 4.0]
    assert trails.written(trails.at_level(runs, 1.0, "quality")) == "3.000 ± 1.000"  # std √2, over √2
    assert trails.written(trails.at_level(runs, 2.0, "quality")) == "–"  # one world's runs did not get there


def test_what_quality_goes_with():
    """Three arms on a line: quality 1, 2, 3 where the chosen is +0, +1, +2 and the rejected 0, −3, −6."""
    start = {"kl": 0.0, "quality": 1.0, "chosen": 0.0, "rejected": 0.0}
    arms = {
        i: [{"job": {"seed": 0}, "kl": 1.0, "quality": 1.0 + i, "chosen": i, "rejected": -3 * i, "start": start}]
        for i in range(3)
    }
    arms["ended early"] = [{"job": {"seed": 0}, "error": "not finite"}]
    text = trails.held_out_line(arms)
    assert "Over the 3 arms" in text and "chosen +1.00, the rejected -1.00, their difference +1.00" in text


def test_mass_by_class():
    """Two positions of two words, one answer."""
    table = tensor([[CLASSES.index("idle"), CLASSES.index("fresh")], [CLASSES.index("fresh")] * 2])
    found = trails.by_class("mass", tensor([[0.25, 0.75], [0.5, 0.5]]), table, 1)
    assert found["mass/idle"] == 0.25 and found["mass/fresh"] == 1.75 and sum(found.values()) == 2.0


def test_names_keep_their_order_and_distance():
    assert trails.spread([0.5, 0.0, 0.05, 0.9], 0.25) == [0.5, 0.0, 0.25, 0.9]


def test_measures_of_the_start_itself(small_task):
    """It is no distance from itself, nothing has moved, and its mass is that of its own answers."""
    s = miniature.run_settings(small_task, "out")
    world = Path(s.model).parent
    found = trails.measure(world / "model", s)
    start = found.pop("start")
    assert found["kl"] == found["moved"] == found["moved_first"] == found["chosen"] == 0.0
    assert all(
        math.isnan(found[f"{side}/{c}"]) or found[f"{side}/{c}"] == 0.0 for side in ("chosen", "rejected") for c in CLASSES
    )
    assert [found[f"mass/{c}"] for c in CLASSES] == [start[f"mass/{c}"] for c in CLASSES]
    words = sum(start[f"count/{c}"] for c in CLASSES if "end" not in c)
    assert words == pytest.approx(start["words"]) and sum(start[f"mass/{c}"] for c in CLASSES) == pytest.approx(
        words + 1, abs=1e-4
    )


def test_token_log_probs_are_those_of_the_trainer(small_task):
    """Summed over a response they are `toy.summed_logps`, which goes through logprobs.py."""
    world = miniature.task_of(small_task)
    examples = trails.encode(data.load_tokenizer(str(world / "model")), trails.read_answers(world / "answers.jsonl"))
    found = trails.of_targets(world / "model", examples).split([len(e.responses[0]) for e in examples])
    torch.testing.assert_close(torch.stack([x.sum() for x in found]), toy.summed_logps(world / "model", examples))


def test_one_real_run(small_task):
    """Two steps of a variation: nothing is registered afterwards, and KL is above 0."""
    job = small_task | {"max_steps": 2, "lr": 1e-3}
    found = trails.experiment(job | {"objective": "sides(up=1.0, down=1.0)", "without_end": "rejected"})
    assert found["job"]["without_end"] == "rejected" and 0 < found["kl"] < 5 and 0 < found["moved"] < 1
    assert not set(trails.VARIATIONS) & set(losses.OBJECTIVES)
    assert "no argument 'tau'" in trails.experiment(job | {"objective": "sides(tau=1.0)"})["error"]


# ---- the command -----------------------------------------------------------------------------------------------------


@pytest.fixture
def made_up(monkeypatch) -> list[dict]:
    """Instead of runs, results that follow from the job; the jobs that were asked for."""
    asked, start = [], {"quality": 0.5, "words": 8.0, "kl": 0.0, "win_rate": 0.5, "ranked": 0.9}
    start |= {"likelihood_chosen": 0.2, "likelihood_rejected": 0.1}
    start |= {"chosen": 0.0, "rejected": 0.0}
    start |= {f"{measure}/{c}": 0.0 for measure in trails.CHANGES for c in CLASSES}

    def run(job):
        asked.append(job)
        if job["objective"] == "simper":
            return {"job": job, "error": "the loss is not finite"}
        kl, gain = (1e4 * job["lr"]) ** 2, 0.2 if job["objective"].startswith("dpo") else 0.1  # 1e-4: 1 nat
        now = {**start, "kl": kl, "quality": 0.5 + gain * math.sqrt(kl) + 0.01 * job["seed"], "win_rate": 0.6}
        return {"job": job, **now, "count/idle": -0.5 * math.sqrt(kl), "start": start}

    monkeypatch.setattr(miniature, "run_jobs", lambda jobs, file, work=None: [run(job) for job in jobs])
    return asked


def test_the_study(tmp_path, made_up, capsys):
    """Arms at matched KL against simpo and dpo, of the same world; an arm whose runs all ended early is dashes."""
    line = ["--arms", "simper", "--seeds", "2", "--out", str(tmp_path / "out"), "--length-bias", "0.03"]
    trails.main(line)
    rates = [lr for name in ("simpo", "dpo", "simper") for lr in ARMS[name][1] * 2]
    assert [job["lr"] for job in made_up] == rates and all(job["length_bias"] == 0.03 for job in made_up)
    assert [job["seed"] for job in made_up] == [0, 0, 0, 1, 1, 1] + [0, 0, 0, 0, 1, 1, 1, 1] * 2
    text = (tmp_path / "out" / "table.md").read_text()
    cells = [line.count("|") for line in text.split("\n\n")[1].splitlines()]
    assert len(cells) == 2 + 3 and len(set(cells)) == 1  # as many in each row as there are titles
    rows = {line.split(" | ")[0].strip("| "): line.split(" | ") for line in text.splitlines() if line.startswith("| `")}
    assert text.startswith("The start: quality 0.500 ± 0.000, 8.0 ± 0.0 words; its average log-prob ranks 0.90") and text in (
        capsys.readouterr().out
    )
    quality = [line for line in text.splitlines() if line.startswith("| `dpo`")][0].split(" | ")
    # at 1 nat: 0.7 and 0.71 in the two worlds; simpo 0.6 and 0.61, so the difference has no error
    assert quality[3] == "0.705 ± 0.005" and quality[5] == "+0.100 ± 0.000" and quality[6] == "+0.000 ± 0.000"
    assert [line for line in text.splitlines() if line.startswith("| `simper`")][0].split(" | ")[2:6] == ["–"] * 4
    assert rows["`simpo`"][1 + CLASSES.index("idle")] == "+0.00 ± 0.00"  # the last table is of rejected
    assert "-0.50 ± 0.00" in text
    assert {p.name for p in (tmp_path / "out").iterdir()} == ALWAYS | {"table.md", "quality.png", "classes.png"}


BAD = {
    "an unknown arm": (["--arms", "simp"], ["arms is 'simp'", "simpo"]),
    "no seeds": (["--seeds", "0"], ["seeds is 0", "at least 1"]),
    "a real model": (["--model", "m", "--dataset", "d"], ["trains on tasks that it builds, without --model"]),
    "a bad setting of the task": (["--annotator-noise", "-1"], ["annotator's noise is -1"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_end_with_a_message_and_code_2(capsys, made_up, name):
    line, expected = BAD[name]
    with pytest.raises(SystemExit) as stop:
        trails.main(line)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(part in error for part in expected) and not made_up


def test_an_arm_is_named_as_it_can_be_typed():
    """A list of names on the command line is cut at commas."""
    assert not any("," in name for name in ARMS)
    assert trails.parse(["--arms", *ARMS]).arms == list(ARMS)
    assert list(trails.jobs_of(replace(trails.parse([]), seeds=1))) == list(ARMS)
