"""Pairs of a model's own answers: what is sampled, scored and paired, by hand and again after a kill."""

import datetime
import json
import math
import subprocess
import sys
from pathlib import Path

import on_policy
import pyarrow
import pytest
import torch
from on_policy import Pairing, Sampling, Scoring
from pyarrow import parquet
from templates import family
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import data
from data import Reading, UserError, world_tokenizer

SCORED = {"prompt": "Ask me", "responses": ["Good", "Bad"], "scores": [1, 0]}
THEN = "<|im_start|>assistant\n"


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.fixture(scope="module")
def chatml():
    return family("smollm2")


def write(folder, name, rows):
    path = folder / name
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
    return str(path)


def lines_of(path):
    return [json.loads(line) for line in Path(path).read_text(encoding="utf-8").splitlines()]


@pytest.fixture(scope="module")
def world_model(tmp_path_factory):
    """A folder with an untrained model of the embedded world, which ends a response about once in 70 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = world_tokenizer()
    torch.manual_seed(0)
    small = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    LlamaForCausalLM(LlamaConfig(**small, eos_token_id=3, pad_token_id=3, bos_token_id=None)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    judge = LlamaForSequenceClassification(LlamaConfig(**small, num_labels=1, pad_token_id=0))
    judge.save_pretrained(folder / "judge")
    tokenizer.save_pretrained(folder / "judge")
    return str(folder)


@pytest.fixture(scope="module")
def sampled(world_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sampled")
    prompts = [{"prompt": f"name {n} fruits"} for n in ("two", "three", "four", "five", "two")] + [{"prompt": ""}]
    source = write(folder, "prompts.jsonl", prompts)
    out = str(folder / "out" / "sampled.jsonl")
    options = dict(n=4, temperature=1.0, max_tokens=40, batch_size=2, seed=5)
    on_policy.sample(Sampling(world_model, source, out, **options))
    return source, out, options


def test_sample_writes_each_prompt_once(sampled, world_model):
    source, out, options = sampled
    rows = lines_of(out)
    assert [row["prompt"] for row in rows] == [[user(f"name {n} fruits")] for n in ("two", "three", "four", "five")]
    assert len({row["id"] for row in rows}) == 4
    assert 14 <= sum(row["unfinished"] + len(row["responses"]) for row in rows) <= 16  # 4 each; equal ones are kept once
    assert 0 < sum(row["unfinished"] for row in rows) < 16
    assert all("<" not in text and len(text.split()) < 40 for row in rows for text in row["responses"])
    assert all(row["strategies"] == ["plain"] * len(row["responses"]) for row in rows)
    made = {
        "model": world_model, "strategy": "plain", "n": 4, "batch_size": 2, "temperature": 1.0, "top_p": 0.95, "max_tokens": 40,
        "seed": 5,
    }  # fmt: skip
    assert {k: rows[0][k] for k in made} == made
    with pytest.raises(UserError, match="was begun with n 4, now 3; seed 5, now 6; give the same"):
        on_policy.sample(Sampling(world_model, source, out, **options | {"n": 3, "seed": 6}))
    with pytest.raises(UserError, match="is read and written at once"):
        on_policy.sample(Sampling(world_model, out, out, **options))


@pytest.mark.parametrize("left", [1, 2])
def test_a_killed_sample_goes_on_to_the_same_result(sampled, world_model, tmp_path, left):
    source, out, options = sampled
    whole = Path(out).read_text()
    lines = whole.splitlines(keepends=True)
    (tmp_path / "again.jsonl").write_text("".join(lines[:left]) + lines[left][:30])  # killed in the middle of a line
    on_policy.sample(Sampling(world_model, source, str(tmp_path / "again.jsonl"), **options))
    assert sorted((tmp_path / "again.jsonl").read_text().splitlines()) == sorted(whole.splitlines())


def test_sample_copies_what_a_rule_wants_to_see(world_model, tmp_path):
    given = {
        "prompt": "name two fruits",
        "answer": 7,
        "source": "mine",
        "chosen": "pear",
        "n": "theirs",
        "scores": [1.0],
        "sampled": "x",
    }
    source, (out, scored) = write(tmp_path, "prompts.jsonl", [given]), (str(tmp_path / f"{x}.jsonl") for x in "ab")
    on_policy.sample(Sampling(world_model, source, out, n=4, temperature=1.0, max_tokens=60))
    (row,) = lines_of(out)
    assert (row["answer"], row["source"], row["n"]) == (7, "mine", 4) and not {"chosen", "scores", "sampled"} & {*row}
    on_policy.score(Scoring(out, scored, rule=lambda row, response: row["answer"]))
    assert lines_of(scored)[0]["scores"] == [7.0] * len(row["responses"])


@pytest.mark.parametrize("in_hardware, dtype", [(True, torch.bfloat16), (False, torch.float32)])
def test_a_bf16_model_answers_in_fp32_where_bf16_is_emulated(world_model, tmp_path, monkeypatch, in_hardware, dtype):
    LlamaForCausalLM.from_pretrained(world_model, dtype=torch.bfloat16).save_pretrained(tmp_path)
    monkeypatch.setattr(on_policy, "bf16_in_hardware", lambda device: in_hardware)
    exact = on_policy._load_model(world_model, "CausalLM", torch.device("cpu"))
    assert exact.dtype == torch.float32
    model = on_policy._load_model(str(tmp_path), "CausalLM", torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {dtype} and not model.training


def test_greedy_samples_are_equal_and_kept_once(world_model, tmp_path):
    source = write(tmp_path, "p.jsonl", [{"prompt": "name two fruits"}])
    for strategy in ("plain", "cot", "dts"):
        out = str(tmp_path / strategy)
        how = dict(n=3, temperature=0, max_tokens=5, strategy=strategy, keep_unfinished=True)
        on_policy.sample(Sampling(world_model, source, out, **how))
        (row,) = lines_of(out)
        assert len(row["responses"]) == 1 and row["prompt"] == [user("name two fruits")]


def test_strategies_ask_as_they_say(world_model, tmp_path, monkeypatch):
    asked = []

    def answers(model, tokenizer, prompts, s, seed):
        asked.append([p[-1]["content"] for p in prompts])
        plan = "1. first\nsome text\n2) second" if "approaches" in asked[-1][0] else "an answer"
        texts = [f"{plan} {i}" if plan == "an answer" else plan for i in range(len(prompts))]
        return texts, [True for _ in prompts], [7 if texts == [plan] else 10 for _ in prompts]

    monkeypatch.setattr(on_policy, "_answers", answers)
    source = write(tmp_path, "p.jsonl", [{"prompt": "Q"}])
    on_policy.sample(Sampling(world_model, source, str(tmp_path / "cot"), n=2, strategy="cot"))
    on_policy.sample(Sampling(world_model, source, str(tmp_path / "dts"), n=3, strategy="dts"))
    assert asked[0] == ["Q" + on_policy.STEP_BY_STEP] * 2
    assert asked[1] == ["Q" + on_policy.APPROACHES.format(n=3)]
    assert asked[2] == ["Q" + on_policy.BY_APPROACH.format(approach=a) for a in ("first", "second")] + ["Q"]  # one was missing
    assert lines_of(tmp_path / "dts")[0]["responses"] == ["an answer 0", "an answer 1", "an answer 2"]
    assert [lines_of(tmp_path / name)[0]["tokens"] for name in ("cot", "dts")] == [20, 37]  # naming approaches took 7
    on_policy.sample(
        Sampling(world_model, source, str(tmp_path / "all"), n=2, strategy="cot,plain")
    )  # the same answers: the first is named
    (row,) = lines_of(tmp_path / "all")
    assert asked[3:] == [["Q" + on_policy.STEP_BY_STEP] * 2, ["Q"] * 2]
    assert row["responses"] == ["an answer 0", "an answer 1"] and row["strategies"] == ["cot", "cot"]
    with pytest.raises(UserError, match="strategy is 'best'"):
        on_policy.sample(Sampling(world_model, source, str(tmp_path / "x"), strategy="best"))


LETTERS = dict(n=2, step_end=";", max_tokens=9)


def search(script, iterations, rewards=(("+", 1), ("", -1)), **how):
    """_search of one prompt [0] whose answers are read from a script {tree's text: answers}; tokens are characters, "." ends.

    The reward is that of the first key which the answer's text has in it.
    """
    s, asked = Sampling("m", "p", "o", iterations=iterations, **LETTERS | how), []

    def go_on(ids, max_tokens):
        asked.append(("".join(map(chr, ids[0][1:])), len(ids), max_tokens))
        answers = [script[asked[-1][0]][i] for i in range(len(ids))]
        return [list(map(ord, a.rstrip("."))) for a in answers], [a.endswith(".") for a in answers]

    reward = lambda text: next(value for key, value in rewards if key in text)  # noqa: E731
    (found,) = on_policy._search([[0]], [reward], s, go_on, lambda ids: "".join(map(chr, ids)))
    return found, asked


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
    root = on_policy.Step([], n=9)
    a, b = (on_policy.Step([i], str(i), root, n=n, w=w) for i, (n, w) in enumerate(((2, 1.0), (6, 4.0))))
    root.children = {("0", False): a, ("1", False): b}
    assert on_policy._ucb(a, 2.0) == pytest.approx(0.5 + 2 * 1.0481470, abs=1e-6)  # √(2.1972246 / 2)
    assert on_policy._ucb(b, 2.0) == pytest.approx(4 / 6 + 2 * 0.6051480, abs=1e-6)
    equal = (4 / 6 - 1 / 2) / (1.0481470 - 0.6051480)
    assert (
        on_policy._leaf(root, equal + 1e-4) is a
        and on_policy._leaf(root, equal - 1e-4) is b
        and on_policy._leaf(root, 0.0) is b
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


def test_a_step_ends_where_the_setting_says(world_model, tmp_path, monkeypatch):
    """Through `sample`, with ids of the embedded world: "\\n" is a newline; a step is whole tokens."""
    s = Sampling("m", "p", "o", step_end=r"\n")
    leaf = on_policy.Step([])
    text_of = lambda ids: "".join(["x", "\n", "\n\n", "y\nz"][i] for i in ids)  # noqa: E731
    steps = [
        on_policy._next_step(leaf, ids, True, text_of, s)
        for ids in ([0, 1, 0], [0, 2, 0], [1, 0, 1, 0], [3, 0], [0, 0], [0, 1])
    ]
    assert [x.ids for x in steps] == [[0, 1], [0, 2], [1, 0, 1], [3], [0, 0], [0, 1]]
    assert [x.ended for x in steps] == [False, False, False, False, True, True]
    assert (
        steps[5].text == "x" and len(leaf.children) == 6
    )  # the end of an answer is another step than the same text that goes on


def test_tree_search_with_a_model(world_model, tmp_path, monkeypatch):
    """All prompts of a batch in one call; the row's tree, rewards and tokens against each other; the rule sees the row."""
    source = write(tmp_path, "p.jsonl", [{"prompt": f"name {n} fruits", "want": n} for n in ("two", "three", "four")])
    how = dict(n=3, temperature=1.0, max_tokens=40, batch_size=2, iterations=4, step_end="cat", seed=5)
    calls, drawn, given, real = [], [], [], on_policy._continued

    def continued(model, tokenizer, ids, *rest):
        calls.append(len(ids))
        drawn.append(real(model, tokenizer, ids, *rest))
        return drawn[-1]

    monkeypatch.setattr(on_policy, "_continued", continued)

    def rule(row, text):
        given.append((row["want"], row["prompt"][0]["content"]))
        return len(text.split()) % 2 == 0

    on_policy.sample(
        Sampling(world_model, source, str(tmp_path / "out"), strategy="plain,mcts", rule=rule, **how), say=(said := []).append
    )
    rows = lines_of(tmp_path / "out")
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
        on_policy.sample(
            Sampling(world_model, source, str(tmp_path / "out"), strategy="plain,mcts", rule=rule, **how | {"iterations": 5})
        )
    alone = dict(strategy="mcts", rule=rule, **how)
    on_policy.sample(Sampling(world_model, source, str(tmp_path / "alone"), **alone))
    whole = (tmp_path / "alone").read_text()
    for left in (1, 2):  # killed in a batch, and between two
        lines = whole.splitlines(keepends=True)
        (tmp_path / "again").write_text("".join(lines[:left]) + lines[left][:30])
        on_policy.sample(Sampling(world_model, source, str(tmp_path / "again"), **alone))
        assert (tmp_path / "again").read_text() == whole


def test_what_tree_search_refuses(world_model, tmp_path):
    source = write(tmp_path, "p.jsonl", [{"prompt": "Q"}])
    (tmp_path / "rules.py").write_text("def bad(row, text):\n    return 'x'\n")
    rule = f"{tmp_path}/rules.py:bad"
    for how, message in (
        (dict(strategy="mcts"), "strategy mcts needs a rule: give --rule"),
        (dict(strategy="plain,cot", rule=rule), "strategy plain,cot has none for --rule, which only mcts uses"),
        (dict(strategy="mcts", rule=rule, step_end=""), "step_end ''"),
        (dict(strategy="mcts", rule=rule, exploration=-1.0), "exploration is -1 "),
        (dict(strategy="mcts", rule=rule, iterations=0), "iterations are at least 1"),
        (dict(strategy="mcts", rule="gone.py:f"), "no file.py:function"),
    ):
        with pytest.raises(UserError, match=message):  # before a model is looked for
            on_policy.sample(Sampling("org/none", source, str(tmp_path / "out"), **how))
    with pytest.raises(
        UserError, match=r"p.jsonl, prompt [0-9a-f]{16}: .*rules.py:bad cannot score it \(ValueError: could not"
    ):
        on_policy.sample(
            Sampling(world_model, source, str(tmp_path / "out"), strategy="mcts", rule=rule, temperature=1.0, max_tokens=400)
        )


def test_files_without_tokens_go_on(sampled, world_model, tmp_path):
    """Rows of a version that counted none: the rest is added, and no sum is said."""
    source, out, options = sampled
    old = [{k: v for k, v in row.items() if k != "tokens"} for row in lines_of(out)[:2]]
    again = write(tmp_path, "again.jsonl", old)
    on_policy.sample(Sampling(world_model, source, again, **options), say=(said := []).append)
    assert lines_of(again) == old + lines_of(out)[2:] and "tokens generated" not in said[1]


def test_tokens_are_counted_with_the_terminator(world_model, tmp_path, monkeypatch):
    monkeypatch.setattr(on_policy, "_continued", lambda *how: ([[5, 6], [5, 6, 7], []], [True, False, True]))
    source = write(tmp_path, "p.jsonl", [{"prompt": "Q"}])
    on_policy.sample(Sampling(world_model, source, str(tmp_path / "out"), n=3))
    assert lines_of(tmp_path / "out")[0]["tokens"] == 2 + 1 + 3 + 0 + 1


def test_score_by_a_rule_and_by_a_model(sampled, world_model, tmp_path):
    _, out, _ = sampled
    (tmp_path / "rules.py").write_text("def words(row, text):\n    return len(text.split())\n")
    by_rule, by_model = str(tmp_path / "rule.jsonl"), str(tmp_path / "model.jsonl")
    on_policy.score(Scoring(out, by_rule, rule=f"{tmp_path}/rules.py:words"))
    rows = lines_of(by_rule)
    assert [row["scores"] for row in rows] == [[len(x.split()) for x in row["responses"]] for row in lines_of(out)]
    on_policy.score(Scoring(out, by_model, reward_model=f"{world_model}/judge"))
    judge, tokenizer = LlamaForSequenceClassification.from_pretrained(f"{world_model}/judge"), world_tokenizer()
    for row in lines_of(by_model):  # the rendering by hand
        for text, value in zip(row["responses"], row["scores"]):
            ids = tokenizer(f"<user> {row['prompt'][0]['content']} <assistant> {text} <end>", return_tensors="pt")["input_ids"]
            assert judge(input_ids=ids).logits.item() == pytest.approx(value, abs=1e-6)
    many = write(
        tmp_path, "many.jsonl", [{**row, "responses": [*row["responses"], "plum", "fig " * 9]} for row in lines_of(out)]
    )
    for size in (1, 3, 100):  # padded together or one at a time: the same
        on_policy.score(Scoring(many, str(tmp_path / f"many{size}"), reward_model=f"{world_model}/judge", batch_size=size))
        scores = [s for row in lines_of(tmp_path / f"many{size}") for s in row["scores"]]
        assert scores == pytest.approx([s for row in lines_of(tmp_path / "many1") for s in row["scores"]], abs=1e-6)
    assert len(set(scores)) > 8
    whole = Path(by_rule).read_text()
    Path(by_rule).write_text(whole[: len(whole) // 2])
    on_policy.score(Scoring(out, by_rule, rule=f"{tmp_path}/rules.py:words"))
    assert Path(by_rule).read_text() == whole
    for wrong in ("gone.py:words", f"{tmp_path}/rules.py:none", "nothing", "no.such.module:f"):
        with pytest.raises(UserError, match="no file.py:function or module:function"):
            on_policy.score(Scoring(out, str(tmp_path / "x"), rule=wrong))
    with pytest.raises(UserError, match="either reward_model or rule"):
        on_policy.score(Scoring(out, str(tmp_path / "x")))


def test_what_sampling_says(sampled, world_model, tmp_path):
    """Every number of the summary against the rows that were written; what is there already is counted."""
    source, out, options = sampled
    said, again = [], str(tmp_path / "again.jsonl")
    Path(again).write_text("".join(Path(out).read_text().splitlines(keepends=True)[:2]))
    on_policy.sample(Sampling(world_model, source, again, **options), say=said.append)
    begin = f"sample: {world_model} on cpu, 4 prompts, 4 responses each (plain), temperature 1, top_p 0.95, at most 40 tokens"
    assert said[0] == f"{begin}; 2 are in {again} already" and len(said) == 2
    kept, open_ends = (sum(f(row) for row in lines_of(out)) for f in (lambda r: len(r["responses"]), lambda r: r["unfinished"]))
    start = f"4 prompts, {kept} responses kept; {open_ends} of 16 responses did not end within 40 tokens: raise --max_tokens"
    assert said[1].startswith(start) and said[1].endswith(f"all in {again}")
    assert (f"; {16 - kept - open_ends} were equal" in said[1]) == (kept + open_ends < 16)
    with pytest.raises(UserError, match="nothing to keep: 4 prompts, 0 responses kept; 16 of 16 .*: raise --max_tokens"):
        on_policy.sample(Sampling(world_model, source, str(tmp_path / "none.jsonl"), **options | {"max_tokens": 1, "seed": 1}))
    assert not (tmp_path / "none.jsonl").exists()


def test_equal_responses_are_counted(world_model, tmp_path, monkeypatch):
    monkeypatch.setattr(
        on_policy,
        "_answers",
        lambda model, tokenizer, prompts, s, seed: (["A", "A", "", "B", "C"], [True] * 4 + [False], [2] * 5),
    )
    said, source = [], write(tmp_path, "p.jsonl", [{"prompt": "Q"}])
    on_policy.sample(Sampling(world_model, source, str(tmp_path / "out"), n=5), say=said.append)
    assert said[1].startswith(
        "1 prompts, 2 responses kept; 1 of 5 responses did not end within 512 tokens: raise --max_tokens; "
    )
    assert "; 2 were equal to another one or empty; 10 tokens generated; " in said[1]


def test_what_scoring_and_pairing_say(tmp_path):
    """By hand: scores 1 3, 2 2, 4: mean 2.4, variance (34 − 5·2.4²)/5 = 1.04; pairs of margin 2 and 1, longer in one."""
    rows = [{"prompt": p, "responses": r} for p, r in (("A", ["a", "aaa"]), ("B", ["bb", "bb"]), ("C", ["cccc"]))]
    source, out, said = write(tmp_path, "s.jsonl", rows), str(tmp_path / "o.jsonl"), []
    score = lambda: on_policy.score(Scoring(source, out, rule=lambda row, text: len(text)), say=said.append)  # noqa: E731
    score()
    end = "3 rows, 5 scores: mean 2.4, standard deviation 1.02, 1 to 4; 2 rows have no two different scores, so no pair"
    assert said[1] == end and "already" not in said[0]
    score()
    assert said[2].endswith(f"3 rows; 3 are in {out} already") and said[3] == end
    with pytest.raises(UserError, match="1 rows without any response: nothing to score"):
        on_policy.score(Scoring(write(tmp_path, "e.jsonl", [{"prompt": "A", "responses": []}]), str(tmp_path / "no"), rule=len))
    sampled = write(tmp_path, "sampled.jsonl", [{"id": "1", "prompt": "A", "responses": ["a"]}])
    with pytest.raises(UserError, match="holds rows without scores"):
        on_policy.score(Scoring(out, sampled, rule=len))
    scored = [
        {"prompt": "A", "responses": ["a", "aaa"], "scores": [0, 2]},
        {"prompt": "B", "responses": ["b", "bb"], "scores": [1, 0]},
        {"prompt": "C", "responses": ["c"], "scores": [1]},
    ]  # fmt: skip
    said.clear()
    on_policy.pairs(Pairing(write(tmp_path, "c.jsonl", scored), str(tmp_path / "p.jsonl")), say=said.append)
    assert said[1:] == [
        f"2 pairs in {tmp_path / 'p.jsonl'}: mean margin 1.5, chosen longer in 50%",
        "  1 without: fewer than two responses",
    ]
    with pytest.raises(UserError, match="gives no pair: .* Lower --min_margin"):
        on_policy.pairs(Pairing(str(tmp_path / "c.jsonl"), str(tmp_path / "no"), min_margin=9))
    assert not (tmp_path / "no").exists()


def test_columns_that_json_cannot_hold_are_passed_on(tmp_path):
    """A lone surrogate as its escape, a date as its text."""
    row = {"prompt": "A", "responses": ["a"], "note": "\ud800", "day": datetime.date(2020, 1, 2)}
    parquet.write_table(pyarrow.Table.from_pylist([{**row, "note": "x"}]), tmp_path / "s.parquet")
    (tmp_path / "s.jsonl").write_text(json.dumps({**row, "day": None}) + "\n")
    for name, (note, day) in {"s.parquet": ("x", "2020-01-02"), "s.jsonl": ("\ud800", None)}.items():
        on_policy.score(Scoring(str(tmp_path / name), str(tmp_path / f"{name}.out"), rule=lambda row, text: 1))
        (out,) = lines_of(tmp_path / f"{name}.out")
        assert (out["note"], out["day"], out["scores"]) == (note, day, [1.0])


RULES = {
    "exits.py:f": ("import sys\nsys.exit()", "no file.py:function or module:function .SystemExit"),
    "raises.py:f": ("1 / 0", "no file.py:function or module:function .ZeroDivisionError: division by zero"),
    "broken.py:f": ("def f(:", "no file.py:function or module:function .SyntaxError"),
    "number.py:f": ("f = 3", "which is a int and no function"),
    "later.py:f": ("import sys\nf = lambda row, text: sys.exit()", "s.jsonl row 1: .*later.py:f cannot score it .SystemExit"),
}


@pytest.mark.parametrize("name", RULES)
def test_a_rule_that_is_none(name, tmp_path):
    text, message = RULES[name]
    (tmp_path / name.partition(":")[0]).write_text(text)
    source = write(tmp_path, "s.jsonl", [{"prompt": "A", "responses": ["a", "b"]}])
    with pytest.raises(UserError, match=message):
        on_policy.score(Scoring(source, str(tmp_path / "out"), rule=f"{tmp_path}/{name}"))
    assert not (tmp_path / "out").exists()


def test_outputs_that_cannot_be_written(world_model, tmp_path):
    source = write(tmp_path, "s.jsonl", [{**SCORED}])
    (tmp_path / "file").write_text("")
    for out, why in (
        (str(tmp_path), "a folder"),
        (f"{tmp_path}/file/out", "File exists|Not a directory"),
        ("x" * 300, "too long"),
    ):
        for call in (lambda: on_policy.sample(Sampling("org/none", source, out)),  # noqa: B023
                     lambda: on_policy.score(Scoring(source, out, rule=len)), lambda: on_policy.pairs(Pairing(source, out))):  # noqa: B023 # fmt: skip
            with pytest.raises(UserError, match=f"cannot be written .*({why})"):
                call()
    with pytest.raises(UserError, match="no file that could be continued"):
        on_policy.sample(Sampling("org/none", source, "/dev/null"))


def test_models_without_finite_weights_are_named(world_model, tmp_path):
    model = LlamaForCausalLM.from_pretrained(world_model)
    model.lm_head.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "m")
    world_tokenizer().save_pretrained(tmp_path / "m")
    source = write(tmp_path, "p.jsonl", [{"prompt": "Q"}])
    with pytest.raises(UserError, match="its probabilities are not finite numbers"):
        on_policy.sample(Sampling(str(tmp_path / "m"), source, str(tmp_path / "out")))


def test_padding_of_a_reward_model_without_a_padding_token(world_model, tmp_path):
    judge = LlamaForSequenceClassification.from_pretrained(f"{world_model}/judge")
    judge.config.pad_token_id = None
    judge.save_pretrained(tmp_path / "judge")
    world_tokenizer().save_pretrained(tmp_path / "judge")
    source = write(
        tmp_path, "s.jsonl", [{"prompt": "name two fruits", "responses": ["fig", "fig , plum and pear", "fig , plum"]}]
    )
    for size in (1, 8):
        on_policy.score(Scoring(source, str(tmp_path / f"{size}"), reward_model=str(tmp_path / "judge"), batch_size=size))
    (one,), (batch,) = (lines_of(tmp_path / f"{size}") for size in (1, 8))
    assert batch["scores"] == pytest.approx(one["scores"], abs=1e-6) and len(set(one["scores"])) == 3


def test_what_cannot_be_scored_is_named(world_model, tmp_path, capsys):
    bodies = {"fails": "1 / 0", "words": "text", "none": "float('nan')"}
    (tmp_path / "rules.py").write_text("".join(f"def {k}(row, text):\n    return {v}\n" for k, v in bodies.items()))
    source = write(tmp_path, "s.jsonl", [{"prompt": "A", "responses": ["a", "b"]}])
    for rule, message in (("fails", "division by zero"), ("words", "could not convert"), ("none", "not a finite number")):
        with pytest.raises(UserError, match=rf"s.jsonl row 1: .*rules.py:{rule} cannot score it .*{message}"):
            on_policy.score(Scoring(source, str(tmp_path / "out"), rule=f"{tmp_path}/rules.py:{rule}"))
    with pytest.raises(UserError, match="is another kind of model, it lacks score.weight"):
        on_policy.score(Scoring(source, str(tmp_path / "out"), reward_model=world_model))
    capsys.readouterr()
    bad = write(tmp_path, "bad.jsonl", [{"q": i} for i in range(7)])
    with pytest.raises(UserError, match="no row with a usable prompt"):
        on_policy.pairs(Pairing(bad, str(tmp_path / "out")))
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 6 and said[0].startswith(f"{bad} row 1: left out (unknown shape") and "7 rows left out" in said[5]
    with pytest.raises(UserError, match="gives no pair: 1 responses and scores are not two lists"):
        on_policy.pairs(Pairing(source, str(tmp_path / "out")))
    with pytest.raises(SystemExit) as error:  # a folder where a file should be written
        on_policy.main(["pairs", "--scored", write(tmp_path, "t.jsonl", [SCORED]), "--out", str(tmp_path)])
    assert error.value.code == 2 and capsys.readouterr().err == f"error: {tmp_path}: cannot be written (a folder)\n"


def test_answers_of_several_files_and_rows_are_joined_by_prompt(tmp_path):
    one = write(
        tmp_path,
        "one.jsonl",
        [{"prompt": "A", "responses": ["a1"], "scores": [1]}, {"prompt": "B", "responses": [], "scores": []}],
    )
    two = write(tmp_path, "two.jsonl", [{"prompt": "A", "responses": ["a2", "a1"], "scores": [0, 1]}])
    counts = on_policy.pairs(Pairing(f"{one}, {two}", str(tmp_path / "pairs.jsonl")))
    (pair,) = lines_of(tmp_path / "pairs.jsonl")
    assert (pair["chosen"], pair["rejected"]) == ("a1", "a2") and counts == {"pairs": 1, "fewer than two responses": 1}
    with pytest.raises(UserError, match="here it has no meaning"):
        on_policy.pairs(Pairing(f"{one}@2", str(tmp_path / "pairs.jsonl")))


def test_pairs_replace_pairs_of_their_own_and_nothing_else(tmp_path):
    scored = write(tmp_path, "s.jsonl", [{"prompt": "P", "responses": ["a", "b"], "scores": [1, 0]}])
    out = tmp_path / "p.jsonl"
    for content, refused in (
        (b"", False),
        (b'{"prompt": "mine"}\n', True),
        (b"a thesis\n", True),
        (b"\xff", True),
        (b"[]", True),
    ):
        out.write_bytes(content)
        if refused:
            with pytest.raises(UserError, match="is there, and not as pairs"):
                on_policy.pairs(Pairing(scored, str(out)))
            assert out.read_bytes() == content
        else:
            on_policy.pairs(Pairing(scored, str(out)))
    out.unlink()
    on_policy.pairs(Pairing(scored, str(out)))
    first = out.read_text()
    on_policy.pairs(Pairing(scored, str(out)))
    assert out.read_text() == first and sorted(p.name for p in tmp_path.iterdir()) == ["p.jsonl", "s.jsonl"]


def test_pairs_by_hand(tmp_path, chatml):
    rows = [
        {"prompt": "A", "responses": ["a1", "a2", "a3"], "scores": [0.2, 0.9, 0.1]},
        {"prompt": "B", "responses": ["b1", "b2"], "scores": [1, 1]},
        {"prompt": "C", "responses": ["c1"], "scores": [1]},
        {"prompt": "D", "responses": ["d1", "d2"], "scores": [0.3, 0.4]},
        {"prompt": "E", "responses": ["e1", "e2"], "scores": [0.3, math.nan]},
    ]
    scored, out = write(tmp_path, "s.jsonl", rows), str(tmp_path / "pairs.jsonl")
    made = lambda **how: (on_policy.pairs(Pairing(scored, out, **how)), [(r["chosen"], r["rejected"]) for r in lines_of(out)])  # noqa: E731
    counts, found = made()
    assert found == [("a2", "a3"), ("d2", "d1")] and counts["pairs"] == 2
    assert counts["fewer than two responses"] == 1 and counts["scores is 'nan', not a finite number"] == 1
    assert sum(counts.values()) == 5
    assert made(min_margin=0.2)[1] == [("a2", "a3")]
    assert {made(how="correct", seed=seed)[1][0] for seed in range(20)} == {("a2", "a1"), ("a2", "a3")}
    assert {made(how="random", seed=seed)[1][0] for seed in range(30)} == {("a2", "a1"), ("a2", "a3"), ("a1", "a3")}
    on_policy.pairs(Pairing(scored, out))
    examples, report = data.load(out, chatml, Reading(min_score_margin=0.5))
    assert len(examples) == 1 and chatml.decode(examples[0].responses[0]) == "a2<|im_end|>"
    with pytest.raises(UserError, match="how is 'worst'"):
        on_policy.pairs(Pairing(scored, out, how="worst"))


def test_step_pairs_by_hand(tmp_path, chatml):
    node = lambda parent, step, n, q, ended=False: dict(parent=parent, step=step, N=n, Q=q, ended=ended)  # noqa: E731
    tree = [
        node(None, "", 9, 0.1), node(0, "a\n", 4, 0.5), node(0, "b\n", 3, -1.0), node(0, "c\n", 1, 1.0),
        node(1, "d\n", 2, 0.0), node(1, "e", 2, 1.0, True), node(1, "", 2, -1.0, True), node(2, "f", 2, 0.5),
        node(2, "g", 2, 0.5), node(5, "h", 2, -1.0, True),
    ]  # fmt: skip
    rows = [{"prompt": "A", "tree": tree}, {"prompt": "B", "responses": ["b"], "scores": [1]}, {"prompt": "C", "tree": [{}]},
            {"prompt": "D", "tree": [node(None, "", 2, "x"), node(0, "a", 2, "x")]}]  # fmt: skip
    sampled, out = write(tmp_path, "s.jsonl", rows), str(tmp_path / "pairs.jsonl")
    made = lambda **how: (on_policy.pairs(Pairing(sampled, out, how="step", **how)), lines_of(out))  # noqa: E731
    counts, found = made()
    keep = ("prompt", "chosen", "rejected", "chosen_ends", "rejected_ends", "score_chosen", "score_rejected")
    first = ([user("A")], "a\n", "b\n", False, False, 0.5, -1.0)  # c was visited once
    second = ([user("A"), assistant("a\n")], "e", "d\n", True, False, 1.0, 0.0)  # the empty end is no step; f and g are equal
    assert [tuple(row[k] for k in keep) for row in found] == [first, second] and len({row["id"] for row in found}) == 1
    assert counts == {"pairs": 1, "no tree of steps: sample with --strategy mcts": 2, "Q is 'x', not a finite number": 1}
    assert [row["chosen"] for row in made(min_visits=1)[1]] == ["c\n", "e"]
    assert [row["chosen"] for row in made(min_margin=1.5)[1]] == ["a\n"]
    with pytest.raises(UserError, match="gives no pair: 1 no two next steps that differ as asked"):
        made(min_margin=1.6)
    with pytest.raises(UserError, match="min_visits is 0"):
        made(min_visits=0)
    rewarded = {"responses": ["a\nd\n", "a\ne"], "rewards": [-1, 1]}
    answers = write(tmp_path, "r.jsonl", [rows[0] | rewarded])
    on_policy.pairs(Pairing(answers, str(tmp_path / "a.jsonl"), how="correct"))  # whole answers, by the rewards of the search
    assert [(r["chosen"], r["score_rejected"]) for r in lines_of(tmp_path / "a.jsonl")] == [("a\ne", -1)]
    on_policy.pairs(Pairing(write(tmp_path, "q.jsonl", [rows[0] | rewarded | {"scores": [3, 2]}]), str(tmp_path / "a.jsonl")))
    assert lines_of(tmp_path / "a.jsonl")[0]["chosen"] == "a\nd\n"  # scores come first
    made()
    examples, report = data.load(out, chatml)
    assert "format steps" in report.formats[0]
    texts = [[chatml.decode(ids) for ids in e.responses] for e in examples]
    assert texts == [["a\n", "b\n"], ["e<|im_end|>", "d\n"]]
    assert [chatml.decode(e.prompt).endswith(end) for e, end in zip(examples, (THEN, THEN + "a\n"))] == [True, True]


def test_prompts_of_benchmarks(tmp_path, capsys):
    """AlpacaEval's and Arena-Hard's rows; a repeated prompt has the same id; what is no single turn is named."""
    rows = [{"instruction": "Q"}, {"question_id": 1, "turns": [{"content": "R"}]}, {"prompt": "Q"}, {"instruction": ""},
            {"turns": [{"content": "a"}, {"content": "b"}]}, {"turns": "a"}, {"instruction": "Q", "dataset": "d"}]  # fmt: skip
    source = write(tmp_path, "p.jsonl", rows)
    found = list(on_policy.prompts_of(source))
    assert [p[0]["content"] for _, _, p in found] == ["Q", "R", "Q", "Q"] and found[3][1]["dataset"] == "d"
    first = found[0][1]["id"]
    assert [row["id"] == first for _, row, _ in found] == [True, False, True, True]
    said = capsys.readouterr().err
    assert said.count("left out") == 3 and said.count("turns is not a list of one turn") == 2


def test_sample_keeps_unfinished_when_asked(sampled, world_model, tmp_path):
    """The same draws as without: finished answers are the same texts, the others are there too, as many as are counted."""
    source, out, options = sampled
    on_policy.sample(Sampling(world_model, source, str(tmp_path / "all.jsonl"), **options, keep_unfinished=True))
    for kept, dropped in zip(lines_of(tmp_path / "all.jsonl"), lines_of(out), strict=True):
        assert len(kept["responses"]) >= 3 and kept["unfinished"] == dropped["unfinished"] and kept["id"] == dropped["id"]
        assert [x for x in kept["responses"] if x in dropped["responses"]] == dropped["responses"]
    assert sum(row["unfinished"] for row in lines_of(out)) > 0


def test_another_output_is_not_continued(world_model, tmp_path):
    source = write(tmp_path, "p.jsonl", [{"prompt": "Q"}])
    (tmp_path / "out").write_text("notes\n")
    with pytest.raises(UserError, match="cannot be continued"):
        on_policy.sample(Sampling(world_model, source, str(tmp_path / "out")))
    assert (tmp_path / "out").read_text() == "notes\n"


# ---- the command line ------------------------------------------------------------------------------------------------


def run(*argv):
    """(code, messages) of on_policy.py as a process."""
    command = [sys.executable, on_policy.__file__, *map(str, argv)]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True)
    return done.returncode, done.stderr.decode()


def test_ctrl_c_says_how_to_go_on(tmp_path):
    source, out = write(tmp_path, "s.jsonl", [{"prompt": p, "responses": ["a", "b"]} for p in "ABC"]), tmp_path / "out"
    (tmp_path / "r.py").write_text(
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background lacks\n"
        "def f(row, x):\n    row['prompt'] == 'B' and os.kill(os.getpid(), signal.SIGINT)\n    return 1"
    )
    code, err = run("score", source, out, "--rule", f"{tmp_path}/r.py:f")
    assert code == 130 and err.endswith("stopped; nothing is lost, the same command goes on from here\n")
    assert "Traceback" not in err and [row["prompt"] for row in lines_of(out)] == ["A"]


def test_the_commands(tmp_path, capsys):
    scored = write(tmp_path, "s.jsonl", [SCORED, SCORED, {**SCORED, "prompt": "Beg", "scores": [1, 1]}])
    on_policy.main(["pairs", "--scored", scored, "--out", str(tmp_path / "pairs.jsonl"), "--min-margin", "0.5"])
    said = capsys.readouterr()
    assert said.out == "" and "1 without: no two responses that differ" in said.err
    with pytest.raises(SystemExit) as error:
        on_policy.main(["score", "--responses", scored, "--out", "x"])
    assert error.value.code == 2 and capsys.readouterr().err.startswith("error: ")


@pytest.mark.parametrize("command", on_policy.COMMANDS)
def test_every_command_has_help(command, capsys):
    with pytest.raises(SystemExit) as stop:
        on_policy.main([command, "--help"])
    said = capsys.readouterr().out
    assert stop.value.code == 0 and f"usage: tests/tools/on_policy.py {command}" in said and "(default: " in said
