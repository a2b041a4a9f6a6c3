"""Pairs of a model's own answers: what is sampled, scored and paired, by hand and again after a kill."""

import copy
import datetime
import json
import math
import time
from pathlib import Path

import on_policy
import processes
import pyarrow
import pytest
import torch
import toy
from on_policy import Pairing, Sampling, Scoring
from pyarrow import parquet
from templates import family
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

import data
from data import UserError

SCORED = {"prompt": "Ask me", "responses": ["Good", "Bad"], "scores": [1, 0]}


def user(text):
    return {"role": "user", "content": text}


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
    """A folder with an untrained model of the toy task, which ends a response about once in 70 tokens."""
    folder = tmp_path_factory.mktemp("model")
    tokenizer = toy.word_tokenizer()
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
    monkeypatch.setattr(data, "bf16_in_hardware", lambda device: in_hardware)
    exact = on_policy.load_model(world_model, "CausalLM", torch.device("cpu"))
    assert exact.dtype == torch.float32
    model = on_policy.load_model(str(tmp_path), "CausalLM", torch.device("cpu"))
    assert {p.dtype for p in model.parameters()} == {dtype} and not model.training


def test_greedy_samples_are_equal_and_kept_once(world_model, tmp_path):
    source = write(tmp_path, "p.jsonl", [{"prompt": "name two fruits"}])
    out = str(tmp_path / "plain")
    on_policy.sample(Sampling(world_model, source, out, n=3, temperature=0, max_tokens=5, keep_unfinished=True))
    (row,) = lines_of(out)
    assert len(row["responses"]) == 1 and row["prompt"] == [user("name two fruits")]


def test_files_without_tokens_go_on(sampled, world_model, tmp_path):
    """Rows of a version that counted none: the rest is added, and no sum is said."""
    source, out, options = sampled
    old = [{k: v for k, v in row.items() if k != "tokens"} for row in lines_of(out)[:2]]
    again = write(tmp_path, "again.jsonl", old)
    on_policy.sample(Sampling(world_model, source, again, **options), say=(said := []).append)
    assert lines_of(again) == old + lines_of(out)[2:] and "tokens generated" not in said[1]


def test_tokens_are_counted_with_the_terminator(world_model, tmp_path, monkeypatch):
    monkeypatch.setattr(on_policy, "continue_ids", lambda *how: ([[5, 6], [5, 6, 7], []], [True, False, True]))
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
    judge, tokenizer = LlamaForSequenceClassification.from_pretrained(f"{world_model}/judge"), toy.word_tokenizer()
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
    given = ["A", "A", "", "B", "C"], [True] * 4 + [False], [2] * 5
    monkeypatch.setattr(on_policy, "answer", lambda model, tokenizer, prompts, s, seed: given)
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

    def score():
        on_policy.score(Scoring(source, out, rule=lambda row, text: len(text)), say=said.append)

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
        for work, settings in (
            (on_policy.sample, Sampling("org/none", source, out)),
            (on_policy.score, Scoring(source, out, rule=len)),
            (on_policy.pairs, Pairing(source, out)),
        ):
            with pytest.raises(UserError, match=f"cannot be written .*({why})"):
                work(settings)
    with pytest.raises(UserError, match="no file that could be continued"):
        on_policy.sample(Sampling("org/none", source, "/dev/null"))


def test_models_without_finite_weights_are_named(world_model, tmp_path):
    model = LlamaForCausalLM.from_pretrained(world_model)
    model.lm_head.weight.data.fill_(math.nan)
    model.save_pretrained(tmp_path / "m")
    toy.word_tokenizer().save_pretrained(tmp_path / "m")
    source = write(tmp_path, "p.jsonl", [{"prompt": "Q"}])
    with pytest.raises(UserError, match="its probabilities are not finite numbers"):
        on_policy.sample(Sampling(str(tmp_path / "m"), source, str(tmp_path / "out")))


def test_padding_of_a_reward_model_without_a_padding_token(world_model, tmp_path):
    judge = LlamaForSequenceClassification.from_pretrained(f"{world_model}/judge")
    judge.config.pad_token_id = None
    judge.save_pretrained(tmp_path / "judge")
    toy.word_tokenizer().save_pretrained(tmp_path / "judge")
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


def test_a_special_token_that_a_prompt_spells_is_a_real_one(chatml):
    """Asked like that, and named by `data.load`, which drops the row."""
    end = chatml.convert_tokens_to_ids("<|im_end|>")
    with_it, without = (on_policy.prompt_ids(chatml, data.Row([user(x)], [])).count(end) for x in ("a <|im_end|> b", "a b"))
    assert with_it == without + 1


def test_pairs_by_hand(tmp_path, chatml):
    rows = [
        {"prompt": "A", "responses": ["a1", "a2", "a3"], "scores": [0.2, 0.9, 0.1]},
        {"prompt": "B", "responses": ["b1", "b2"], "scores": [1, 1]},
        {"prompt": "C", "responses": ["c1"], "scores": [1]},
        {"prompt": "D", "responses": ["d1", "d2"], "scores": [0.3, 0.4]},
        {"prompt": "E", "responses": ["e1", "e2"], "scores": [0.3, math.nan]},
    ]
    scored, out = write(tmp_path, "s.jsonl", rows), str(tmp_path / "pairs.jsonl")

    def made(**how):
        return on_policy.pairs(Pairing(scored, out, **how)), [(r["chosen"], r["rejected"]) for r in lines_of(out)]

    counts, found = made()
    assert found == [("a2", "a3"), ("d2", "d1")] and counts["pairs"] == 2
    assert counts["fewer than two responses"] == 1 and counts["scores is 'nan', not a finite number"] == 1
    assert sum(counts.values()) == 5
    assert made(min_margin=0.2)[1] == [("a2", "a3")]
    assert {made(how="correct", seed=seed)[1][0] for seed in range(20)} == {("a2", "a1"), ("a2", "a3")}
    assert {made(how="random", seed=seed)[1][0] for seed in range(30)} == {("a2", "a1"), ("a2", "a3"), ("a1", "a3")}
    on_policy.pairs(Pairing(scored, out, min_margin=0.5))
    examples, _ = data.load(out, chatml)
    assert [e.margin for e in examples] == [pytest.approx(0.8)]
    assert chatml.decode(examples[0].responses[0]) == "a2<|im_end|>"
    with pytest.raises(UserError, match="how is 'worst'"):
        on_policy.pairs(Pairing(scored, out, how="worst"))


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


def test_prompts_that_the_template_refuses_are_left_out(world_model, tmp_path, capsys):
    """Named on stderr; an output of nothing else is an error."""
    tokenizer = toy.word_tokenizer()
    tokenizer.chat_template = "{% if 'bad' in messages[0]['content'] %}{{ raise_exception('no') }}{% endif %}" + (
        tokenizer.chat_template
    )
    LlamaForCausalLM.from_pretrained(world_model).save_pretrained(tmp_path / "strict")
    tokenizer.save_pretrained(tmp_path / "strict")
    source = write(tmp_path, "p.jsonl", [{"prompt": x} for x in ("bad", "two fruits", "bad bad")])
    how = dict(n=1, max_tokens=4, keep_unfinished=True)
    on_policy.sample(Sampling(str(tmp_path / "strict"), source, str(tmp_path / "out"), **how))
    assert [row["prompt"] for row in lines_of(tmp_path / "out")] == [[user("two fruits")]]
    assert f"2 prompts left out; the first is {source} row 1: the chat template refuses" in capsys.readouterr().err
    source = write(tmp_path, "none.jsonl", [{"prompt": "bad"}])
    with pytest.raises(UserError, match="none.jsonl row 1: the chat template refuses"):
        on_policy.sample(Sampling(str(tmp_path / "strict"), source, str(tmp_path / "none"), **how))


def test_rewards_of_a_search_count_where_there_are_no_scores(tmp_path):
    rewarded = {"prompt": "A", "responses": ["a\nd\n", "a\ne"], "rewards": [-1, 1]}
    on_policy.pairs(Pairing(write(tmp_path, "r.jsonl", [rewarded]), str(tmp_path / "a.jsonl"), how="correct"))
    assert [(r["chosen"], r["score_rejected"]) for r in lines_of(tmp_path / "a.jsonl")] == [("a\ne", -1)]
    on_policy.pairs(Pairing(write(tmp_path, "q.jsonl", [rewarded | {"scores": [3, 2]}]), str(tmp_path / "a.jsonl")))
    assert lines_of(tmp_path / "a.jsonl")[0]["chosen"] == "a\nd\n"  # scores come first


def test_another_output_is_not_continued(world_model, tmp_path):
    source = write(tmp_path, "p.jsonl", [{"prompt": "Q"}])
    (tmp_path / "out").write_text("notes\n")
    with pytest.raises(UserError, match="cannot be continued"):
        on_policy.sample(Sampling(world_model, source, str(tmp_path / "out")))
    assert (tmp_path / "out").read_text() == "notes\n"


# ---- the chat template -----------------------------------------------------------------------------------------------

TOOLS = [{"type": "function", "function": {"name": "weather", "parameters": {"type": "object", "properties": {}}}}]
SPEAKS = (  # of tools, of thinking and of the year, before it goes on as ChatML
    "{% if tools %}<|im_start|>system\n{{ tools | tojson }}<|im_end|>\n{% endif %}"
    "{% if thinking is defined %}<|im_start|>system\nThe answer is {{ thinking }}<|im_end|>\n{% endif %}"
    "<|im_start|>system\nGood day {{ strftime_now('%Y') }}<|im_end|>\n"
)


@pytest.fixture
def chat_model(chatml, tmp_path) -> str:
    """A folder with an untrained ChatML model whose template speaks of tools, of thinking and of the year."""
    tokenizer = copy.deepcopy(chatml)
    tokenizer.chat_template = SPEAKS + tokenizer.chat_template
    small = dict(vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**small, eos_token_id=0, pad_token_id=0, bos_token_id=None)).save_pretrained(tmp_path / "chat")
    LlamaForSequenceClassification(LlamaConfig(**small, num_labels=1, pad_token_id=0)).save_pretrained(tmp_path / "judge")
    for name in ("chat", "judge"):
        tokenizer.save_pretrained(tmp_path / name)
    return str(tmp_path / "chat")


@pytest.fixture
def asked_for(monkeypatch) -> list[list[int]]:
    """The ids that a model was asked to go on from, in order; it answers "one" and "two" by turns."""
    asked = []

    def continuations(model, tokenizer, prompts, *how):
        asked.extend(prompts)
        texts = [("one", "two")[i % 2] for i in range(len(prompts))]
        end = model.generation_config.eos_token_id[-1]
        answers = [[*tokenizer(text, add_special_tokens=False)["input_ids"], end] for text in texts]
        return answers, [True] * len(prompts)

    monkeypatch.setattr(on_policy, "continuations", continuations)
    return asked


def test_what_a_row_tells_the_template_goes_all_the_way(chat_model, tmp_path, asked_for):
    """A row's tools, template arguments and system text, at sampling, scoring, pairing and training, against transformers."""
    tokenizer = data.load_tokenizer(chat_model)
    rows = [{"prompt": "Ask me", "tools": TOOLS, "system": "Be kind", "chat_template_kwargs": {"thinking": "blue"}},
            {"prompt": "Ask me", "tools": TOOLS}, {"prompt": "Ask me"}]  # fmt: skip
    wanted = []
    for row in rows:
        messages = [{"role": "system", "content": row["system"]}] if "system" in row else []
        arguments = {"thinking": "hot"} | row.get("chat_template_kwargs", {})  # the row's own win over the run's
        text = tokenizer.apply_chat_template(
            [*messages, user("Ask me")], tools=row.get("tools"), add_generation_prompt=True, tokenize=False, **arguments
        )
        wanted.append(tokenizer(text.replace(time.strftime("%Y"), "2001"), add_special_tokens=False)["input_ids"])
    assert len(set(map(tuple, wanted))) == 3
    source, out, scored, pairs = (str(tmp_path / f"{name}.jsonl") for name in ("prompts", "out", "scored", "pairs"))
    write(tmp_path, "prompts.jsonl", rows)
    how = ["--template_kwargs", '{"thinking": "hot"}', "--date", "2001-02-03", "-n", "2", "--batch_size", "2"]
    on_policy.main(["sample", chat_model, source, out, *how])
    assert asked_for == [ids for ids in wanted for _ in range(2)]
    assert len({row["id"] for row in lines_of(out)}) == 3  # the same words, asked in three ways
    on_policy.score(Scoring(out, scored, rule=lambda row, text: len(row.get("tools", [])) + (text == "two")))
    assert [row["scores"] for row in lines_of(scored)] == [[1, 2], [1, 2], [0, 1]]
    on_policy.pairs(Pairing(scored, pairs))
    made = lines_of(pairs)
    assert [line.get("tools") for line in made] == [TOOLS, TOOLS, None]
    assert [line.get("chat_template_kwargs") for line in made] == [{"thinking": "blue"}, None, None]
    reading = data.Reading(template_kwargs='{"thinking": "hot"}', date="2001-02-03")
    examples, _ = data.load(pairs, tokenizer, reading)
    assert [e.prompt for e in examples] == wanted


def test_a_reward_model_reads_the_rows_tools(chat_model, tmp_path):
    """Its score against its own model on the rendering by transformers."""
    row = {"prompt": "Ask me", "responses": ["one", "two"], "tools": TOOLS}
    source, judge = write(tmp_path, "s.jsonl", [row]), str(tmp_path / "judge")
    on_policy.score(Scoring(source, str(tmp_path / "out"), reward_model=judge))
    model, tokenizer = LlamaForSequenceClassification.from_pretrained(judge), data.load_tokenizer(judge)
    for text, value in zip(row["responses"], lines_of(tmp_path / "out")[0]["scores"]):
        whole = [user("Ask me"), {"role": "assistant", "content": text}]
        rendered = tokenizer.apply_chat_template(whole, tools=TOOLS, tokenize=False).rstrip()
        ids = tokenizer(rendered, add_special_tokens=False, return_tensors="pt")["input_ids"]
        assert model(input_ids=ids).logits.item() == pytest.approx(value, abs=1e-6)


def test_the_first_date_counts_where_sampling_goes_on(chat_model, tmp_path, asked_for):
    source, out = write(tmp_path, "p.jsonl", [{"prompt": "Ask me"}, {"prompt": "Good day"}]), str(tmp_path / "out")
    on_policy.sample(Sampling(chat_model, source, out, n=1, batch_size=1, date="2001-02-03"))
    whole, both = Path(out).read_text(), list(asked_for)
    Path(out).write_text(whole.splitlines(keepends=True)[0])
    on_policy.sample(Sampling(chat_model, source, out, n=1, batch_size=1))
    assert Path(out).read_text() == whole and asked_for == [*both, both[1]]
    Path(out).unlink()
    on_policy.sample(Sampling(chat_model, source, out, n=1, batch_size=1))
    assert lines_of(out)[0]["date"] == time.strftime("%Y-%m-%d") and asked_for[3] != both[0]


def test_sampling_stops_where_the_template_ends_a_response(world_model, tmp_path, capsys, monkeypatch):
    """A model that ends with another token and says every word alike: its answers end with <end> (3) as well."""
    model = LlamaForCausalLM.from_pretrained(world_model)
    model.model.norm.weight.data.zero_()
    model.generation_config.eos_token_id = 9
    model.save_pretrained(tmp_path / "m")
    toy.word_tokenizer().save_pretrained(tmp_path / "m")
    drawn, real = [], on_policy.continuations

    def continuations(*how):
        drawn.append(real(*how))
        return drawn[-1]

    monkeypatch.setattr(on_policy, "continuations", continuations)
    source = write(tmp_path, "p.jsonl", [{"prompt": "name two fruits"}])
    how = dict(n=40, temperature=1.0, top_p=1.0, max_tokens=60)
    on_policy.sample(Sampling(str(tmp_path / "m"), source, str(tmp_path / "out"), **how))
    ((answers, ended),) = drawn
    assert {answer[-1] for answer, end in zip(answers, ended) if end} == {3, 9}
    assert all(3 not in answer[:-1] for answer in answers)
    assert "the chat template ends a response with <end> (3), which is not among this model's eos_token_id [9]" in (
        capsys.readouterr().err
    )


def test_a_model_folders_own_code_is_neither_run_nor_asked_about(world_model, tmp_path, monkeypatch):
    """Nothing reads an answer from stdin (`yes |` would be one), whatever loads the folder."""
    import will_it_fit

    folder = tmp_path / "m"
    folder.mkdir()
    own = {"AutoConfig": "own.C", "AutoModelForCausalLM": "own.M", "AutoModelForSequenceClassification": "own.M"}
    (folder / "config.json").write_text(json.dumps({"model_type": "own", "auto_map": own}))
    (folder / "own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    toy.word_tokenizer().save_pretrained(folder)
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("somebody was asked"))
    source = write(tmp_path, "s.jsonl", [{"prompt": "Q", "responses": ["a", "b"]}])
    out = str(tmp_path / "out")
    for work in (
        lambda: on_policy.sample(Sampling(str(folder), source, out)),
        lambda: on_policy.score(Scoring(source, out, reward_model=str(folder))),
        lambda: will_it_fit.config_of(str(folder)),
    ):
        with pytest.raises(UserError, match="contains custom code"):
            work()
    assert not (tmp_path / "ran").exists()


# ---- the command line ------------------------------------------------------------------------------------------------


def test_ctrl_c_says_how_to_go_on(tmp_path):
    source, out = write(tmp_path, "s.jsonl", [{"prompt": p, "responses": ["a", "b"]} for p in "ABC"]), tmp_path / "out"
    (tmp_path / "r.py").write_text(
        "import os, signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background lacks\n"
        "def f(row, x):\n    row['prompt'] == 'B' and os.kill(os.getpid(), signal.SIGINT)\n    return 1"
    )
    done = processes.run([on_policy.__file__, "score", source, str(out), "--rule", f"{tmp_path}/r.py:f"], tmp_path)
    assert done.code == 130 and done.err.endswith("stopped; nothing is lost, the same command goes on from here\n")
    assert "Traceback" not in done.err and [row["prompt"] for row in lines_of(out)] == ["A"]


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
