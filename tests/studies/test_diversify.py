"""The world of sums, costs and trees by hand; and a small world and run from end to end."""

import json

import diversify
import numpy as np
import on_policy
import pytest
from diversify import first_error, problem, problems, values

import train


def test_two_worlds_that_are_built_at_once_keep_apart(tmp_path, monkeypatch):
    places = []
    monkeypatch.setattr(diversify, "make_world", lambda folder, job: places.append(folder) or {"seed": job["seed"]})
    for seed in (0, 1):
        job = {"seed": seed, "prompts": 8, "demonstrations": 8, "steps": 1, "cache": str(tmp_path)}
        assert diversify.build_world(job) == {"job": job, "seed": seed}
    assert len(set(places)) == 2


def test_problems_by_hand():
    assert problem("3 plus 4 times 2 by sums") == (3, [("plus", 4), ("times", 2)])
    assert values("3 plus 4 times 2") == [3, 7, 14] and values("9 minus 4 times 3 minus 8") == [9, 5, 15, 7]
    found = problems(0, 500)
    assert found == problems(0, 600)[:500] != problems(1, 500) and len(set(found)) == 500
    assert all(0 <= min(values(p)) and max(values(p)) <= 99 for p in found)
    assert {len(problem(p)[1]) for p in found} == {2, 3, 4}


# (answer to "3 plus 4 times 3 minus 1", index of its first wrong step by hand)
JUDGED = [
    ("3 + 4 = 7 ; 7 × 3 = 21 ; 21 − 1 = 20 ; answer 20", None),
    ("3 + 4 = 7 ; 7 + 7 = 14 ; 14 + 7 = 21 ; 21 − 1 = 20 ; answer 20", None),
    ("", None), ("3 + 4 = 7 ;", None), ("3 + 4 = 7 ; 7 + 7 = 14 ;", None),
    ("3 + 4 = 8 ; 8 × 3 = 24 ; 24 − 1 = 23 ; answer 23", 0),  # right after a wrong step is still wrong
    ("3 + 4 = 7 ; 7 × 3 = 22 ; answer 20", 1),
    ("3 + 4 = 7 ; 7 + 7 = 14 ; 14 − 1 = 13", 2),  # a sum is missing
    ("3 + 4 = 7 ; 7 + 7 = 14 ; 14 + 14 = 28", 2), ("4 × 3 = 12", 0), ("3 + 4 = 7 ; answer 7", 1),
    ("3 + 4 = 7 ; 7 × 3 = 21 ; 21 − 1 = 20 ; answer 21", 3),
    ("3 + 4 = 7 ; 7 × 3 = 21 ; 21 − 1 = 20 ; answer 20 ; answer 20", 4),
    ("3 + 4 = 7 ; 7 × 3 = 21 ; 21 − 1 = 20 ; 20 + 20 = 40", 3),
]  # fmt: skip


@pytest.mark.parametrize("text, at", JUDGED)
def test_the_first_error_by_hand(text, at):
    assert first_error("3 plus 4 times 3 minus 1", text) == at


def test_demonstrations_are_as_careless_as_they_say():
    rng, wrong, steps = np.random.default_rng(0), 0, 0
    for prompt in problems(3, 300):
        row = {"prompt": [{"role": "user", "content": prompt}]}
        for approach in diversify.APPROACHES:
            careful = diversify.demonstration(prompt, approach, rng, 0.0)
            assert first_error(prompt, careful) is None and diversify.right(row, careful)
            assert ("×" in careful) == ("times" in prompt and approach == "products")
        text = diversify.demonstration(prompt, "products", rng)
        assert set(text.split()) <= set(diversify.WORDS)
        assert diversify.right(row, text) == (text.split()[-1] == str(values(prompt)[-1]))
        for step in text.split(" ; ")[:-1]:  # each by its own operands
            a, sign, b, _, c = step.split()
            is_now = {"+": int(a) + int(b), "−": int(a) - int(b), "×": int(a) * int(b)}[sign]
            steps, wrong = steps + 1, wrong + (is_now != int(c))
    assert abs(wrong / steps - diversify.CARELESS) < 3 * (0.15 * 0.85 / steps) ** 0.5


def test_auc_by_pairs():
    rng = np.random.default_rng(0)
    scores, label = rng.integers(0, 4, 60) / 2.0, rng.random(60) < 0.4
    pairs = [(a > b) + 0.5 * (a == b) for a, x in zip(scores, label) if x for b, y in zip(scores, label) if not y]
    assert diversify.auc(scores, label) == pytest.approx(sum(pairs) / len(pairs))


def node(parent, step, q, n=2, ended=False):
    return dict(parent=parent, step=step, N=n, Q=q, ended=ended)


TREE = [node(None, "", 0.0), node(0, "1 + 2 = 3 ;", 0.5), node(0, "1 + 2 = 4 ;", -1.0), node(1, " answer 3", 1.0, 2, True),
        node(1, " answer 4", -1.0, 2, True), node(2, " answer 4", -1.0, 2, True), node(2, " 4 + 4 = 8 ;", 0.0)]  # fmt: skip


def test_sets_are_cut_at_the_same_tokens_and_measured_by_hand(tmp_path):
    ask = [{"role": "user", "content": "1 plus 2"}]
    row = {"prompt": ask, "responses": ["1 + 2 = 3 ; answer 3", "1 + 2 = 4 ; answer 4"], "tokens": 40, "tree": TREE}
    assert diversify.within([row | {"tokens": n} for n in (5, 7, 9)], 12) == [row | {"tokens": n} for n in (5, 7)]
    assert [q for q, _ in diversify.judged(row)] == [0.5, -1.0, 1.0, -1.0, -1.0, 0.0]
    assert [x for _, x in diversify.judged(row)] == [True, False, True, False, False, False]
    pairs = diversify.pairs_of([row], tmp_path / "steps.jsonl", True)
    assert [(diversify.begun(p)[1], p["chosen"], p["rejected"]) for p in pairs] == [
        ("", "1 + 2 = 3 ;", "1 + 2 = 4 ;"),
        ("1 + 2 = 3 ;", " answer 3", " answer 4"),
        ("1 + 2 = 4 ;", " 4 + 4 = 8 ;", " answer 4"),
    ]  # fmt: skip
    found = diversify.measure([row], pairs)
    assert found == {
        "prompts": 1, "tokens": 40, "pairs": 3, "cost": pytest.approx(40 / 3), "distinct": 2.0, "right": 0.5,
        "first_error": pytest.approx(2 / 3), "chosen_right": pytest.approx(2 / 3), "auc": 1.0,
    }  # fmt: skip
    (pair,) = diversify.pairs_of([row], tmp_path / "answers.jsonl", False)
    assert (pair["chosen"], pair["rejected"]) == ("1 + 2 = 3 ; answer 3", "1 + 2 = 4 ; answer 4")


def test_two_approaches_are_one_row():
    rows = [
        {"prompt": [{"role": "user", "content": f"1 plus 2 by {x}"}], "responses": r, "tokens": 9}
        for x, r in (("sums", ["a", "b"]), ("products", ["b", "c"]))
    ]
    assert diversify.together(rows) == {
        "prompt": [{"role": "user", "content": "1 plus 2"}], "responses": ["a", "b", "c"], "tokens": 18
    }  # fmt: skip


def test_refusals(tmp_path):
    for how in (["--seeds", "0"], ["--prompts", "0"], ["--model", "m"]):
        with pytest.raises(SystemExit) as stopped:
            diversify.main([*how, "--out", str(tmp_path / "out")])
        assert stopped.value.code == 2


def test_a_small_world_and_a_run(tmp_path, monkeypatch):
    """The start answers in steps by a stand-in of sampling (it is untrained), so that every set has pairs; SFT then runs."""
    rng = np.random.default_rng(0)

    def continued(model, tokenizer, ids, s, max_tokens):
        texts = []
        for row in ids:
            prompt, _, begun = tokenizer.decode(row).partition(" <assistant>")
            whole = diversify.demonstration(prompt.removeprefix("<user> "), "products", rng, 0.4)
            rest = whole.split(" ; ")[begun.count(";") :]
            texts.append(" ; ".join(rest))
        return [tokenizer(text)["input_ids"] for text in texts], [True for _ in texts]

    monkeypatch.setattr(on_policy, "_continued", continued)
    monkeypatch.setattr(diversify, "HELD_OUT", 8)
    job = dict(seed=0, prompts=96, demonstrations=64, steps=1, cache=str(tmp_path))
    world = diversify.build_world(job)
    assert diversify.build_world(job) == world  # kept
    assert 0 < world["start accuracy"] < 1
    for name in diversify.SETS:
        pairs = diversify.read(diversify.place(job) / f"pairs {name}.jsonl")
        assert world[f"{name}/pairs"] == len(pairs) > 0 and world[f"{name}/tokens"] <= world["budget"]
        assert world[f"{name}/cost"] == pytest.approx(world[f"{name}/tokens"] / len(pairs))
        for p in pairs:
            ask, so_far = diversify.begun(p)
            if name != "mcts, steps":
                row = {"prompt": p["prompt"]}
                assert diversify.right(row, p["chosen"]) and not diversify.right(row, p["rejected"]) and not so_far
    assert world["plain/cost"] < world["mcts/cost"]
    made = [diversify.experiment(job | {"set": "mcts, steps", "objective": o, "lr": 1e-3}) for o in ("dpo(beta=0.5)", "no")]
    assert 0 < made[0]["accuracy"] < 1 and "no" in made[1]["error"]
    runs = {(name, o): made[:1] * 2 for name in diversify.SETS for o in diversify.OBJECTIVES}
    text = diversify.report([world] * 2, runs, {key: {"lr": 1e-4} for key in runs})
    assert (
        text.count("\n| plain | ") == 5
        and "an edge of the grid for 8 of 16: plain: orpo; plain: simpo; dts: orpo" in text
        and "+0.0 ± 0.0, open" in text
    )
    diversify.draw([world] * 2, runs, tmp_path / "x.png")
    assert (tmp_path / "x.png").exists() == (train.pyplot() is not None)
    json.dumps(world)
