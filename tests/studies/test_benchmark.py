"""The benchmark's arithmetic by hand, and its rounds on models that are too small to time."""

import argparse
import json
from pathlib import Path
from types import SimpleNamespace

import benchmark
import pytest
import torch

import data
import logprobs
import train

BUILT = dict(
    model=None, dataset=None, batch_size=2, steps=1, prompt_tokens=12, response_tokens=4, hidden=64, layers=1, vocabulary=1000,
    tokens_per_microbatch=2048, max_length=2048, gradient_checkpointing=False, profile=False,
)  # fmt: skip


def test_summary_of_two_rounds_by_hand():
    first = dict(variant="a", pairs=4, seconds=2.0, tokens=100, flops=3e9, rate=2e9, peak_above_state=2**30)
    second = dict(variant="a", pairs=4, seconds=3.0, tokens=150, flops=5e9, rate=4e9, peak_above_state=3 * 2**30)
    # 8 pairs and 250 tokens in 5 s; 8e9 FLOP in 5 s at a best rate of 4e9 a second: 2/5; the larger peak
    assert benchmark.summary_of([first, second]) == pytest.approx({
        "pairs": 8, "seconds": 5.0, "tokens": 250, "flops": 8e9, "pairs_per_second": 1.6, "tokens_per_second": 50.0,
        "fraction_of_matmul_rate": 0.4, "matmul_gflops": 4.0, "peak_above_state_gib": 3.0,
    })  # fmt: skip


def test_table_by_hand():
    """A figure is the mean of its rounds with the ends where they differ; a ratio is taken round by round, within a dtype."""

    def result(seconds, peak):
        return dict(pairs=4, seconds=seconds, tokens=400, flops=4e9, rate=4e9, peak_above_state=peak * 2**30)

    slow, fast, trl = [result(2.0, 4), result(4.0, 4)], [result(1.0, 1), result(1.0, 1)], [result(4.0, 8), result(4.0, 4)]
    rounds = {("padded, full logits", "fp32"): slow, ("packed tree", "fp32"): fast, ("trl simpo", "fp32"): trl}
    assert benchmark.table(rounds | {("packed tree", "bf16"): fast}).splitlines()[2:] == [
        "| padded, full logits | fp32 | 1.50 (1.00–2.00) | 150 (100–200) | 38% (25%–50%) | 4.00 | – | 1.50 (1.00–2.00) "
        "| 0.75 (0.50–1.00) |",
        "| packed tree | fp32 | 4.00 | 400 | 100% | 1.00 | 3.00 (2.00–4.00) | 4.00 | 0.19 (0.12–0.25) |",
        "| trl simpo | fp32 | 1.00 | 100 | 25% | 6.00 (4.00–8.00) | 0.75 (0.50–1.00) | – | – |",
        "| packed tree | bf16 | 4.00 | 400 | 100% | 1.00 | – | – | – |",
    ]


def test_every_variant_counts_the_same_work(monkeypatch):
    """Tokens and FLOP are those of the pairs, a prompt once, whatever a variant computes; all use the same built model."""
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)  # half a minute that says nothing of the count
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: 1e9)  # seconds that say nothing of it either
    results = [
        benchmark.ours(argparse.Namespace(**BUILT, variant=name, dtype="fp32", child=None)) for name in benchmark.VARIANTS
    ]
    assert [r["variant"] for r in results] == list(benchmark.VARIANTS) and {r["pairs"] for r in results} == {2}
    assert {r["tokens"] for r in results} == {2 * (12 + 4 + 4)} and len({r["flops"] for r in results}) == 1
    assert all(r["seconds"] > 0 and r["before"] > 0 for r in results)


@pytest.mark.parametrize("layout, padding", [("packed", 0.0), ("padded", 1 - 45 / (2 * 15 + 4 * 10))])
def test_balance_by_hand(layout, padding):
    """Pairs of 20, 15 and 10 tokens, 25 at most in a microbatch: 20, and 15 + 10, so the heavier has 25 of a mean of 22.5.
    Padded, the first takes 2 rows of 15 tokens, the others 4 of 10."""
    pairs = [data.Example([1] * 5, [[1] * 10, [1] * 5]), data.Example([1] * 5, [[1] * 5, [1] * 5])]
    pairs.append(data.Example([1] * 2, [[1] * 4, [1] * 4]))
    s = train.Settings(tokens_per_microbatch=25)
    run = train.Run(s, train.read_objective("simpo"), torch.device("cpu"), None, None, pairs, [], layout)
    found = benchmark.balance(run, pairs)
    assert found["microbatches"] == 2 and found["imbalance"] == 25 * 2 / 45
    assert found["padding"] == pytest.approx(padding)


def in_this_process(args, variant: str, dtype: str, **more) -> dict:
    return benchmark.ours(argparse.Namespace(**{**vars(args), **more, "variant": variant, "dtype": dtype}))


def test_arithmetic_of_the_textbook_by_hand():
    """Without attention a row of 7 tokens, padded to the longest of its batch, takes 6 FLOP a weight and token: 4 rows of 7."""
    args = argparse.Namespace(**BUILT, variant="packed tree", dtype="fp32")
    model = benchmark.built(args, benchmark.settings_of(args, "unused")).policy.model
    pairs = [data.Example([1] * 3, [[2] * 4, [2] * 1]), data.Example([1] * 2, [[2] * 2, [2] * 3])]
    body = sum(p.numel() for n, p in model.named_parameters() if "embed" not in n)
    head, attention = model.lm_head.weight.numel(), 12 * 64 * sum(range(1, 8))
    # a row's first position predicts the second token, so 6 of its 7 positions reach the head
    assert benchmark.textbook_flops(model, pairs, 2) == pytest.approx(4 * (6 * 7 * body + 6 * 6 * head + attention))
    assert benchmark.textbook_flops(model, pairs, 1) < benchmark.textbook_flops(model, pairs, 2)


def test_rounds_on_a_model_folder(small, tmp_path, monkeypatch, capsys):
    """Variants take turns; the file keeps every round; the measured pairs are those after the first two batches."""
    monkeypatch.setattr(benchmark, "child", in_this_process)
    monkeypatch.setattr(benchmark, "matmul_rate", lambda *_: 1e9)
    folders = ["--model", str(small / "model"), "--dataset", str(small / "pairs.jsonl"), "--out", str(tmp_path / "out.json")]
    variants = ["packed tree", "padded, full logits"]
    benchmark.main(
        [*folders, "--variants", *variants, "--dtypes", "fp32", "--steps", "2", "--batch-size", "3", "--rounds", "2"]
    )
    said, results = capsys.readouterr(), json.loads((tmp_path / "out.json").read_text())
    assert [line.partition(",")[0] for line in said.err.splitlines() if line.startswith("round")] == [
        "round 1: packed tree", "round 1: padded", "round 2: packed tree", "round 2: padded",
    ]  # fmt: skip
    assert [r["variant"] for r in results] == variants and all(len(r["rounds"]) == 2 for r in results)
    examples, _ = data.load(str(small / "pairs.jsonl"), data.load_tokenizer(str(small / "model")))
    assert all(r["pairs"] == 12 and r["tokens"] == 2 * sum(map(data.tokens_of, examples[6:12])) for r in results)
    head, less, more, _, _, _, packed, padded, _, *balance = said.out.rstrip("\n").splitlines()
    assert [line.partition(":")[0] for line in balance] == ["packed tree, fp32", "padded, full logits, fp32"]
    assert "without a model" in less and "alone make a step" in more
    assert "2 rounds of 2 steps of 3 pairs" in head and "trl" not in head
    assert packed.startswith("| packed tree | fp32 |") and packed.count("–") >= 2 and padded.endswith("| – | – | – |")
    ratio = float(packed.split(" | ")[6].split()[0])  # of the two rounds' ratios
    speeds = [[a["pairs"] / a["seconds"] for a in r["rounds"]] for r in results]
    assert ratio == pytest.approx(sum(a / b for a, b in zip(*speeds)) / 2, abs=0.006)


def test_the_header_says_what_trl_is_on_a_cpu():
    args = argparse.Namespace(rounds=2, steps=1, batch_size=4, peer="trl")
    assert ("falls back to on a CPU" in benchmark.header(args, 1.0, 0.0)) == (not torch.cuda.is_available())


def test_a_round_in_a_process_of_its_own(warm):
    result = benchmark.child(argparse.Namespace(**BUILT), "packed tree", "fp32", layers=2, profile=True)
    assert result["pairs"] == 2 and result["tokens"] == 40 and result["rate"] > 0
    assert result["before"] > 0 and result["peak_above_state"] > 0  # here the peak is this round's own
    shares = result["shares"]
    assert sum(shares.values()) == pytest.approx(1) and all(shares[kind] > 0 for kind in shares if kind != "compiled")


def test_shares_of_a_step_by_hand():
    spent = {"aten::mm": 50, "aten::addmm": 10, "aten::_scaled_dot_product_flash_attention_for_cpu": 15, "aten::copy_": 5,
             "aten::mul": 16, "aten::_fused_adamw_": 4}  # fmt: skip
    operators = [SimpleNamespace(key=key, self_cpu_time_total=t) for key, t in spent.items()]
    shares = benchmark.shares_of(operators)
    assert shares == {
        "products": 0.6, "attention": 0.15, "copies and casts": 0.05, "compiled": 0.0, "update": 0.04, "elsewhere": 0.16
    }  # fmt: skip
    rounds = {("packed tree", "fp32"): [{"shares": shares}, {"shares": shares | {"products": 0.5, "elsewhere": 0.26}}]}
    last = benchmark.profile_table(rounds).splitlines()[-1]
    assert last == "| packed tree | fp32 | 55% | 15% | 5% | 0% | 4% | 21% |"


def test_too_few_pairs_and_missing_arguments(small, capsys):
    folders = dict(model=str(small / "model"), dataset=str(small / "pairs.jsonl"))
    with pytest.raises(SystemExit, match="42 pairs are needed, 40 fit"):
        benchmark.ours(argparse.Namespace(**BUILT | folders | dict(batch_size=14, variant="packed tree", dtype="fp32")))
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--model", folders["model"]])
    assert stop.value.code == 2 and "--model and --dataset are needed" in capsys.readouterr().err


def test_a_gpu_has_no_profile_of_the_cpus_time(monkeypatch, capsys):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    with pytest.raises(SystemExit) as stop:
        benchmark.main(["--profile"])
    assert stop.value.code == 2 and "nothing of a GPU" in capsys.readouterr().err


def test_growth_changes_one_thing_at_a_time(tmp_path, monkeypatch, capsys):
    asked = []

    def made_up(args, variant, dtype, **case):
        asked.append(case)
        return dict(pairs=2 * case["batch_size"], seconds=4.0, tokens=1, flops=1.0, rate=2.0, peak_above_state=2**30)

    monkeypatch.setattr(benchmark, "child", made_up)
    benchmark.main(["--growth", "--dtypes", "bf16", "--out", str(tmp_path / "out.json")])
    assert all(len(case.items() - asked[0].items()) == 1 for case in asked[1:]) and len(asked) == 1 + 2 + 2 + 4
    sweeps, lines = json.loads((tmp_path / "out.json").read_text()), capsys.readouterr().out.splitlines()
    assert [r["value"] for r in sweeps["batch_size"]] == [4, 8, 16, 32, 64] and len(lines) == 2 + 3 + 3 + 5
    # 8 or 16 pairs in 4 s; 1 FLOP in 4 s at 2 a second: 12 %
    assert lines[8:10] == ["| batch_size 4 | 0.50 | 1.00 | 12% |", "| batch_size 8 | 0.25 | 1.00 | 12% |"]
    assert (tmp_path / "out.png").stat().st_size > 10_000


def test_the_interval_of_a_median_by_hand():
    """Of ten values the second and the ninth: P(none or one below the median) = (1 + 10) / 1024 is 1.1 %, with two 5.5 %. Of
    six the ends: 1 / 64 is 1.6 %. Two have no such interval, and get their ends."""
    values = [5.0, 1.0, 9.0, 3.0, 7.0, 2.0, 8.0, 4.0, 6.0, 10.0]
    assert benchmark.interval(values) == (5.5, 2.0, 9.0)
    assert benchmark.interval(values[:6]) == (4.0, 1.0, 9.0) and benchmark.interval([2.0, 1.0]) == (1.5, 1.0, 2.0)


def test_levers_table_by_hand():
    """A gain is taken within its round: 4 / 2 and 6 / 2 seconds; 8 / 5 and 8 / 4 user and system seconds."""
    slow = [benchmark.Spent(4.0, 7.0, 1.0, 2000), benchmark.Spent(6.0, 6.0, 2.0, 4000)]
    fast = [benchmark.Spent(2.0, 4.0, 1.0, 0), benchmark.Spent(2.0, 4.0, 0.0, 10)]
    assert benchmark.levers_table({"as it was": slow, "all together": fast}).splitlines()[2:] == [
        "| as it was | 5.00 | – | – | – | 3,000 |",
        "| all together | 2.00 | as it was | 2.500 (2.000–3.000) | 1.800 (1.600–2.000) | 5 |",
    ]


def test_a_module_of_two_times(tmp_path):
    """What is taken is today's, also as the old code calls it; all else is the old file's."""
    then = Path(logprobs.__file__).read_text().replace("QUERY_BLOCK = 128", "QUERY_BLOCK = 7")
    (tmp_path / "then.py").write_text(then)
    module = benchmark.with_names(str(tmp_path / "then.py"), {"PrefixSharedPairs": logprobs.PrefixSharedPairs})
    assert module.QUERY_BLOCK == 7 and module.ResponseLogProbs is not logprobs.ResponseLogProbs
    assert module.ResponseLogProbs.states.__globals__["PrefixSharedPairs"] is logprobs.PrefixSharedPairs
    assert benchmark.with_names("unread", None) is logprobs


def test_levers_take_turns(small, tmp_path, monkeypatch, capsys):
    """Each has one turn a round, whose first step is not counted, with the memory that it asks for."""
    monkeypatch.setattr(benchmark, "child", lambda args, variant, dtype: benchmark.levers(
        argparse.Namespace(**{**vars(args), "variant": variant, "dtype": dtype})))  # fmt: skip
    asked = []
    monkeypatch.setattr(benchmark, "allocator", lambda *thresholds: asked.append(thresholds))  # which would be this process's
    folders = ["--model", str(small / "model"), "--dataset", str(small / "pairs.jsonl"), "--out", str(tmp_path / "out.json")]
    with pytest.raises(SystemExit):
        benchmark.main([*folders, "--levers"])
    assert "--levers needs --base" in capsys.readouterr().err
    how = ["--levers", "--base", logprobs.__file__, "--dtypes", "fp32", "--steps", "1", "--batch-size", "3", "--rounds", "2"]
    benchmark.main([*folders, *how])
    rounds = json.loads((tmp_path / "out.json").read_text())["fp32"]
    assert list(rounds) == list(benchmark.LEVERS) and all(len(own) == 2 for own in rounds.values())
    assert sorted(asked) == sorted(2 * [lever.memory for lever in benchmark.LEVERS.values()])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[4:-1]] == [f"| {name}" for name in benchmark.LEVERS]


def test_threads_are_bound_but_not_the_workers_of_a_reader(monkeypatch):
    """Workers would inherit the core that the first thread is bound to."""
    bound = []

    def run(command, env, **_):
        bound.append(env["OMP_PROC_BIND"])
        return SimpleNamespace(returncode=0, stdout="{}")

    monkeypatch.delenv("OMP_PROC_BIND", raising=False)
    monkeypatch.setattr(benchmark.subprocess, "run", run)
    for variant in ("packed tree", *benchmark.READERS):
        benchmark.child(argparse.Namespace(), variant, "fp32")
    assert bound == ["true", "false", "false"]


def test_reading_is_measured_side_by_side(small, tmp_path, monkeypatch, capsys):
    """Both read the same rows, each of them another one."""
    seen = {}

    def read(file, tokenizer, folder):
        seen["rows"] = [json.loads(line) for line in open(file)]

    monkeypatch.setattr(benchmark, "READERS", {"data.load": read, "datasets.map": benchmark.read_by_load})
    monkeypatch.setattr(benchmark, "child", lambda args, variant, dtype: benchmark.reading(
        argparse.Namespace(**{**vars(args), "variant": variant, "dtype": dtype})))  # fmt: skip
    folders = ["--model", str(small / "model"), "--dataset", str(small / "pairs.jsonl"), "--out", str(tmp_path / "out.json")]
    benchmark.main([*folders, "--reading", "--rows", "1200"])
    texts = {row["prompt"][0]["content"] for row in seen["rows"]}
    assert len(texts) == 1200 and all(row["chosen"][0]["role"] == "assistant" for row in seen["rows"])
    lines = capsys.readouterr().out.splitlines()
    assert [line.split(" | ")[0] for line in lines[2:4]] == ["| data.load", "| datasets.map"]
    assert all(r["seconds"] > 0 and r["peak"] >= 0 for r in json.loads((tmp_path / "out.json").read_text()))
