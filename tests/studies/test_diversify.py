"""Strategies, search, step pairs, the world of sums and costs by hand; and a small world and run from end to end."""

import json
from pathlib import Path

import diversify
import numpy as np
import on_policy
import pytest
import toy
from diversify import Step, Steps, Strategies, Tree, first_error, problem, problems, values
from templates import FAMILIES, TERMINATOR, family

import data
import train
from data import UserError


def user(text):
    return {"role": "user", "content": text}


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def model(small) -> str:
    return str(small / "model")


# ---- strategies of sampling ------------------------------------------------------------------------------------------


def test_greedy_samples_are_equal_and_kept_once(model, tmp_path):
    source = write(tmp_path, "p.jsonl", [{"prompt": "name two fruits"}])
    for strategy in ("plain", "cot", "dts"):
        how = dict(n=3, temperature=0, max_tokens=5, strategy=strategy, keep_unfinished=True)
        diversify.sample(Strategies(model, source, str(tmp_path / strategy), **how))
        (row,) = diversify.read(tmp_path / strategy)
        assert len(row["responses"]) == 1 and row["prompt"] == [user("name two fruits")]


def test_plain_is_what_the_tool_samples(model, tmp_path):
    """The same rows as on_policy.py writes, to the last byte."""
    source = write(tmp_path, "p.jsonl", [{"prompt": f"name {n} fruits"} for n in ("two", "three")])
    how = dict(n=3, temperature=1.0, max_tokens=40, seed=2)
    diversify.sample(Strategies(model, source, str(tmp_path / "a"), **how))
    on_policy.sample(on_policy.Sampling(model, source, str(tmp_path / "b"), **how))
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes() != b""


def test_strategies_ask_as_they_say(model, tmp_path, monkeypatch):
    asked = []

    def answers(network, tokenizer, rows, s, seed):
        asked.append([row["prompt"][-1]["content"] for row in rows])
        plan = "1. first\nsome text\n2) second" if "approaches" in asked[-1][0] else "an answer"
        texts = [f"{plan} {i}" if plan == "an answer" else plan for i in range(len(rows))]
        return texts, [True for _ in rows], [7 if texts == [plan] else 10 for _ in rows]

    monkeypatch.setattr(on_policy, "answer", answers)
    source = write(tmp_path, "p.jsonl", [{"prompt": "Q"}])
    diversify.sample(Strategies(model, source, str(tmp_path / "cot"), n=2, strategy="cot"))
    diversify.sample(Strategies(model, source, str(tmp_path / "dts"), n=3, strategy="dts"))
    assert asked[0] == ["Q" + diversify.STEP_BY_STEP] * 2
    assert asked[1] == ["Q" + diversify.NAME_APPROACHES.format(n=3)]
    assert asked[2] == ["Q" + diversify.BY_APPROACH.format(approach=a) for a in ("first", "second")] + ["Q"]  # one was missing
    assert diversify.read(tmp_path / "dts")[0]["responses"] == ["an answer 0", "an answer 1", "an answer 2"]
    assert [diversify.read(tmp_path / name)[0]["tokens"] for name in ("cot", "dts")] == [20, 37]  # naming approaches took 7
    diversify.sample(
        Strategies(model, source, str(tmp_path / "all"), n=2, strategy="cot,plain")
    )  # the same answers: the first is named
    (row,) = diversify.read(tmp_path / "all")
    assert asked[3:] == [["Q" + diversify.STEP_BY_STEP] * 2, ["Q"] * 2]
    assert row["responses"] == ["an answer 0", "an answer 1"] and row["strategies"] == ["cot", "cot"]
    with pytest.raises(UserError, match="strategy is 'best'"):
        diversify.sample(Strategies(model, source, str(tmp_path / "x"), strategy="best"))


# ---- tree search -----------------------------------------------------------------------------------------------------


LETTERS = dict(n=2, step_end=";", max_tokens=9)


def search(script, iterations, rewards=(("+", 1), ("", -1)), **how):
    """A search for one prompt [0] whose answers are read from a script {tree's text: answers}; tokens are characters, "." ends.

    The reward is that of the first key which the answer's text has in it.
    """
    s, asked = Strategies("m", "p", "o", iterations=iterations, **LETTERS | how), []

    def go_on(ids, max_tokens):
        asked.append(("".join(map(chr, ids[0][1:])), len(ids), max_tokens))
        answers = [script[asked[-1][0]][i] for i in range(len(ids))]
        return [list(map(ord, a.rstrip("."))) for a in answers], [a.endswith(".") for a in answers]

    def reward(text):
        return next(value for key, value in rewards if key in text)

    tree = Tree([0], reward)
    diversify.search([tree], s, go_on, lambda ids: "".join(map(chr, ids)))
    counts = {"unfinished": tree.unfinished, "tokens": tree.tokens, "sampled": tree.sampled}
    return {"kept": tree.kept, **counts, "tree": diversify.nodes(tree.root)}, asked


SCRIPT = {"": ["a;+.", "b;-."], "a;": ["x+.", "z;-."], "b;": ["b;+.", "+;."]}


def rows_of(tree):
    return [(x["parent"], x["step"], x["N"], round(x["N"] * x["Q"], 9), x["ended"]) for x in tree]


def test_tree_search_by_hand():
    """N, W, the choice of the leaf and what is kept after each iteration; c = 1.

    2: a: 1 + √ln 2 = 1.83, b: −1 + √ln 2 = −0.17. 3: a: 1/3 + √(ln 4 / 3) = 1.01, b: −1 + √ln 4 = 0.18; then x: 1 + √ln 3,
    z: −1 + √ln 3: x has ended, so it backs up once more. With c = 3 the third goes to b: 1/3 + 3 · 0.680 < −1 + 3 · 1.177.
    """
    found, asked = search(SCRIPT, 1, exploration=1.0)
    assert rows_of(found["tree"]) == [(None, "", 2, 0, False), (0, "a;", 1, 1, False), (0, "b;", 1, -1, False)]
    found, asked = search(SCRIPT, 2, exploration=1.0)
    a, b = (0, "a;", 3, 1, False), (0, "b;", 1, -1, False)
    assert rows_of(found["tree"]) == [(None, "", 4, 0, False), a, b, (1, "x+", 1, 1, True), (1, "z;", 1, -1, False)]
    assert asked == [("", 2, 9), ("a;", 2, 7)]
    assert found["kept"] == {"a;+": 1, "b;-": -1, "a;x+": 1, "a;z;-": -1}
    assert {k: found[k] for k in ("unfinished", "tokens", "sampled")} == dict(unfinished=0, tokens=4 + 4 + 3 + 4, sampled=4)
    found, asked = search(SCRIPT, 3, exploration=1.0)
    assert len(asked) == 2 and [x["N"] for x in found["tree"]] == [5, 4, 1, 2, 1]  # root, a, b, x, z
    assert [x["N"] * x["Q"] for x in found["tree"]] == pytest.approx([1, 2, -1, 2, -1])
    assert found["sampled"] == 4
    found, asked = search(SCRIPT, 3, exploration=3.0)
    assert [text for text, *_ in asked] == ["", "a;", "b;"]
    assert found["kept"]["b;b;+"] == 1 and found["kept"]["b;+;"] == 1


def test_the_choice_of_a_leaf_by_hand():
    """N 2, W 1 and N 6, W 4 under N 9: ½ + c √(ln 9 / 2) against ⅔ + c √(ln 9 / 6); equal at c = 0.37624…"""
    root = Step([], n=9)
    a, b = (Step([i], str(i), root, n=n, w=w) for i, (n, w) in enumerate(((2, 1.0), (6, 4.0))))
    root.children = {("0", False): a, ("1", False): b}
    assert diversify.upper_bound(a, 2.0) == pytest.approx(0.5 + 2 * 1.0481470, abs=1e-6)  # √(2.1972246 / 2)
    assert diversify.upper_bound(b, 2.0) == pytest.approx(4 / 6 + 2 * 0.6051480, abs=1e-6)
    equal = (4 / 6 - 1 / 2) / (1.0481470 - 0.6051480)
    assert (
        diversify.leaf_below(root, equal + 1e-4) is a
        and diversify.leaf_below(root, equal - 1e-4) is b
        and diversify.leaf_below(root, 0.0) is b
    )


def test_equal_steps_are_one_and_what_is_cut_off_has_no_reward():
    """Two answers through one step; one cut off after a step (−1 there), one within its first (−1 at the root alone)."""
    found, _ = search({"": ["a;+.", "a;-.", "a;+++", "aaaaa", " ;."]}, 1, n=5)
    assert rows_of(found["tree"]) == [(None, "", 5, -3, False), (0, "a;", 3, -1, False), (0, " ;", 1, -1, True)]
    assert found["unfinished"] == 2 and found["kept"] == {"a;+": 1, "a;-": -1, ";": -1} and found["tokens"] == 4 + 4 + 5 + 5 + 3
    kept = search({"": ["a;+.", "aaaaa"]}, 1, keep_unfinished=True)[0]["kept"]
    assert kept == {"a;+": 1, "aaaaa": -1}
    deep, asked = search({"": ["a;b;+.", "a;b+."], "a;": ["bbbbb;+.", "b+."]}, 2, max_tokens=7)  # 8 tokens with "a;", of 7
    assert asked[1] == ("a;", 2, 5) and deep["unfinished"] == 1 and "a;bbbbb;+" not in deep["kept"]
    full, asked = search({"": ["aaaaaaaa;", "aaaaaaaa;"]}, 2)  # no room after the first step's end: it is not gone on from
    assert [x["step"] for x in full["tree"]] == [""] and [x[0] for x in asked] == ["", ""]
    empty, _ = search({"": [".", "+."]}, 1, rewards=(("", 1),))  # the rule is not asked about nothing
    assert empty["kept"] == {"+": 1} and [x["Q"] for x in empty["tree"]] == [0, -1, 1]
    blank = search({"": [";+;+.", "  ;x."]}, 1)[0]["tree"]
    assert [x["step"] for x in blank] == ["", ";", "  ;"]


def test_a_step_ends_where_the_setting_says():
    """ "\\n" is a newline; a step is whole tokens."""
    s = Strategies("m", "p", "o", step_end=r"\n")
    leaf = Step([])

    def text_of(ids):
        return "".join(["x", "\n", "\n\n", "y\nz"][i] for i in ids)

    steps = [
        diversify.next_step(leaf, ids, True, text_of, s) for ids in ([0, 1, 0], [0, 2, 0], [1, 0, 1, 0], [3, 0], [0, 0], [0, 1])
    ]
    assert [x.ids for x in steps] == [[0, 1], [0, 2], [1, 0, 1], [3], [0, 0], [0, 1]]
    assert [x.ended for x in steps] == [False, False, False, False, True, True]
    assert (
        steps[5].text == "x" and len(leaf.children) == 6
    )  # the end of an answer is another step than the same text that goes on


def test_tree_search_with_a_model(model, tmp_path, monkeypatch):
    """All prompts of a batch in one call; the row's tree, rewards and tokens against each other; the rule sees the row."""
    source = write(tmp_path, "p.jsonl", [{"prompt": f"name {n} fruits", "want": n} for n in ("two", "three", "four")])
    how = dict(n=3, temperature=1.0, max_tokens=40, batch_size=2, iterations=4, step_end="cat", seed=5)
    calls, drawn, given, real = [], [], [], on_policy.continue_ids

    def continued(network, tokenizer, ids, *rest):
        calls.append(len(ids))
        drawn.append(real(network, tokenizer, ids, *rest))
        return drawn[-1]

    monkeypatch.setattr(on_policy, "continue_ids", continued)

    def rule(row, text):
        given.append((row["want"], row["prompt"][0]["content"]))
        return len(text.split()) % 2 == 0

    diversify.sample(
        Strategies(model, source, str(tmp_path / "out"), strategy="plain,mcts", rule=rule, **how), say=(said := []).append
    )
    rows = diversify.read(tmp_path / "out")
    assert calls[:2] == [6, 6] and max(calls) == 6  # plain, then both prompts at once
    assert drawn[0] != drawn[1]  # the first iteration asks what plain has asked, and must not get the same
    assert given and all(content == f"name {want} fruits" for want, content in given)
    for row in rows:
        tree = row["tree"]
        assert tree[0]["parent"] is None and tree[0]["N"] >= row["sampled"] >= 3 and row["sampled"] % 3 == 0
        for i, node in enumerate(tree):
            after = [x for x in tree if x["parent"] == i]
            assert abs(node["Q"]) <= 1 and node["N"] >= sum(x["N"] for x in after) and not (node["ended"] and after)
        rewards = zip(row["responses"], row["strategies"], row["rewards"], strict=True)
        assert all(r == (None if by == "plain" else 1 if len(t.split()) % 2 == 0 else -1) for t, by, r in rewards)
        paths = [""]
        for node in tree[1:]:
            paths.append(paths[node["parent"]] + node["step"])
            assert not node["ended"] or paths[-1] == "" or paths[-1] in row["responses"]
    assert {"plain", "mcts"} == {x for row in rows for x in row["strategies"]}
    asked = 9 + sum(row["sampled"] for row in rows)
    assert f" of {asked} responses did not end" in said[1]
    assert f"; {sum(row['tokens'] for row in rows):,} tokens generated; all in" in said[1]
    with pytest.raises(UserError, match="was begun with iterations 4, now 5; give the same"):
        diversify.sample(
            Strategies(model, source, str(tmp_path / "out"), strategy="plain,mcts", rule=rule, **how | {"iterations": 5})
        )
    alone = dict(strategy="mcts", rule=rule, **how)
    diversify.sample(Strategies(model, source, str(tmp_path / "alone"), **alone))
    whole = (tmp_path / "alone").read_text()
    for left in (1, 2):  # killed in a batch, and between two
        lines = whole.splitlines(keepends=True)
        (tmp_path / "again").write_text("".join(lines[:left]) + lines[left][:30])
        diversify.sample(Strategies(model, source, str(tmp_path / "again"), **alone))
        assert (tmp_path / "again").read_text() == whole


def test_what_tree_search_refuses(model, tmp_path):
    source = write(tmp_path, "p.jsonl", [{"prompt": "Q"}])
    (tmp_path / "rules.py").write_text("def bad(row, text):\n    return 'x'\n")
    rule = f"{tmp_path}/rules.py:bad"
    for how, message in (
        (dict(strategy="mcts"), "strategy mcts needs a reward function: give --rule"),
        (dict(strategy="plain,cot", rule=rule), "strategy plain,cot has none for --rule, which only mcts uses"),
        (dict(strategy="mcts", rule=rule, step_end=""), "step_end ''"),
        (dict(strategy="mcts", rule=rule, exploration=-1.0), "exploration is -1 "),
        (dict(strategy="mcts", rule=rule, iterations=0), "iterations are at least 1"),
        (dict(strategy="mcts", rule="gone.py:f"), "no file.py:function"),
    ):
        with pytest.raises(UserError, match=message):  # before a model is looked for
            diversify.sample(Strategies("org/none", source, str(tmp_path / "out"), **how))
    with pytest.raises(
        UserError, match=r"p.jsonl, prompt [0-9a-f]{16}: .*rules.py:bad cannot score it \(ValueError: could not"
    ):
        diversify.sample(
            Strategies(model, source, str(tmp_path / "out"), strategy="mcts", rule=rule, temperature=1.0, max_tokens=400)
        )


# ---- pairs of steps --------------------------------------------------------------------------------------------------


def test_step_pairs_by_hand(tmp_path):
    tokenizer = family("smollm2")
    tokenizer.save_pretrained(tmp_path / "model")

    def node(parent, step, n, q, ended=False):
        ids = tokenizer(step, add_special_tokens=False)["input_ids"]
        return dict(parent=parent, step=step, ids=ids, N=n, Q=q, ended=ended)

    tree = [
        node(None, "", 9, 0.1), node(0, "a\n", 4, 0.5), node(0, "b\n", 3, -1.0), node(0, "c\n", 1, 1.0),
        node(1, "d\n", 2, 0.0), node(1, "e", 2, 1.0, True), node(1, "", 2, -1.0, True), node(2, "f", 2, 0.5),
        node(2, "g", 2, 0.5), node(5, "h", 2, -1.0, True),
    ]  # fmt: skip
    rows = [{"prompt": "A", "tree": tree}, {"prompt": "B", "responses": ["b"], "scores": [1]}, {"prompt": "C", "tree": [{}]},
            {"prompt": "D", "tree": [node(None, "", 2, "x"), node(0, "a", 2, "x")]}]  # fmt: skip
    sampled, out = write(tmp_path, "s.jsonl", rows), tmp_path / "pairs.jsonl"
    said = []

    def made(**how):
        counts = diversify.steps(Steps(str(tmp_path / "model"), sampled, str(out), **how), say=said.append)
        return counts, diversify.read(out)

    counts, found = made()
    keep = ("prompt", "begun", "chosen_step", "rejected_step", "score_chosen", "score_rejected")
    first = ([user("A")], "", "a\n", "b\n", 0.5, -1.0)  # c was visited once
    second = ([user("A")], "a\n", "e", "d\n", 1.0, 0.0)  # the empty end is no step; f and g are equal
    assert [tuple(row[k] for k in keep) for row in found] == [first, second] and len({row["id"] for row in found}) == 1
    assert counts == {"pairs": 1, "no tree of steps: sample with --strategy mcts": 2, "Q is 'x', not a finite number": 1}
    assert said[0] == f"2 pairs of steps in {out}: mean margin 1.25"
    assert [row["chosen_step"] for row in made(min_visits=1)[1]] == ["c\n", "e"]
    assert [row["chosen_step"] for row in made(min_margin=1.5)[1]] == ["a\n"]
    with pytest.raises(UserError, match="gives no pair: 1 no two next steps that differ as asked"):
        made(min_margin=1.6)
    with pytest.raises(UserError, match="min_visits is 0"):
        made(min_visits=0)
    made()
    examples, report = diversify.load_steps(str(out), tokenizer, data.Reading())
    assert report.kept == report.rows == len(examples) == 2 and [e.margin for e in examples] == [1.5, 1.0]
    texts = [[tokenizer.decode(ids) for ids in e.responses] for e in examples]
    assert texts == [["a\n", "b\n"], ["e<|im_end|>", "d\n"]]
    then = "<|im_start|>assistant\n"
    assert [tokenizer.decode(e.prompt).endswith(end) for e, end in zip(examples, (then, then + "a\n"))] == [True, True]


STEPS = ["Sky is blue.\n", "Grass is green; water is wet.\n\n", "Good day"]


# Of the others an answer is more than its text (an empty think block, a channel), or what transformers alone renders of it is
# not all (parts of contents; no terminator).
TEXT_AND_TERMINATOR = [name for name in FAMILIES if name not in ("qwen3", "qwen3.5", "gpt-oss", "parts", "glm4")]


@pytest.mark.parametrize("name", TEXT_AND_TERMINATOR)
def test_steps_are_the_whole_conversation_cut_in_pieces(name, tmp_path):
    """A search that is answered with a turn's ids, as the template's rendering has them: prompt + step is always its beginning.

    Every step has a rival that ends there; only the last step, and the rivals, have a terminator.
    """
    family(name).save_pretrained(tmp_path)
    tokenizer = data.load_tokenizer(str(tmp_path))
    prompt = [user("Ask me")]

    def rendered(text):
        whole = tokenizer.apply_chat_template([*prompt, {"role": "assistant", "content": text}], tokenize=False)
        return tokenizer(whole, add_special_tokens=False)["input_ids"]

    end = tokenizer.convert_tokens_to_ids(TERMINATOR[name])
    whole, asked = rendered("".join(STEPS)), on_policy.prompt_ids(tokenizer, data.Row(prompt, []))
    assert whole[: len(asked)] == asked
    last = len(whole) - 1 - whole[::-1].index(end)
    rival = tokenizer("Water", add_special_tokens=False)["input_ids"]

    def go_on(ids, max_tokens):
        return [whole[len(ids[0]) : last], rival], [True, True]

    def text_of(ids):
        return tokenizer.decode(ids, skip_special_tokens=True).lstrip()

    tree = Tree(asked, lambda text: -1 if "Water" in text else 1)
    diversify.search([tree], Strategies("m", "p", "o", n=2, iterations=3), go_on, text_of)
    row = {"id": "0", "prompt": prompt, "tree": diversify.nodes(tree.root)}
    pairs = diversify.step_pairs(row, tokenizer, Steps("m", "s", "o", min_visits=1))
    assert len(pairs) == 3 and "".join(p["chosen_step"] for p in pairs) == "".join(STEPS)
    at = len(asked)
    for i, pair in enumerate(pairs):
        ids = pair["prompt_ids"] + pair["chosen_ids"]
        assert pair["prompt_ids"] == whole[:at] and ids == whole[: len(ids)]
        assert tokenizer.decode(pair["chosen_ids"], skip_special_tokens=True).strip() == STEPS[i].strip()
        assert pair["rejected_ids"] == [*rival, end] and (ids[-1] == end) == (i == 2)
        at = len(ids)
    assert at == last + 1


def test_what_is_no_file_of_steps(tmp_path):
    tokenizer = family("smollm2")
    row = {"prompt_ids": [1, 2], "chosen_ids": [3] * 6, "rejected_ids": [4], "score_chosen": 1, "score_rejected": 0}
    for rows, message in (
        ([{"prompt": "A", "chosen": "a", "rejected": "b"}], "row 1: not a pair of steps"),
        ([row, [1]], "row 2: not a pair of steps"),
        ([], "no pairs of steps"),
    ):
        with pytest.raises(UserError, match=message):
            diversify.load_steps(write(tmp_path, "a.jsonl", rows), tokenizer, data.Reading())
    path = write(tmp_path, "b.jsonl", [row])
    with pytest.raises(UserError, match="row 1: 8 tokens, above max_length 7"):
        diversify.load_steps(path, tokenizer, data.Reading(max_length=7))
    assert len(diversify.load_steps(path, tokenizer, data.Reading(max_length=8))[0]) == 1
    with pytest.raises(UserError, match="unknown shape"):  # nobody else takes it for pairs of whole answers
        data.load(path, tokenizer)


def test_the_command_line_from_tree_to_training(model, tmp_path, capsys):
    """sample → steps → train, with a reward function of a file; what the trainer scores are the file's ids."""
    source = write(tmp_path, "p.jsonl", [{"prompt": f"name {n} fruits"} for n in ("two", "three", "four")])
    (tmp_path / "rules.py").write_text("def even(row, text):\n    return len(text.split()) % 2 == 0\n")
    tree, out = str(tmp_path / "tree.jsonl"), str(tmp_path / "steps.jsonl")
    how = "--strategy mcts --iterations 6 --temperature 1 --max-tokens 60 --step-end cat -n 4".split()
    diversify.main(["sample", model, source, tree, "--rule", f"{tmp_path}/rules.py:even", *how])
    diversify.main(["steps", model, tree, out, "--min-visits", "1"])
    rows = diversify.read(Path(out))
    assert f"{len(rows)} pairs of steps in {out}" in capsys.readouterr().err
    given = []
    real = train.train

    def observed(s):
        examples, _ = data.load(s.dataset, None, s)
        given.extend(examples)
        return real(s)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train, "train", observed)
        options = "--objective dpo --eval-size 0 --samples 0 --max-steps 1 --batch-size 4 --dtype fp32".split()
        run, cache = str(tmp_path / "run"), str(tmp_path / "cache")
        diversify.main(["train", "--model", model, "--dataset", out, "--out", run, "--cache", cache, *options])
    assert [e.responses for e in given] == [[r["chosen_ids"], r["rejected_ids"]] for r in rows]
    assert data.load.__module__ == "data" and (tmp_path / "run" / "model").is_dir()
    with pytest.raises(SystemExit) as stopped:
        diversify.main(["steps", model, source, str(tmp_path / "x")])
    assert stopped.value.code == 2 and "no tree of steps" in capsys.readouterr().err


# ---- the world of sums -----------------------------------------------------------------------------------------------


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
    ids = [diversify.WORDS.index(word) + 4 for word in step.split()]  # after four special tokens
    return dict(parent=parent, step=step, ids=ids, N=n, Q=q, ended=ended)


TREE = [node(None, "", 0.0), node(0, "1 + 2 = 3 ;", 0.5), node(0, "1 + 2 = 4 ;", -1.0), node(1, " answer 3", 1.0, 2, True),
        node(1, " answer 4", -1.0, 2, True), node(2, " answer 4", -1.0, 2, True), node(2, " 4 + 4 = 8 ;", 0.0)]  # fmt: skip


def test_sets_are_cut_at_the_same_tokens_and_measured_by_hand(tmp_path):
    ask = [{"role": "user", "content": "1 plus 2"}]
    tokenizer = toy.word_tokenizer(diversify.WORDS)
    tokenizer.save_pretrained(tmp_path / "model")
    row = {"prompt": ask, "responses": ["1 + 2 = 3 ; answer 3", "1 + 2 = 4 ; answer 4"], "tokens": 40, "tree": TREE}
    row["model"] = str(tmp_path / "model")
    assert diversify.within([row | {"tokens": n} for n in (5, 7, 9)], 12) == [row | {"tokens": n} for n in (5, 7)]
    assert [q for q, _ in diversify.judged(row)] == [0.5, -1.0, 1.0, -1.0, -1.0, 0.0]
    assert [x for _, x in diversify.judged(row)] == [True, False, True, False, False, False]
    pairs = diversify.pairs_of([row], tmp_path / "steps.jsonl", True)
    assert [(p["begun"], p["chosen_step"], p["rejected_step"]) for p in pairs] == [
        ("", "1 + 2 = 3 ;", "1 + 2 = 4 ;"),
        ("1 + 2 = 3 ;", " answer 3", " answer 4"),
        ("1 + 2 = 4 ;", " 4 + 4 = 8 ;", " answer 4"),
    ]  # fmt: skip
    (_, second, _) = diversify.load_steps(str(tmp_path / "steps.jsonl"), tokenizer, data.Reading())[0]
    ids = tokenizer("<user> 1 plus 2 <assistant> 1 + 2 = 3 ; answer 3 <end>")["input_ids"]
    assert second.prompt + second.responses[0] == ids and len(second.responses[0]) == 3
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

    monkeypatch.setattr(on_policy, "continue_ids", continued)
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
            if name != "mcts, steps":
                row = {"prompt": p["prompt"]}
                assert diversify.right(row, p["chosen"]) and not diversify.right(row, p["rejected"])
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
    assert (tmp_path / "x.png").exists() == (diversify.pyplot() is not None)
    json.dumps(world)
