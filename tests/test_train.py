"""The loop: exactness of one step whatever the split, values at step 0, resuming, settings, and what a bad input gets.

Expected numbers are algebra (stated where used) or the same computation done another way; runs use a Llama of 30,000 weights.
"""

import copy
import errno
import json
import math
import multiprocessing
import os
import re
import shutil
import signal
import statistics
import sys
import time
import tracemalloc
from dataclasses import replace
from pathlib import Path

import processes
import pytest
import torch
import toy
import transformers
import yaml
from safetensors.torch import load_file
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    FalconConfig,
    FalconForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
)
from worlds import world_pairs

import data
import distributed as dist
import train
from data import UserError
from logprobs import response_logprob
from losses import OBJECTIVES, parse_objective
from train import Settings


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with an untrained model of the toy task's vocabulary and 40 of its pairs, as a user would have them."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, pairs = toy.word_tokenizer(), world_pairs(0, 0, 40)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, tie_word_embeddings=True,
        bos_token_id=None, eos_token_id=3, pad_token_id=3,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    rows = [{"prompt": p.prompt, "chosen": p.responses[0]["content"], "rejected": p.responses[1]["content"]} for p in pairs]
    rows = [row | {"score_chosen": i / 8, "score_rejected": 1.0} for i, row in enumerate(rows)]  # margins of either sign
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    single = [
        {"prompt": p.prompt, "completion": p.responses[i % 2]["content"], "label": i % 2 == 0} for i, p in enumerate(pairs)
    ]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in single))
    return folder


@pytest.fixture
def arguments(world, tmp_path):
    """The command line of a small run; keyword arguments override or add settings."""

    def build(**more) -> list[str]:
        s = dict(
            model=world / "model", dataset=world / "pairs.jsonl", out=tmp_path / "out", dtype="fp32", eval_size=8, batch_size=8,
            max_steps=4, samples=1, sample_tokens=4, lr=1e-3, eval_every=0, cache=tmp_path / "cache",
        ) | more  # fmt: skip
        return [part for key, value in s.items() if value is not None for part in ("--" + key.replace("_", "-"), str(value))]

    return build


def metrics(out: Path) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()]


def read_samples(out: Path) -> list[dict]:
    return [json.loads(line) for line in (Path(out) / "samples.jsonl").read_text().splitlines()]


TIMES = ("seconds", "tokens_per_second", "peak_memory_gib")  # what differs between equal runs


def steps(out: Path) -> list[dict]:
    return [line for line in metrics(out) if "loss" in line]


# ---- one step: the split changes nothing -----------------------------------------------------------------------------


@pytest.fixture
def still(monkeypatch):
    """Steps that leave the weights as they are, from a policy that need not be its reference; with the gradients they saw."""
    gradients, clip = {}, dist.clip_gradients

    def seen(policy, limit):
        gradients.clear()
        gradients.update({n: p.grad.clone() for n, p in policy.model.named_parameters()})
        return clip(policy, limit)

    monkeypatch.setattr(train, "learning_rate", lambda *_: 0.0)
    monkeypatch.setattr(train, "check_step_zero", lambda *_: None)
    monkeypatch.setattr(dist, "clip_gradients", seen)
    return gradients


@pytest.fixture(scope="session")
def shifted(world, tmp_path_factory):
    """prepare() on eight pairs, then weights a little away from the reference that it scored; `still` keeps them there.

    It is done once for all objectives that need the same: as many responses, and as much of the reference.
    """
    prepared = {}
    place = tmp_path_factory.mktemp("shifted")
    s = Settings(
        model=str(world / "model"), dataset=str(world / "pairs.jsonl[:8]"), cache=str(place / "cache"), eval_size=0,
        batch_size=8, lr=1.0, dtype="fp32", samples=0, tokens_per_microbatch=10**6,
    )  # fmt: skip

    def build(name: str, **more) -> train.Run:
        objective = parse_objective(name)
        of_the_reference = [tensor for tensor in sorted(objective.tensors) if tensor.startswith(("ref", "kl"))]
        kind = (objective.unpaired, objective.responses, *of_the_reference, str(more))
        if kind not in prepared:
            prepared[kind] = train.prepare(replace(s, objective=name, out=str(place / f"run-{len(prepared)}"), **more))
            torch.manual_seed(1)
            with torch.no_grad():
                for p in prepared[kind].policy.model.parameters():
                    p.add_(0.05 * torch.randn_like(p))
        run = replace(prepared[kind], objective=objective)
        run.policy.use_layout(run.layout)
        return run

    return build


def one_step(run: train.Run, gradients: dict, monkeypatch, **changed):
    """(microbatches, loss per row, gradients) of the first step under changed settings; weights and plan stay as they are."""
    losses = []
    measures = train.measures

    def seen(objective, values, loss):
        losses.append(loss)
        return measures(objective, values, loss)

    run = replace(run, layout=changed.pop("layout", run.layout), s=replace(run.s, **changed))
    run.policy.use_layout(run.layout)
    with monkeypatch.context() as patch:
        patch.setattr(train, "measures", seen)
        train.train_step(run, run.plan[0])
    return len(run.microbatches(first_examples(run))), losses[0], dict(gradients)


def first_examples(run: train.Run) -> list[data.Example]:
    return [run.train[i] for i in run.plan[0]]


def assert_same_step(a, b, bound=1e-6):
    """Losses within 2e-6 relative (β = 10 multiplies the rounding of a log-prob); each parameter's gradient within 2e-6 of that
    parameter's largest entry (or of a tenth of the model's largest, where the parameter's own are rounding noise)."""
    torch.testing.assert_close(a[1], b[1], rtol=2 * bound, atol=bound)
    largest = max(g.abs().max().item() for g in b[2].values())
    for name, g in b[2].items():
        assert (a[2][name] - g).abs().max().item() <= 2 * bound * max(g.abs().max().item(), 0.1 * largest), name


@pytest.mark.parametrize("name", [*OBJECTIVES, "0.5*alpha_dpo + 0.5*tdpo2 + sft", "kto + 0.5*apo_zero_unpaired"])
def test_gradient_does_not_depend_on_microbatches(shifted, still, monkeypatch, name):
    """Every objective, batch-coupled or not: microbatches of 1, of about 2 and 4 pairs, and the whole batch at once."""
    run = shifted(name)
    whole = one_step(run, still, monkeypatch)
    assert whole[0] == 1
    sizes = []
    for budget in (1, 60, 110):
        cut = one_step(run, still, monkeypatch, tokens_per_microbatch=budget)
        sizes.append(cut[0])
        assert_same_step(cut, whole)
    assert sizes[0] == 8 and 1 < sizes[2] < sizes[1] < 8


@pytest.mark.parametrize("name", ["simpo", "dpo", "alpha_dpo", "kto", "tdpo2"])
def test_gradient_does_not_depend_on_layout_or_checkpointing(shifted, still, monkeypatch, name):
    run = shifted(name)
    whole = one_step(run, still, monkeypatch)
    assert_same_step(one_step(run, still, monkeypatch, layout="padded"), whole)
    assert_same_step(one_step(run, still, monkeypatch, layout="padded", tokens_per_microbatch=60), whole)
    recomputed = shifted(name, gradient_checkpointing=True)
    assert_same_step(one_step(recomputed, still, monkeypatch, tokens_per_microbatch=60), whole)


def test_step_gradient_equals_autograd_of_the_mean_loss(shifted, still, monkeypatch):
    """The two-stage gradient (∂L/∂logp, then ∂logp/∂θ) against plain backward from the textbook's log-probs."""
    run = shifted("alpha_dpo(beta=3.0)")
    examples = first_examples(run)
    inputs = train.batch_inputs(run, examples, run.plan[0])
    _, _, ours = one_step(run, still, monkeypatch)
    run.policy.zero_grad()
    run.policy.use_layout("padded")
    sums = [response_logprob(run.policy.model, e.prompt, r) for e in examples for r in e.responses]
    w, l = torch.stack(sums).view(-1, 2).T  # noqa: E741
    tensors = (w, l, *inputs["ref"].T, *inputs["len"].T)
    OBJECTIVES["alpha_dpo"](*tensors, beta=3.0).mean().backward()
    largest = max(p.grad.abs().max() for p in run.policy.model.parameters())
    for n, p in run.policy.model.named_parameters():
        assert (ours[n] - p.grad).abs().max() <= 1e-5 * largest, n


@pytest.mark.parametrize("name, k", [("dpo", 2), ("kto", 1)])
def test_wpo_weighs_each_row_and_only_that(shifted, still, monkeypatch, name, k):
    """Losses and gradients with --wpo against those of each row alone, weighed by Π e^ā from the model's own softmax."""
    run = shifted(name, wpo=True)
    _, loss, weighed = one_step(run, still, monkeypatch)
    _, plain, _ = one_step(run, still, monkeypatch, wpo=False)
    examples = first_examples(run)
    inputs = train.batch_inputs(run, examples, run.plan[0])
    _, factors = run.objective.loss_and_grad(train.log_probs(run, examples), inputs, [0, 0])  # not weighed
    run.policy.use_layout("padded")
    averages = []
    for prompt, r in ((e.prompt, r) for e in examples for r in e.responses):
        p = run.policy.model(torch.tensor([prompt + r])).logits[0, len(prompt) - 1 : -1].softmax(-1)
        averages.append((p.gather(-1, torch.tensor(r)[:, None]).squeeze(-1) / (p**2).sum(-1)).log().mean())
    weights = torch.stack(averages).detach().view(-1, k).sum(-1).exp().clamp(max=1)
    assert weights.min() < 0.9 * weights.max()
    torch.testing.assert_close(loss, plain * weights, rtol=1e-4, atol=1e-6)
    run.held_out = examples
    run.held_out_inputs = inputs
    run.held_out_initial = inputs["ref"]
    run.policy.use_layout(run.layout)
    assert train.evaluate(run)["eval_loss"] == pytest.approx((plain * weights).mean().item(), rel=1e-4)
    run.policy.use_layout("padded")
    each = torch.stack([response_logprob(run.policy.model, e.prompt, r) for e in examples for r in e.responses])
    run.policy.zero_grad()
    ((factors["logp"].flatten() * each).view(-1, k).sum(-1) * weights).mean().backward()
    for n, p in run.policy.model.named_parameters():
        assert (weighed[n] - p.grad).abs().max() <= 1e-4 * p.grad.abs().max() + 1e-8, n


def test_coupled_objectives_get_one_extra_pass_and_others_none(shifted, still, monkeypatch):
    passes = []
    forward = train.ResponseLogProbs.forward
    monkeypatch.setattr(train.ResponseLogProbs, "forward", lambda self, *a: passes.append(1) or forward(self, *a))
    for name, budget, expected in (("simpo", 1, 8), ("alpha_dpo", 1, 16), ("alpha_dpo", 10**6, 1)):
        run = shifted(name, tokens_per_microbatch=budget)
        run.step = 1  # the first one is checked against the reference, where a difference costs a pass
        passes.clear()
        train.train_step(run, run.plan[0])
        assert len(passes) == expected, name


def test_kl_completions_answer_other_prompts():
    rows = [data.Example([1, p], [[10 * p], [10 * p + 1]]) for p in (1, 2, 1)]
    pairs = [(e.prompt[1], e.responses[0][0] // 10) for e in train.kl_completions(rows)]
    # the next completion in a circle that belongs to another prompt; prompt 1 stands twice and must not meet itself
    assert pairs == [(1, 2), (1, 2), (2, 1), (2, 1), (1, 2), (1, 2)]
    with pytest.raises(data.UserError, match="two different prompts"):
        train.kl_completions([rows[0], rows[2]])


# ---- numbers at known points -------------------------------------------------------------------------------------------


def test_dpo_starts_at_log_two_with_reward_zero(arguments, capsys):
    summary = train.main(arguments(objective="dpo(beta=0.1)"))
    first = steps(summary["out"])[0]
    # policy = reference: Δ = 0, so L = −log σ(0) = log 2, margin 0, and every pair a tie, counted ½
    assert first["loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert first["reward_margin"] == pytest.approx(0, abs=1e-5)
    assert summary["before"]["eval_loss"] == pytest.approx(math.log(2), abs=1e-6)
    assert "policy and reference differ by at most" in capsys.readouterr().err


def test_learning_rate_by_hand():
    s = Settings(lr=1.0, warmup_ratio=0.2)
    # 10 steps, 2 of warm-up: ½, 1, then ½(1 + cos(π k/8)) for k = 0 … 7
    expected = [0.5, 1.0] + [0.5 * (1 + math.cos(math.pi * k / 8)) for k in range(8)]
    assert [train.learning_rate(k, 10, s) for k in range(10)] == pytest.approx(expected)


def test_measures_by_hand():
    pair = parse_objective("simpo(beta=2.0)")
    lengths = torch.tensor([[2, 4], [1, 2]])
    logp = torch.tensor([[-2.0, -8.0], [-3.0, -2.0]])
    values = {"len": lengths, "logp": logp, "label": torch.tensor([[True, False]] * 2)}
    means = train.measures(pair, values, torch.tensor([1.0, 3.0]))
    # rewards 2·s/n: chosen −2, −6; rejected −4, −2 → differences 2, −4
    rewards = {"reward_margin": -1.0, "reward_accuracy": 0.5, "reward_chosen": -4.0, "reward_rejected": -3.0}
    assert means == pytest.approx({"loss": 2.0, **rewards, "logp_w_per_token": -5 / 3, "logp_l_per_token": -10 / 6})
    rows = parse_objective("bco(beta=0.5)")
    values = {
        "len": torch.tensor([[2], [2], [2]]), "logp": torch.tensor([[-2.0], [-4.0], [-2.0]]),
        "ref": torch.tensor([[-4.0], [-4.0], [-1.0]]), "label": torch.tensor([[True], [True], [False]]),
    }  # fmt: skip
    means = train.measures(rows, values, torch.zeros(3))
    # rewards ½(s − s̄): 1, 0 desirable, −½ undesirable; both couples in order; mean ½ − (−½)
    assert means["reward_margin"] == pytest.approx(1.0) and means["reward_accuracy"] == 1.0
    assert (means["reward_chosen"], means["reward_rejected"]) == pytest.approx((0.5, -0.5))


# ---- runs --------------------------------------------------------------------------------------------------------------


def test_the_record_of_a_run_is_a_settings_file_for_the_next(world, arguments, tmp_path, monkeypatch):
    """Also where model and data were named from the folder that the run was started in."""
    monkeypatch.chdir(world)
    first = train.main(arguments(model="./model", dataset="./pairs.jsonl[:30], ./pairs.jsonl[30:]", out=tmp_path / "a"))
    record = str(tmp_path / "a" / "settings.json")
    again = train.main([record, "--out", str(tmp_path / "b")])
    assert again["after"] == first["after"] and steps(tmp_path / "a")[0]["loss"] == steps(tmp_path / "b")[0]["loss"]


def test_loss_falls_and_everything_is_recorded(arguments, tmp_path, monkeypatch):
    monkeypatch.undo()  # the curves, too
    summary = train.main(arguments(max_steps=None, epochs=6, lr=3e-3, eval_every=4))
    out = tmp_path / "out"
    lines = steps(out)
    assert len(lines) == summary["steps"] == 6 * 4  # 32 training pairs in batches of 8
    assert sum(x["loss"] for x in lines[-4:]) < sum(x["loss"] for x in lines[:4])
    for key in ("step", "loss", "reward_margin", "reward_accuracy", "logp_w_per_token", "logp_l_per_token", "grad_norm", "lr",
                "tokens", "seconds", "tokens_per_second"):  # fmt: skip
        assert all(math.isfinite(line[key]) for line in lines), key
    assert [x["step"] for x in metrics(out) if "eval_loss" in x] == [0, 4, 8, 12, 16, 20, 24]
    assert json.loads((out / "settings.json").read_text())["objective"] == f"simpo({SIMPO})"
    assert json.loads((out / "summary.json").read_text()) == summary
    samples = read_samples(out)
    assert [sample["step"] for sample in samples] == [0, 4, 8, 12, 16, 20, 24]
    assert all(list(sample) == ["step", "prompt", "answer"] for sample in samples)
    assert (out / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_exported_model_is_the_trained_one(arguments, tmp_path):
    train.main(arguments(save_every=4))
    folder = tmp_path / "out" / "model"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    weights = dict(model.named_parameters())
    saved = data_of(tmp_path / "out" / "checkpoints")
    assert weights and all(torch.equal(p, saved[n]) for n, p in weights.items())
    asked = [{"role": "user", "content": "name two metals"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt")
    ids = ids if isinstance(ids, torch.Tensor) else ids["input_ids"]
    assert model.generate(ids, max_new_tokens=3, do_sample=False).shape[1] > ids.shape[1]
    assert not list(folder.glob("*.bin")) and (folder / "generation_config.json").exists()


def data_of(checkpoints: Path, name: str = "step-*") -> dict[str, torch.Tensor]:
    """Weights of the newest checkpoint, or of that one, read with safetensors alone."""
    from safetensors import safe_open

    newest, weights = sorted(checkpoints.glob(name))[-1], {}
    for file in newest.rglob("*.safetensors"):
        with safe_open(file, "pt") as f:
            weights |= {k.partition("weight.")[2] or k: f.get_tensor(k) for k in f.keys() if k.startswith("weight.")}
    return weights


def test_step_is_the_same_alone_or_with_a_short_last_batch(arguments, tmp_path):
    """35 pairs in batches of 8: no row is lost, and the last step has 3."""
    train.main(arguments(dataset=None) + ["--dataset", str(arguments()[3]), "--eval-size", "5", "--max-steps", "100"])
    assert [line["pairs"] for line in steps(tmp_path / "out")] == [8, 8, 8, 8, 3]


@pytest.mark.parametrize(
    "objective, more",
    [("simpo", {}), ("dpo", {}), ("beta_dpo", {}), ("0.5*beta_dpo + beta_dpo(a=0.1) + 0.1*sft", {}), ("kto", {}),
     ("ld_dpo", dict(wpo=True))],
)  # fmt: skip
def test_resumed_run_equals_the_uninterrupted_one(arguments, tmp_path, objective, more):
    more = dict(objective=objective, save_every=2, eval_every=1, keep=3, max_steps=6, epochs=2) | more
    train.main(arguments(**more, out=tmp_path / "a"))
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    for late in ("step-000006", "step-000004"):  # as if killed in step 5
        shutil.rmtree(tmp_path / "b" / "checkpoints" / late, ignore_errors=True)
    (tmp_path / "b" / "summary.json").unlink()
    train.main(arguments(**more, out=tmp_path / "b") + ["--resume"])
    assert (tmp_path / "a" / "samples.jsonl").read_text() == (tmp_path / "b" / "samples.jsonl").read_text()
    timeless = [[{k: v for k, v in line.items() if k not in TIMES} for line in metrics(tmp_path / side)] for side in "ab"]
    assert timeless[0] == timeless[1]
    a, b = data_of(tmp_path / "a" / "checkpoints"), data_of(tmp_path / "b" / "checkpoints")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def test_what_changes_output_only_may_change_on_the_way(arguments, tmp_path):
    """More samples, evaluations and another export dtype: the same losses, and a line for each prompt."""
    train.main(arguments(out=tmp_path / "a"))
    train.main(arguments(out=tmp_path / "b", save_every=2, eval_every=2))
    shutil.rmtree(tmp_path / "b" / "checkpoints" / "step-000004")
    (tmp_path / "b" / "summary.json").unlink()
    more = dict(samples=3, eval_every=1, export_dtype="bf16", gradient_checkpointing=True)
    train.main(arguments(out=tmp_path / "b", save_every=2, **more) + ["--resume"])
    assert [x["loss"] for x in steps(tmp_path / "b")] == [x["loss"] for x in steps(tmp_path / "a")]
    assert [sample["step"] for sample in read_samples(tmp_path / "b")] == [0, 2, 3, 3, 3, 4, 4, 4]
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "b" / "model").dtype == torch.bfloat16


def test_reference_cache(arguments, world, tmp_path, capsys):
    """A second run reads the numbers of the first, bit for bit; other weights or other data compute anew."""
    cache = tmp_path / "cache"
    train.main(arguments(objective="dpo"))
    files = sorted(cache.glob("*.safetensors"))
    assert len(files) == 2  # training rows and held-out rows
    fresh = steps(tmp_path / "out")
    capsys.readouterr()
    train.main(arguments(objective="ipo", out=tmp_path / "run-1"))
    assert capsys.readouterr().err.count("reference log-probs of") == 2 and sorted(cache.glob("*.safetensors")) == files
    train.main(arguments(objective="dpo", out=tmp_path / "run-2"))
    assert [x["loss"] for x in steps(tmp_path / "run-2")] == [x["loss"] for x in fresh]
    train.main(arguments(objective="dpo", max_length=12, out=tmp_path / "run-3"))
    assert len(list(cache.glob("*.safetensors"))) > 2
    before = len(list(cache.glob("*.safetensors")))
    other = AutoModelForCausalLM.from_pretrained(world / "model")
    with torch.no_grad():
        other.model.norm.weight[0] += 1e-3  # one weight of one tensor
    other.save_pretrained(tmp_path / "other")
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(tmp_path / "other")
    train.main(arguments(objective="dpo", model=tmp_path / "other", out=tmp_path / "run-4"))
    assert len(list(cache.glob("*.safetensors"))) == before + 2
    before += 2
    files[0].write_bytes(files[0].read_bytes()[:-9])  # cut short: must be computed again
    train.main(arguments(objective="dpo", out=tmp_path / "run-5"))
    assert len(list(cache.glob("*.safetensors"))) == before
    assert [x["loss"] for x in steps(tmp_path / "run-5")] == [x["loss"] for x in fresh]


@pytest.mark.parametrize("objective", ["kto", "bco", "uapo"])
def test_unpaired_rows_train(arguments, world, tmp_path, objective):
    summary = train.main(arguments(objective=objective, dataset=world / "rows.jsonl"))
    assert [line["pairs"] for line in steps(tmp_path / "out")] == [8, 8, 8, 8]
    assert math.isfinite(summary["after"]["eval_reward_accuracy"])


def test_unpaired_objective_takes_each_pair_as_two_rows(arguments, tmp_path):
    train.main(arguments(objective="kto"))
    assert steps(tmp_path / "out")[0]["pairs"] == 16


@pytest.mark.parametrize("objective", ["simpo", "dpo", "alpha_dpo", "tdpo2", "kto"])
def test_equal_length_changes_unequal_pairs_only_and_scores_its_own_reference(arguments, world, tmp_path, objective):
    """The cut pairs train; the step-0 check would stop a run whose reference was scored on other tokens."""
    pairs = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]

    def words(text):
        return len(text.split())

    (tmp_path / "equal.jsonl").write_text(
        "".join(json.dumps(p | {"rejected": " ".join(reversed(p["chosen"].split()))}) + "\n" for p in pairs)
    )
    assert any(words(p["chosen"]) != words(p["rejected"]) for p in pairs)
    for name, dataset in (("equal", tmp_path / "equal.jsonl"), ("unequal", world / "pairs.jsonl")):
        losses = []
        for share in (0, 0.5, 1):
            out = tmp_path / f"{name}{share}"
            train.main(arguments(objective=objective, dataset=dataset, equal_length=share, out=out, max_steps=2, samples=0))
            losses.append([x["loss"] for x in steps(out)])
        assert losses[0] == losses[1] == losses[2] if name == "equal" else len(set(map(tuple, losses))) == 3


def test_objectives_without_ref_never_score_a_reference(arguments, tmp_path, monkeypatch):
    monkeypatch.setattr(train, "reference_logps", lambda *a: pytest.fail("a reference was scored"))
    train.main(arguments(objective="simpo"))
    with pytest.raises(pytest.fail.Exception):
        train.main(arguments(objective="dpo", out=tmp_path / "other"))


def test_layouts_record_the_same_losses(arguments, tmp_path):
    train.main(arguments(out=tmp_path / "a"))
    train.main(arguments(out=tmp_path / "b", layout="padded"))
    a, b = steps(tmp_path / "a"), steps(tmp_path / "b")
    assert [x["loss"] for x in a] == pytest.approx([x["loss"] for x in b], abs=1e-5)


@pytest.mark.parametrize("error, why", [(RuntimeError("no g++\na page"), "no g++"), (RuntimeError(), "RuntimeError")])
def test_a_compiler_that_does_not_work_is_said_in_a_line(monkeypatch, error, why):
    def broken(function):
        raise error

    monkeypatch.setattr(torch, "compile", broken)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=10, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(UserError) as told:
        train.refuse_compile("packed", model, torch.device("cpu"))
    assert f"({why}); install g++" in str(told.value) and "\n" not in str(told.value)


def test_compile_is_refused_where_it_would_compile_nothing():
    model = FalconForCausalLM(FalconConfig(vocab_size=10, hidden_size=8, num_attention_heads=2, num_hidden_layers=1))
    with pytest.raises(UserError, match="FalconForCausalLM's attention is its own"):
        train.refuse_compile("packed", model, torch.device("cpu"))


# ---- what a run says of itself -----------------------------------------------------------------------------------------


def test_speeds_are_those_of_the_steps_alone(arguments, monkeypatch, tmp_path):
    """Evaluations that take a second each are not counted: Σ pairs / Σ seconds of the steps' own lines."""
    evaluate = train.evaluate
    monkeypatch.setattr(train, "evaluate", lambda run: time.sleep(1) or evaluate(run))
    summary = train.main(arguments(eval_every=2))
    total = {key: sum(line[key] for line in steps(tmp_path / "out")) for key in ("pairs", "tokens", "seconds")}
    assert summary["train_seconds"] == pytest.approx(total["seconds"]) and summary["seconds"] > 3 + total["seconds"]
    assert summary["pairs_per_second"] == pytest.approx(total["pairs"] / total["seconds"])
    assert summary["tokens_per_second"] == pytest.approx(total["tokens"] / total["seconds"])


def test_the_report_says_what_became_better(arguments, tmp_path, capsys):
    """On standard output: before and now, a change within its standard error marked, answers, the way to talk to it."""
    summary = train.main(arguments(samples=2, max_steps=2))
    captured = capsys.readouterr()
    lines = captured.out.splitlines()
    before, after = summary["before"], summary["after"]
    rows = {line[:14].strip(): line[14:].split() for line in lines}
    names = [f"eval_{name}" for name in train.MEASURES]
    assert rows["before"] == [f"{before[name]:.4f}" for name in names] and rows["now"] == [
        f"{after[name]:.4f}" for name in names
    ]
    change = after["eval_reward_margin"] - before["eval_reward_margin"]
    assert rows["change"][0] == f"{change:.4f}" and rows["± its s. e."][0] == f"{after['eval_reward_margin_se']:.4f}"
    for name in ("reward_margin", "reward_accuracy"):
        within = abs(after[f"eval_{name}"] - before[f"eval_{name}"]) <= after[f"eval_{name}_se"]
        assert (f"the change of {name.replace('_', ' ')} is within its standard error" in lines) == within
    texts = [sample["answer"] for sample in read_samples(tmp_path / "out")]
    assert [line[10:] for line in lines if line.startswith("  now ")] == [repr(text) for text in texts[2:]]
    assert lines[-1].endswith(f"python tests/tools/chat.py {tmp_path}/out/model")
    assert "now" not in captured.err and captured.err.index("2 steps of 8 pairs") < captured.err.index("\nbefore ")


def test_the_errors_of_a_change_are_over_pairs(arguments, tmp_path, monkeypatch):
    """Against the margins of each held-out pair, taken before and after by hand; before the first step they are 0."""
    run = train.prepare(train.parse_settings(arguments(objective="dpo", eval_size=6, max_steps=2)))
    length = run.held_out_inputs["len"]
    first = train.log_probs(run, run.held_out)["logp"]
    assert train.evaluate(run)["eval_reward_margin_se"] == train.evaluate(run)["eval_reward_accuracy_se"] == 0
    for rows in run.plan:
        train.train_step(run, rows)
    now = train.log_probs(run, run.held_out)["logp"]
    gained = [0.1 * (chosen - rejected) for chosen, rejected in (now - first).tolist()]  # β times the change of the log-ratios
    sides = [0.5 * ((x > 0) - (x < 0)) for x in gained]  # all margins were 0: a tie, ½
    found = train.evaluate(run)
    for name, changes in (("margin", gained), ("accuracy", sides)):
        assert found[f"eval_reward_{name}_se"] == pytest.approx(statistics.pstdev(changes) / math.sqrt(6), abs=1e-6), name
    assert length.shape == (6, 2)


def test_evaluations_come_ten_times_a_run(arguments, tmp_path):
    train.main(arguments(eval_every=None, batch_size=2, max_steps=16, samples=0))
    assert [line["step"] for line in metrics(tmp_path / "out") if "eval_loss" in line] == list(range(0, 17, 2))


def test_divergence_by_hand():
    """Each warning just below and just above its bounds; what is not recorded gives none."""
    initial = {"repetition": 0.3, "eval_drift": 0.0, "eval_logp_w_per_token": -2.0}
    sound = {"repetition": 0.5, "eval_drift": 1.5, "eval_logp_w_per_token": -4.0}
    assert train.divergence(initial, sound) == train.divergence(initial, {}) == train.divergence(initial, initial) == {}
    spoilt = {"repetition": 0.51, "eval_drift": 1.51, "eval_logp_w_per_token": -4.01}
    assert list(train.divergence(initial, spoilt)) == ["repetition", "drift", "collapse"]
    assert list(train.divergence({}, spoilt)) == ["repetition", "drift"]
    assert "51%" in train.divergence(initial, spoilt)["repetition"]
    # the second bound of each pair: 0.4 of all 3-grams, and 1 nat per token lost
    assert train.divergence({"repetition": 0.0}, {"repetition": 0.4}) == {}
    assert train.divergence({"eval_logp_w_per_token": -0.4}, {"eval_logp_w_per_token": -1.4}) == {}


def test_only_settings_that_differ_are_printed():
    said = train.settings_table(Settings(lr=1e-5, out="there", max_length=99)).splitlines()
    assert "there/settings.json" in said[0] and [line.split() for line in said[1:]] == [
        ["max_length", "99"], ["lr", "1e-05"],
    ]  # fmt: skip


def test_a_log_file_holds_no_bars(arguments, tmp_path):
    """stderr into a pipe: whole lines, none rewritten, and no progress of what took less than ten seconds."""
    said = processes.run(["train.py", *arguments()], tmp_path).err
    assert "\r" not in said and "%|" not in said and "step 4 " in said


# ---- settings ------------------------------------------------------------------------------------------------------------


def test_settings_round_trip(tmp_path):
    """Command line with - or _, YAML, JSON, and the file that a run writes: the same settings."""
    line = "--lr 5e-7 --batch-size 16 --model m --dataset d --gradient_checkpointing --max_prompt_length 99".split()
    wanted = train.parse_settings(line)
    assert (wanted.lr, wanted.batch_size, wanted.gradient_checkpointing, wanted.max_prompt_length) == (5e-7, 16, True, 99)
    values = dict(lr=5e-7, batch_size=16, model="m", dataset="d", gradient_checkpointing=True, max_prompt_length=99)
    text = "lr: 5e-7\nbatch-size: 16\nmodel: m\ndataset: d\ngradient_checkpointing: yes\nmax_prompt_length: 99\n"
    (tmp_path / "s.yaml").write_text(text)
    (tmp_path / "s.json").write_text(json.dumps(values))
    (tmp_path / "all.yaml").write_text(yaml.safe_dump(train.asdict(wanted)))
    for name in ("s.yaml", "s.json", "all.yaml"):
        assert train.parse_settings([str(tmp_path / name)]) == wanted
    assert train.parse_settings([str(tmp_path / "s.yaml"), "--lr", "1e-6"]).lr == 1e-6


def test_without_model_and_dataset_the_settings_are_those_of_a_file():
    """Options beside it win; a file that names neither model nor dataset is not completed."""
    here = Path(train.__file__).parent
    s = train.parse_settings(["--lr", "5e-3", "--seed", "3"])
    assert s == train.parse_settings([os.path.relpath(here / "tests/toy/simpo.yaml"), "--lr", "5e-3", "--seed", "3"])
    assert [Path(name).resolve() for name in (s.model, s.dataset)] == [here / "tests/toy/model", here / "tests/toy/pairs.jsonl"]
    assert (s.objective, s.lr, s.seed) == ("simpo(beta=2.0, gamma=1.0)", 5e-3, 3)
    assert train.parse_settings([]).lr == 2e-4
    assert train.parse_settings(["--model", "m", "--dataset", "d"]).lr == 1e-6


def test_a_file_of_settings_without_model_and_dataset(tmp_path):
    (tmp_path / "s.yaml").write_text("lr: 1e-5\n")
    with pytest.raises(UserError, match="model is missing"):
        train.parse_settings([str(tmp_path / "s.yaml")])
    assert train.parse_settings([str(tmp_path / "s.yaml"), "--model", "m", "--dataset", "d"]).lr == 1e-5


def test_names_that_begin_with_a_dot_lie_beside_the_file(tmp_path, monkeypatch):
    """From any directory, each of several sources; all other names stay as they are, and so do those of the command line."""
    folder = tmp_path / "a folder"
    folder.mkdir()
    (folder / "s.yaml").write_text(
        "model: ./model\ndataset: ./a.jsonl[:10], ./b.jsonl@0.5,org/name:split, c/./d.jsonl, ../e.jsonl\n"
        "eval_dataset: ./held.jsonl\nout: ./out\n"
    )
    s = train.parse_settings([str(folder / "s.yaml")])
    assert (s.model, s.eval_dataset, s.out) == (f"{folder}/model", f"{folder}/held.jsonl", "./out")
    sources = [name for name, _ in data._sources(s.dataset)]
    assert sources == [f"{folder}/a.jsonl[:10]", f"{folder}/b.jsonl", "org/name:split", "c/./d.jsonl", "../e.jsonl"]
    assert train.parse_settings([str(folder / "s.yaml"), "--model", "./mine"]).model == "./mine"
    monkeypatch.chdir(folder)
    assert Path(train.parse_settings(["s.yaml"]).model).absolute() == folder / "model"


@pytest.mark.parametrize("batching", [{}, {"tokens_per_microbatch": 60}])
def test_scores_reach_the_objective_that_asks_for_them(world, arguments, tmp_path, batching):
    """The loss of step 1, at which policy = reference: the mean of KL(σ(m) ‖ ½) over its pairs, by Python's own log."""
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    margins = {row["chosen"]: row["score_chosen"] - row["score_rejected"] for row in rows}
    run = train.prepare(train.parse_settings(arguments(objective="rpo_bwd", max_steps=1, **batching)))
    words = [run.tokenizer.decode(run.train[i].responses[0], skip_special_tokens=True) for i in run.plan[0]]
    assert train.batch_inputs(run, first_examples(run), run.plan[0])["margin"].tolist() == [
        margins[text.strip()] for text in words
    ]
    targets = [1 / (1 + math.exp(-margins[text.strip()])) for text in words]
    expected = [p * math.log(2 * p) + (1 - p) * math.log(2 * (1 - p)) for p in targets]
    assert train.train_step(run, run.plan[0])["loss"] == pytest.approx(sum(expected) / len(expected), rel=1e-5)
    assert train.evaluate(run)  # held-out rows have their scores too


@pytest.mark.parametrize("objective", ["odpo", "0.5*dpo + rpo_fwd(eta=2.0)"])
def test_data_without_scores_is_refused_before_the_model_is_loaded(world, arguments, tmp_path, monkeypatch, capsys, objective):
    monkeypatch.setattr(dist, "load_model", lambda *a: pytest.fail("the model was loaded"))
    rows = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    for first, dataset in ((1, tmp_path / "none.jsonl"), (8, tmp_path / "some.jsonl")):
        kept = [row if i < first - 1 else {k: row[k] for k in ("prompt", "chosen", "rejected")} for i, row in enumerate(rows)]
        dataset.write_text("".join(json.dumps(row) + "\n" for row in kept))
        with pytest.raises(SystemExit) as stopped:
            train.main(arguments(dataset=dataset, objective=objective, eval_size=0))
        said = capsys.readouterr().err
        assert stopped.value.code == 2 and "score_chosen" in said and f"row {first} " in said and "Traceback" not in said


SIMPO = "beta=2.0, gamma=1.0, label_smoothing=0.0, average=True"  # all that it can be given, as it is recorded
MPO = "0.8*dpo(beta=0.1, label_smoothing=0.0) + 0.2*bco_pair(beta=0.1, delta=0.0) + 1.0*sft()"


def softplus(x: float) -> float:
    return math.log1p(math.exp(x))


def test_a_run_of_a_sum(arguments, tmp_path, monkeypatch):
    """Two steps: loss and reward of each from its log-probs, by hand; the reward is 0.1(s − s̄), that of the first term."""
    seen = []
    measures = train.measures
    monkeypatch.setattr(train, "measures", lambda o, values, loss: seen.append(values) or measures(o, values, loss))
    train.main(arguments(objective=MPO, max_steps=2, eval_size=0, samples=0))
    lines = steps(tmp_path / "out")
    assert len(lines) == len(seen) == 2 and json.loads((tmp_path / "out" / "summary.json").read_text())["objective"] == MPO
    for line, values in zip(lines, seen):
        losses, margins = [], []
        for w, r in (values["logp"] - values["ref"]).tolist():
            losses.append(0.8 * softplus(-0.1 * (w - r)) + 0.2 * (softplus(-0.1 * w) + softplus(0.1 * r)))
            margins.append(0.1 * (w - r))
        likelihood = (values["logp"][:, 0] / values["len"][:, 0]).mean().item()
        assert line["loss"] == pytest.approx(sum(losses) / len(losses) - likelihood, rel=1e-5)
        assert line["reward_margin"] == pytest.approx(sum(margins) / len(margins), abs=1e-5)
    assert abs(lines[0]["reward_margin"]) < 1e-4 < abs(lines[1]["reward_margin"])


def test_a_run_of_an_objective_of_ones_own(arguments, tmp_path):
    """The user's simpo is losses.py's: the same losses and rewards at every step, and the record says where it is from."""
    file = tmp_path / "mine.py"
    file.write_text(
        "from losses import average_logp, bradley_terry, objective\n\n@objective(reward=average_logp)\n"
        "def mine(logp_w, logp_l, len_w, len_l, *, beta=1.0):\n"
        "    return bradley_terry(beta * (logp_w / len_w - logp_l / len_l))\n"
    )
    runs = {}
    for objective in (f"{file}:mine(beta=2.0)", f"simpo({SIMPO.replace('1.0', '0.0')})"):
        out = tmp_path / str(len(runs))
        train.main(arguments(objective=objective, max_steps=2, eval_size=0, samples=0, out=out))
        assert json.loads((out / "summary.json").read_text())["objective"] == objective
        runs[objective] = [(line["loss"], line["reward_margin"], line["grad_norm"]) for line in steps(out)]
    first, second = runs.values()
    assert first == second


def test_a_run_is_another_with_another_weight(shifted):
    one, same, other = (
        train.identity(shifted(text))["objective"] for text in ("dpo + 0.1*sft", "dpo() + .1*sft", "dpo + 0.2*sft")
    )
    dpo = "1.0*dpo(beta=0.1, label_smoothing=0.0)"
    assert one == same == f"{dpo} + 0.1*sft()" and other == f"{dpo} + 0.2*sft()"


def test_a_fresh_folder_has_the_names_of_a_sum(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    s = Settings(model="m", dataset="d")
    assert re.fullmatch(r"\d{8}-\d{6}-dpo-bco_pair-sft", train.prepare_out(replace(s, objective=MPO)).name)
    assert re.fullmatch(r"\d{8}-\d{6}-simpo", train.prepare_out(s).name)


BAD = {
    "an own objective without its file": (dict(objective="nowhere.py:mine"), ["nowhere.py cannot be read"]),
    "an own objective that is not registered": (dict(objective=f"{__file__}:softplus"), ["softplus is not registered"]),
    "a difference": (dict(objective="dpo - sft"), ["write it as a call", "as a sum"]),
    "a quotient": (dict(objective="dpo/2 + sft"), ["write it as a call"]),
    "a product of objectives": (dict(objective="dpo*sft"), ["write it as a call"]),
    "a number alone": (dict(objective="2*3 + dpo"), ["write it as a call"]),
    "weight 0": (dict(objective="0*dpo + sft"), ["a weight is a finite number above 0"]),
    "a negative weight": (dict(objective="-1*sft + dpo"), ["write it as a call"]),
    "an infinite weight": (dict(objective="1e999*dpo + sft"), ["a weight is a finite number above 0"]),
    "a weight of 400 digits": (dict(objective=f"{'9' * 400}*dpo"), ["a weight is a finite number above 0"]),
    "a truth as weight": (dict(objective="True*dpo"), ["a weight is a finite number above 0"]),
    "3,000 terms": (dict(objective="+".join(["dpo"] * 3000)), ["write it as a call"]),
    "unknown term": (dict(objective="dpo + simppo"), ["unknown objective 'simppo'", "did you mean simpo?"]),
    "a term out of range": (dict(objective="dpo + 0.5*simpo(beta=0.0)"), ["simpo: `beta` is 0.0"]),
    "a term's unknown argument": (dict(objective="dpo + simpo(tau=1)"), ["simpo has no argument 'tau'"]),
    "pairs and single completions": (dict(objective="dpo + 0.5*kto + sft"), ["kto takes single completions", "dpo, sft pairs"]),
    "unknown objective": (dict(objective="simp"), ["unknown objective 'simp'", "simpo", "dpo"]),
    "unknown argument": (dict(objective="simpo(tau=1)"), ["no argument 'tau'", "simpo(beta=2.0, gamma=1.0"]),
    "an expression": (dict(objective="simpo(beta=1+1)"), ["write it as a call"]),
    "code": (dict(objective="__import__('os').system('true')"), ["write it as a call"]),
    "wrong kind": (dict(objective="simpo(beta='2')"), ["wrong kind"]),
    "out of range": (dict(objective="dpo(beta=0.0)"), ["beta"]),
    "an argument twice": (dict(objective="simpo(beta=1, beta=2)"), ["an argument is there twice"]),
    "400 digits": (dict(objective=f"simpo(beta={'9' * 400})"), ["beta=999", "wrong kind or size"]),
    "an infinite number": (dict(objective="simpo(beta=1e999)"), ["beta=inf", "wrong kind or size"]),
    "3,000 minus signs": (dict(objective=f"simpo(beta={'-' * 3000}1)"), ["write it as a call"]),
    "a very long name": (dict(objective="x" * 200_000), [f"'{'x' * 80}'", "unknown objective"]),
    "nearly an objective": (dict(objective="simppo"), ["did you mean simpo?"]),
    "nearly an argument": (dict(objective="simpo(gama=1)"), ["did you mean gamma?"]),
    "no sample tokens": (dict(sample_tokens=0), ["sample_tokens is 0"]),
    "endless epochs": (dict(epochs=10**9, max_steps=None), ["epochs 1000000000 over 32 rows", "set max_steps"]),
    "an out of 300 characters": (dict(out="x" * 300), ["out xxx", "cannot be written"]),
    "an out that is a file": (dict(out=__file__), ["cannot be written (Not a directory)"]),
    "compiled padding": (dict(compile=True, layout="padded"), ["compile works on packs", "--layout padded"]),
    "a mesh without torchrun": (dict(mesh="2x2"), ["mesh", "torchrun"]),
    "missing file": (dict(dataset="nowhere.jsonl"), ["nowhere.jsonl", "no such file"]),
    "missing model": (dict(model="/nowhere/model"), ["/nowhere/model"]),
    "learning rate 0": (dict(lr=0), ["lr is 0", "above 0"]),
    "learning rate 1e30": (dict(lr=1e30), ["lr is 1e+30"]),
    "learning rate below 0": (dict(lr=-0.5), ["lr is -0.5"]),
    "learning rate nan": (dict(lr="nan"), ["lr is nan", "finite"]),
    "weight decay nan": (dict(weight_decay="nan"), ["weight_decay is nan", "finite"]),
    "weight decay inf": (dict(weight_decay="inf"), ["weight_decay is inf", "finite"]),
    "grad norm nan": (dict(max_grad_norm="nan"), ["max_grad_norm is nan", "finite"]),
    "batch size 0": (dict(batch_size=0), ["batch_size is 0"]),
    "batch size as text": (dict(batch_size="many"), ["many"]),
    "unknown setting": (dict(learning_speed=1), ["learning-speed"]),
    "max_length too small": (dict(max_length=1), ["max_length 1"]),
    "no room at this max_length": (dict(max_length=8, max_prompt_length=8), ["max_length 8", "max_prompt_length 8"]),
    "layout": (dict(layout="dense"), ["--layout: invalid choice: 'dense'", "packed", "padded"]),
    "held out all": (dict(eval_size=40), ["eval_size 40"]),
    "resume without a run": (dict(resume=True), ["no run to resume"]),
    "unpaired data for a paired objective": (dict(dataset="ROWS"), ["compares pairs", "kto"]),
    "wandb missing": (dict(log_to="wandb"), ["wandb", "pip install"]),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD)
def test_bad_settings_end_with_a_message_and_code_2(arguments, world, capsys, monkeypatch, name):
    more, said = BAD[name]
    more = {k: world / "rows.jsonl" if v == "ROWS" else v for k, v in more.items()}
    if name == "wandb missing":
        monkeypatch.setattr(train.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(**more))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and "Traceback" not in error
    for part in said:
        assert part in error


FILES = {  # content of a settings file → what is said of it
    b"lr: [": "cannot be read",
    b"- lr": "holds no settings",
    b"": "holds no settings",
    b"{}": "holds no settings",
    b"learning_rate: 1": "unknown setting --learning_rate=1",
    b"resume: 3": "--resume: Truthy value expected: got 3",
    b"lr: yes": "--lr: invalid float value",
    b"batch_size:": "batch_size needs a value",
    b"lr: 1e-6\nbatch_size: 2\nlr: 1e-5": "lr is there twice",
    b"lr: {peak: 1}": "lr needs a value: one, or a list of some",
    b"a: &a [x, x]\nb: &b [*a, *a]\ndataset: [*b, *b]": "b needs a value: one",
    b"out: !!python/object/apply:os.getcwd []": "cannot be read",
    "objective: ä".encode("latin-1"): "cannot be read as settings ('utf-8' codec",
    "lr: 1e-6".encode("utf-16"): "cannot be read as settings ('utf-8' codec",
    bytes(range(1, 32)): "cannot be read",
    b"[" * 20_000: "cannot be read",
}


@pytest.mark.parametrize("content", FILES)
def test_settings_file_errors(tmp_path, capsys, content):
    (tmp_path / "s.yaml").write_bytes(content)
    with pytest.raises(SystemExit) as stop:
        train.main([str(tmp_path / "s.yaml")])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.startswith(f"error: {tmp_path / 's.yaml'}: ") and FILES[content] in error


def test_settings_files_say_what_people_write(tmp_path):
    """Rates without a point, lists, null for what is not set, the record of an earlier run."""
    (tmp_path / "s.yaml").write_text("model: m\ndataset: [a.jsonl, b.jsonl@0.5]\nlr: 1e-6\nmax_steps: null\ncompile: true\n")
    s = train.parse_settings([str(tmp_path / "s.yaml")])
    assert (s.dataset, s.lr, s.max_steps, s.compile) == ("a.jsonl,b.jsonl@0.5", 1e-6, None, True)
    (tmp_path / "settings.json").write_text(json.dumps(vars(replace(s, lr=1e-7))))
    assert train.parse_settings([str(tmp_path / "settings.json")]) == replace(s, lr=1e-7)


def test_out_that_holds_a_run_is_refused_and_kept(arguments, tmp_path, capsys):
    train.main(arguments(max_steps=1))
    before = sorted(p.relative_to(tmp_path) for p in (tmp_path / "out").rglob("*"))
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(max_steps=1))
    assert stop.value.code == 2 and "use --resume or another folder" in capsys.readouterr().err
    assert sorted(p.relative_to(tmp_path) for p in (tmp_path / "out").rglob("*")) == before
    other = tmp_path / "notes"
    other.mkdir()
    (other / "letter.txt").write_text("mine")
    with pytest.raises(SystemExit):
        train.main(arguments(out=other))
    assert (other / "letter.txt").read_text() == "mine"


def files_in(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def refused(argv: list[str], capsys) -> str:
    """What is said of a command line that must end with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        train.main(argv)
    assert stop.value.code == 2
    return capsys.readouterr().err


def test_a_folder_without_our_marker_is_no_run(arguments, tmp_path, capsys):
    out = tmp_path / "project"
    (out / "checkpoints" / "step-000001").mkdir(parents=True)
    for name in ("settings.json", "summary.json", "checkpoints/step-000001/complete"):
        (out / name).write_text("{}")
    (out / "thesis.txt").write_text("three years")
    before = files_in(out)
    assert "no run" in refused(arguments(out=out) + ["--resume"], capsys) and files_in(out) == before


def test_a_finished_run_is_not_run_again(arguments, tmp_path, capsys):
    first = train.main(arguments())
    before = files_in(tmp_path / "out")
    assert train.main(arguments(lr=1) + ["--resume"]) == first
    assert "holds a finished run of 4 steps" in capsys.readouterr().err and files_in(tmp_path / "out") == before


def test_resume_without_a_checkpoint_is_said_and_needs_the_same_run(arguments, tmp_path, capsys):
    train.main(arguments())
    (tmp_path / "out" / "summary.json").unlink()  # as if killed at the very end, without a checkpoint
    before = files_in(tmp_path / "out")
    assert "lr is 0.5 here and 0.001 there" in refused(arguments(lr=0.5) + ["--resume"], capsys)
    assert files_in(tmp_path / "out") == before
    train.main(arguments() + ["--resume"])
    assert "no checkpoint; starting from step 0" in capsys.readouterr().err
    after = files_in(tmp_path / "out")
    assert after["model/model.safetensors"] == before["model/model.safetensors"] and "summary.json" in after


def test_one_run_at_a_time_in_a_folder(arguments, tmp_path, capsys):
    """Refused while another process has the folder; that one is killed, and nothing of it is in the way."""
    train.main(arguments(max_steps=1))
    (tmp_path / "out" / "summary.json").unlink()  # as if killed at the very end
    before = files_in(tmp_path / "out")
    forking = multiprocessing.get_context("fork")
    owned = forking.Event()

    def own_it():
        lock = dist.own(tmp_path / "out")
        owned.set()
        time.sleep(600)
        del lock

    other = forking.Process(target=own_it)
    other.start()
    try:
        assert owned.wait(60)
        assert "is in use by another run" in refused(arguments(max_steps=1) + ["--resume"], capsys)
        assert files_in(tmp_path / "out") == before
    finally:
        other.kill()
        other.join()
    assert train.main(arguments(max_steps=1) + ["--resume"])["steps"] == 1


def test_records_that_are_damaged_are_passed_over_and_said(arguments, tmp_path, capsys):
    """Lines 3 and later of metrics.jsonl are no records; of samples.jsonl the first of two lines is destroyed."""
    more = dict(samples=2, save_every=2, eval_every=1)
    train.main(arguments(**more))
    out, odd = tmp_path / "out", [b"[]", b"1", b"{}", b'{"step": "1", "loss": 1}', b"\xff\xfe", b'{"step": 1, "lo', b"[" * 9999]
    whole, samples = metrics(out), (out / "samples.jsonl").read_text().splitlines()
    shutil.rmtree(out / "checkpoints" / "step-000004")
    (out / "summary.json").unlink()
    first = (out / "metrics.jsonl").read_bytes().splitlines()
    (out / "metrics.jsonl").write_bytes(b"\n".join([*first[:2], *odd, *first[2:]]) + b"\n")
    (out / "samples.jsonl").write_bytes(b"\xff{}\n" + samples[1].encode() + b"\n")
    train.main(arguments(**more) + ["--resume"])
    said = capsys.readouterr().err
    assert "metrics.jsonl: left out what is no record of a run: line 3, 4, 5, 6, 7, 8, 9" in said
    assert "samples.jsonl: left out what is no record of a run: line 1" in said
    assert [line["step"] for line in metrics(out)] == [line["step"] for line in whole]
    assert (out / "samples.jsonl").read_text().splitlines()[0] == samples[1]


def test_nothing_but_progress_before_an_error_about_settings(arguments, capsys):
    said = refused(arguments(eval_size=10**6, samples=2), capsys)
    assert said.startswith("error: eval_size 1000000 leaves no training rows")


def test_few_held_out_rows_are_called_too_few(arguments, capsys):
    train.main(arguments(eval_size=8, max_steps=1))
    assert "8 held-out rows are too few to compare" in capsys.readouterr().err


def test_model_folder_without_tokenizer(arguments, world, tmp_path, capsys):
    shutil.copytree(world / "model", tmp_path / "bare")
    for file in (tmp_path / "bare").glob("token*"):
        file.unlink()
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(model=tmp_path / "bare"))
    assert stop.value.code == 2 and "no usable tokenizer" in capsys.readouterr().err


def test_non_finite_loss_names_the_rows(arguments, world, tmp_path, monkeypatch, capsys):
    """One embedding is NaN, that of a word which only some rows hold: those rows are named, with file and number."""
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    tokenizer = AutoTokenizer.from_pretrained(world / "model")
    word = "gray"
    with torch.no_grad():
        model.get_input_embeddings().weight[tokenizer.convert_tokens_to_ids(word)] = float("nan")
    model.config.tie_word_embeddings = False
    model.lm_head = torch.nn.Linear(32, model.config.vocab_size, bias=False)
    model.save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    lines = (world / "pairs.jsonl").read_text().splitlines()
    guilty = {f"pairs.jsonl row {i}" for i, line in enumerate(lines, 1) if word in line}
    with pytest.raises(SystemExit) as stop:
        monkeypatch.setattr(dist, "not_finite", lambda model: [])  # else the model itself is refused
        train.main(arguments(model=tmp_path / "model", layout="padded", eval_size=0, batch_size=40, max_steps=None))
    error = capsys.readouterr().err
    named = {f"pairs.jsonl row {part.split()[0].rstrip(';. ')}" for part in error.split("pairs.jsonl row ")[1:]}
    assert stop.value.code == 2 and "not finite" in error and named and named <= guilty


def test_a_model_that_is_not_finite_is_not_exported(arguments, tmp_path, capsys, monkeypatch):
    """One step of 1e39 takes fp32 weights, at most 3.4e38, to infinity."""
    monkeypatch.setattr(train, "learning_rate", lambda *_: 1e39)
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(max_steps=1))
    assert stop.value.code == 2 and "not finite: nothing is in" in capsys.readouterr().err
    assert not (tmp_path / "out" / "model").exists()


def test_a_model_that_comes_with_nan_is_named_as_that(arguments, world, tmp_path, capsys):
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 4] = float("nan")
    model.save_pretrained(tmp_path / "model")
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(tmp_path / "model")
    with pytest.raises(SystemExit) as stop:
        train.main(arguments(model=tmp_path / "model"))
    assert stop.value.code == 2 and "first is model.layers.1.mlp.up_proj.weight" in capsys.readouterr().err


# ---- models as they come: what is scored is what they say, or they are refused by name ------------------------------------

SIZE = dict(vocab_size=60, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64)
GATED = SIZE | dict(intermediate_size=48, num_key_value_heads=2)
ODD = {  # not one of them is to be called by its name in the trainer
    "llama": LlamaConfig(**GATED, attention_dropout=0.1),
    "opt": transformers.OPTConfig(**SIZE, ffn_dim=48, word_embed_proj_dim=32),  # dropout 0.1, kept as a number
    "phimoe": transformers.PhimoeConfig(**GATED, num_local_experts=4, router_jitter_noise=0.1, input_jitter_noise=0.1),
    "gpt-neo": transformers.GPTNeoConfig(
        vocab_size=60, hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=96, window_size=8,
        attention_types=[[["global", "local"], 1]],
    ),
    "falcon-h1": transformers.FalconH1Config(**GATED, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8),
    "mamba": MambaConfig(vocab_size=60, hidden_size=32, state_size=4, num_hidden_layers=2),
    "bloom": transformers.BloomConfig(vocab_size=60, hidden_size=32, n_layer=2, n_head=4),
    "llama-4": transformers.Llama4TextConfig(
        **GATED | {"num_hidden_layers": 4}, head_dim=8, intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=8
    ),
    "cpm-ant": transformers.CpmAntConfig(
        vocab_size=60, hidden_size=32, num_attention_heads=4, dim_head=8, dim_ff=48, num_hidden_layers=2, prompt_length=4,
        position_bias_num_buckets=32, position_bias_max_distance=64,
    ),
    "phi-3": transformers.Phi3Config(
        **GATED, pad_token_id=0, original_max_position_embeddings=16,
        rope_scaling=dict(rope_type="longrope", short_factor=[1.0] * 4, long_factor=[4.0] * 4),
    ),
}  # fmt: skip


def odd(name: str, spread: float = 0.1) -> torch.nn.Module:
    """A model as from_pretrained gives it, its weights spread out, or with spread 0 as they are drawn."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(copy.deepcopy(ODD[name])).eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(spread * torch.randn_like(p))
    return model


def rows_of(*shapes: tuple) -> dict[str, tuple[int, data.Example]]:
    """The extremes of examples of (prompt, response, …) tokens."""
    g = torch.Generator().manual_seed(0)
    examples = []
    for i, shape in enumerate(shapes, 1):
        prompt, *responses = (torch.randint(3, 60, (n,), generator=g).tolist() for n in shape)
        examples.append(data.Example(prompt, responses, where=f"pairs.jsonl row {i}"))
    extremes = {}
    train.survey(examples, extremes)
    return extremes


LONG = ((20, 14, 9), (3, 2, 4))  # above the window of 8 and, together with the prompt, above 16 positions


@pytest.mark.parametrize("name", ["llama", "opt", "phimoe", "llama-4"])
def test_where_both_layouts_are_right_packed_is_taken(name, capsys):
    """The choice against the textbook's sums, of every response alone, in both layouts."""
    model = odd(name)
    rows = rows_of(*LONG)
    expected = "padded" if name == "llama-4" else "packed"  # whose masks are its own
    assert train.choose_layout(model, rows, "auto") == expected
    assert f"layout: {expected}" in capsys.readouterr().err
    policy = train.ResponseLogProbs(model)
    examples = [rows["longest"][1], rows["shortest"][1]]
    own = torch.stack([response_logprob(model, e.prompt, r) for e in examples for r in e.responses])
    policy.use_layout(expected)
    torch.testing.assert_close(policy(data.LAYOUTS[expected](examples))["logp"], own, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("spread", [0.1, 0.0])
@pytest.mark.parametrize("name", ["gpt-neo", "falcon-h1", "mamba", "bloom"])
def test_where_packs_are_wrong_or_fail_rows_are_padded(name, spread, capsys):
    """A window, state that goes on into the next row, attention that wants another mask: said in one line, or an error if
    packs are asked for. Untrained models are found out too, whose logits hardly differ."""
    model = odd(name, spread)
    assert train.choose_layout(model, rows_of(*LONG), "auto") == "padded"
    said = capsys.readouterr().err
    why = "it fails (ValueError: " if name == "bloom" else "its log-probs differ from the model's own by "
    assert said.startswith(f"layout: padded, as packed {why}") and said.count("\n") == 1
    with pytest.raises(UserError, match=f"{type(model).__name__}: packed .*; use --layout padded"):
        train.choose_layout(model, rows_of(*LONG), "packed")
    assert train.choose_layout(model, rows_of(*LONG), "padded") == "padded"


def test_a_window_that_no_row_reaches_is_none():
    """One of 8 tokens, which a pack counts over a prompt and both its responses: 7 fit. Of rows of 7 and 6 tokens the second
    has 11 in all. And a pack of 200 tokens is longer than the model's masks of 96."""
    model = odd("gpt-neo")
    assert train.choose_layout(model, rows_of((3, 2, 2)), "auto") == "packed"
    assert train.choose_layout(model, rows_of((6, 1, 1), (1, 5, 5), (1, 1, 1)), "auto") == "padded"
    assert train.choose_layout(model, rows_of((3, 2, 2)), "auto", budget=200) == "padded"


@pytest.mark.parametrize("name", ["cpm-ant", "phi-3"])
def test_models_that_see_padding_are_refused(name):
    """CPM-Ant attends to it; Phi-3 counts positions otherwise beside a row of more than 16. Alone, both are scored right."""
    model = odd(name)
    for wanted in ("auto", "padded"):
        with pytest.raises(UserError, match=f"{type(model).__name__} cannot be trained: padded .* it sees padding"):
            train.choose_layout(model, rows_of(*LONG), wanted)
    if name == "phi-3":
        assert train.choose_layout(model, rows_of((5, 4, 3), (3, 2, 4)), "auto") == "packed"


def test_a_head_that_does_more_is_refused():
    model = odd("llama")
    model.lm_head.register_forward_hook(lambda module, given, out: out * 1.5)
    with pytest.raises(UserError, match="cannot be trained: padded its log-probs differ .* a head of weight, bias"):
        train.choose_layout(model, rows_of(*LONG), "auto")


def test_whatever_is_random_is_found_out():
    """Dropout that no mode turns off."""
    model = odd("llama")
    model.model.norm.register_forward_hook(lambda module, given, out: torch.nn.functional.dropout(out, 0.001, training=True))
    with pytest.raises(UserError, match="the same batch is scored twice: something random"):
        train.choose_layout(model, rows_of(*LONG), "auto")


def test_a_survey_by_hand():
    """Lengths 6, 4 and 7, of 10, 5 and 7 tokens in all; the highest id stands in a rejected response. In two parts the same,
    save for the hash, which any change of an id, a label or a margin changes."""
    rows = [data.Example([1, 1], [[1] * 4, [1] * 4]), data.Example([1], [[1], [9, 1, 1]]), data.Example([1] * 6, [[1]])]
    found = {"longest": (7, rows[2]), "largest": (10, rows[0]), "shortest": (-4, rows[1]), "highest id": (9, rows[1])}
    found["without margin"] = (True, rows[0])
    whole, parts = {}, {}
    digest, tokens = train.survey(iter(rows), whole)
    assert whole == found and tokens == 22
    assert [train.survey(part, parts)[1] for part in (rows[:1], rows[1:])] == [10, 12] and parts == found
    assert train.survey([e._replace(where="elsewhere") for e in rows], {})[0] == digest
    for change in (dict(prompt=[1, 2]), dict(responses=[[1] * 4, [1] * 3]), dict(desirable=True), dict(margin=0.5)):
        assert train.survey([rows[0]._replace(**change), *rows[1:]], {})[0] != digest


def test_blocks_are_left_out_until_every_kind_is_there():
    """Four of six blocks, as the last kind is the fourth; all six again afterwards, with what they compute."""
    types = ["sliding_attention", "sliding_attention", "sliding_attention", "full_attention"] * 2
    config = transformers.Gemma3TextConfig(
        **GATED | {"num_hidden_layers": 8}, head_dim=8, layer_types=types, sliding_window=4, bos_token_id=1, eos_token_id=2
    )
    model = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.arange(3, 15)[None]
    before = model(ids).logits
    with train.first_blocks(model):
        assert len(model.model.layers) == 4
        assert not torch.equal(model(ids).logits, before)
    assert torch.equal(model(ids).logits, before)


@pytest.fixture
def saved(world, tmp_path):
    """A folder with the toy task's tokenizer and a model of some configuration."""

    def save(config: transformers.PreTrainedConfig) -> Path:
        tokenizer = AutoTokenizer.from_pretrained(world / "model")
        config.update(dict(vocab_size=len(tokenizer), bos_token_id=None, eos_token_id=3, pad_token_id=3))
        torch.manual_seed(0)
        AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "model")
        tokenizer.save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


def in_config(folder: Path, **changed) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changed))


@pytest.mark.parametrize("layout", ["packed", "padded"])
@pytest.mark.parametrize("name", ["llama", "opt", "phimoe"])
def test_dropout_and_noise_are_off_in_a_run(arguments, saved, tmp_path, name, layout):
    """The first loss of SFT is what the untouched model says of the same rows, one by one; the export has its dropout still."""
    folder = saved(transformers.AutoConfig.for_model(**ODD[name].to_dict()))
    given = AutoModelForCausalLM.from_pretrained(folder)
    run = train.prepare(train.parse_settings(arguments(model=folder, objective="sft", layout=layout, max_steps=1)))
    assert not any(module.training for module in run.policy.modules())
    line = train.train_step(run, run.plan[0])
    means = [response_logprob(given, e.prompt, e.responses[0]).item() / len(e.responses[0]) for e in first_examples(run)]
    assert line["loss"] == pytest.approx(-sum(means) / len(means), rel=1e-5)
    dropout = {key: value for key, value in given.config.to_dict().items() if "drop" in key or "noise" in key}
    assert any(dropout.values()) and dropout.items() <= run.policy.model.config.to_dict().items()


def test_layouts_fall_back_in_a_run(arguments, saved, tmp_path, capsys):
    """GPT-Neo with a window: auto is --layout padded, bit for bit, and resumes as that."""
    folder = saved(transformers.GPTNeoConfig(
        hidden_size=32, num_layers=2, num_heads=4, max_position_embeddings=128, window_size=4,
        attention_types=[[["global", "local"], 1]],
    ))  # fmt: skip
    more = dict(model=folder, eval_size=0, save_every=1, max_steps=2, tokens_per_microbatch=100)  # masks have 128 columns
    train.main(arguments(out=tmp_path / "auto", **more))
    assert "layout: padded, as packed its log-probs differ" in capsys.readouterr().err
    train.main(arguments(out=tmp_path / "padded", layout="padded", **more))
    first, second = ([line["loss"] for line in steps(tmp_path / name)] for name in ("auto", "padded"))
    assert first == second
    shutil.rmtree(tmp_path / "auto/checkpoints/step-000002")
    (tmp_path / "auto/summary.json").unlink()
    train.main(arguments(out=tmp_path / "auto", **more) + ["--resume"])
    assert [line["loss"] for line in steps(tmp_path / "auto")] == second


@pytest.mark.parametrize("flags", [dict(output_attentions=True), dict(output_hidden_states=True), dict(return_dict=False)])
def test_configs_that_ask_for_other_outputs_train_alike(arguments, world, tmp_path, flags):
    shutil.copytree(world / "model", tmp_path / "model")
    in_config(tmp_path / "model", **flags)
    train.main(arguments(model=tmp_path / "model", out=tmp_path / "a"))
    train.main(arguments(out=tmp_path / "b"))
    assert [line["loss"] for line in steps(tmp_path / "a")] == [line["loss"] for line in steps(tmp_path / "b")]


def test_rows_longer_than_learned_positions_are_named(arguments, saved, capsys):
    """Toy rows have some 20 tokens; GPT-2 gets 12 positions. With 30, only the samples' answers of 64 tokens are too long."""
    config = dict(n_embd=32, n_layer=2, n_head=4)
    said = refused(arguments(model=saved(transformers.GPT2Config(n_positions=12, **config))), capsys)
    assert re.search(r"GPT2LMHeadModel cannot read .*pairs.jsonl row \d+, \d+ tokens .*max_position_embeddings: 12", said)
    model = saved(transformers.GPT2Config(n_positions=60, **config))
    said = refused(arguments(model=model, sample_tokens=64), capsys)
    assert "GPT2LMHeadModel cannot read" in said and "a lower --max_length or --sample_tokens" in said


def test_ids_above_the_embeddings_are_named(arguments, world, tmp_path, capsys):
    """A token whose id is 500 though the tokenizer counts fewer, as there is nothing between; the model has 400 embeddings."""
    tokenizer = json.loads((world / "model/tokenizer.json").read_text())
    shutil.copytree(world / "model", tmp_path / "model")
    words = tokenizer["model"]["vocab"]
    words["gray"] = 500
    (tmp_path / "model/tokenizer.json").write_text(json.dumps(tokenizer))
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    model.resize_token_embeddings(400)
    model.save_pretrained(tmp_path / "model")
    said = refused(arguments(model=tmp_path / "model"), capsys)
    assert re.search(r"pairs.jsonl row \d+ holds id 500, but LlamaForCausalLM has only 400 embeddings", said)


def test_what_gets_no_gradient_is_said_and_resumes(arguments, world, tmp_path, capsys, monkeypatch):
    """A parameter beside the path from ids to log-probs: named, kept as it is, and zero moments for it in checkpoints."""
    build = train.build_policy

    def with_more(*given):
        policy = build(*given)
        policy.model.model.layers[0].indexer = torch.nn.Linear(3, 2, bias=False)
        return policy

    monkeypatch.setattr(train, "build_policy", with_more)
    torch.manual_seed(0)
    train.main(arguments(out=tmp_path / "whole", save_every=2))
    assert "no gradient reaches 1 weights, which stay as they are: model.layers.0.indexer.weight" in capsys.readouterr().err
    shutil.copytree(tmp_path / "whole", tmp_path / "cut")
    shutil.rmtree(tmp_path / "cut/checkpoints/step-000004")
    (tmp_path / "cut/summary.json").unlink()
    train.main(arguments(out=tmp_path / "cut", save_every=2) + ["--resume"])
    assert [line["loss"] for line in steps(tmp_path / "cut")] == [line["loss"] for line in steps(tmp_path / "whole")]


def test_the_load_balancing_loss_is_said_to_be_left_out(arguments, saved, capsys):
    config = transformers.MixtralConfig(**GATED, num_local_experts=2, router_aux_loss_coef=0.02)
    train.main(arguments(model=saved(config), max_steps=1))
    assert "router_aux_loss_coef 0.02: the load-balancing loss" in capsys.readouterr().err


def test_models_without_attention_heads_train(arguments, saved, tmp_path, capsys):
    model = saved(MambaConfig(hidden_size=32, state_size=4, num_hidden_layers=2))
    train.main(arguments(model=model, objective="dpo"))
    assert len(steps(tmp_path / "out")) == 4 and "layout: padded" in capsys.readouterr().err


def test_generation_that_fails_is_a_user_error(arguments, capsys, monkeypatch):
    monkeypatch.setattr(LlamaForCausalLM, "generate", lambda *_, **__: {}["no such cache"])
    said = refused(arguments(), capsys)
    assert "--samples 0" in said and "no such cache" in said


def test_disagreeing_layouts_stop_a_run_that_asks_for_packs(arguments, monkeypatch, capsys):
    """An attention that ignores the tree (plain causal over the whole pack) is found out on the longest rows."""
    import logprobs

    def causal(module, query, key, value, mask, scaling=None, **kwargs):
        key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
        out = torch.nn.functional.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scaling)
        return out.transpose(1, 2), None

    monkeypatch.setitem(transformers.AttentionInterface._global_mapping, logprobs.packed_attention(), causal)
    assert "use --layout padded" in refused(arguments(layout="packed"), capsys)
    train.main(arguments())
    assert "layout: padded, as packed" in capsys.readouterr().err


def test_ctrl_c_twice_stops_at_once_and_says_how_to_go_on(capsys, request):
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background lacks
    request.addfinalizer(lambda: signal.signal(signal.SIGINT, before))

    def work(argv):
        with dist.StopOnSignal() as stop:
            os.kill(os.getpid(), signal.SIGINT)
            assert stop.requested()
            os.kill(os.getpid(), signal.SIGINT)
            time.sleep(5)

    with pytest.raises(SystemExit) as stop:
        train.main([], work)
    first, second = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 130 and "Ctrl-C again" in first and "--resume goes on" in second


def test_which_signal_came_first_and_what_a_second_one_means(monkeypatch):
    """SIGHUP counts; a second SIGTERM or SIGHUP within a second is the same request, later it means now: the handler that was
    there before. One that is ignored, as under nohup, stays so."""
    now, got = [100.0], []
    monkeypatch.setattr(dist.time, "monotonic", lambda: now[0])
    for first, second in ((signal.SIGTERM, signal.SIGTERM), (signal.SIGHUP, signal.SIGTERM), (signal.SIGTERM, signal.SIGINT)):
        before = {number: signal.signal(number, lambda n, frame: got.append(n)) for number in {first, second}}
        with dist.StopOnSignal() as stop:
            assert stop.requested() == 0
            for later in (0.0, 0.9, 1.1):
                assert not got
                now[0] = 100.0 + later
                os.kill(os.getpid(), second if later else first)
                assert stop.requested() == first
        assert got == [second]
        for number, handler in before.items():
            signal.signal(number, handler)
        got.clear()
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    with dist.StopOnSignal() as stop:
        os.kill(os.getpid(), signal.SIGHUP)
        assert stop.requested() == 0
    signal.signal(signal.SIGHUP, before)


def test_the_command_line_itself(tmp_path):
    """As typed in a shell: the message on stderr, nothing on stdout, exit code 2."""
    done = processes.run(["train.py", "--lr", "0"], tmp_path)
    assert done.code == 2 and done.out == "" and done.err.startswith("error: lr is 0")


@pytest.mark.parametrize("objective", ["tdpo1", "alpha_dpo_kl"])
def test_kl_to_the_reference_is_zero_at_step_zero(arguments, capsys, objective):
    """Also after completions were sampled with the models' own attention: the check of step 0 measures KL and log-ratio."""
    train.main(arguments(objective=objective, samples=2, max_steps=1))
    said = capsys.readouterr().err.split("policy and reference differ by at most ")[1]
    assert float(said.split()[0]) < 1e-5


def test_another_reference_is_found_out_at_step_zero():
    """Per token: |−4 − (−2)| / 2 = 1 nat off."""
    logp = torch.tensor([[-4.0, -2.0]])
    values = {"len": torch.tensor([[2, 2]]), "logp": logp, "ref": torch.tensor([[-2.0, -2.0]])}
    with pytest.raises(UserError, match="differ by 1 nats"):
        train.check_step_zero(values, 1e-3)


# ---- step 1 is exact: the reference is scored in the very microbatches of the first epoch's steps -----------------------


@pytest.fixture
def at_step_zero(monkeypatch) -> dict:
    """What the check of step 0 is given, with its bound."""
    given = {}
    check = train.check_step_zero

    def seen(values, bound):
        given.update(values, bound=bound)
        check(values, bound)

    monkeypatch.setattr(train, "check_step_zero", seen)
    return given


EXACT = [
    ("dpo", {}), ("dpo", dict(wpo=True, layout="padded")), ("ld_dpo", dict(gradient_checkpointing=True)),
    ("kto", {}), ("kto", dict(layout="padded", gradient_checkpointing=True)), ("0.5*alpha_dpo + 0.5*tdpo2 + sft", {}),
]  # fmt: skip


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
@pytest.mark.parametrize("objective, more", EXACT)
def test_policy_and_reference_have_the_same_bits_at_step_zero(arguments, at_step_zero, dtype, objective, more):
    """Steps of several microbatches, whose rows and widths are others than those of the data's own order."""
    how = dict(objective=objective, dtype=dtype, batch_size=12, tokens_per_microbatch=90, samples=0) | more
    run = train.prepare(train.parse_settings(arguments(**how)))
    examples = first_examples(run)
    assert len(run.microbatches(examples)) > 2
    before = train.evaluate(run)
    line = train.train_step(run, run.plan[0])
    assert at_step_zero["bound"] == 0 and torch.equal(at_step_zero["logp"], at_step_zero["ref"])
    for name, of in (("prefix_logp", "ref_prefix_logp"), ("logp_kl", "ref_kl")):
        assert of not in at_step_zero or torch.equal(at_step_zero[name], at_step_zero[of])
    assert at_step_zero.get("kl", torch.zeros(1)).abs().max() == 0
    assert ("ref_prefix_logp" in at_step_zero, "ref_kl" in at_step_zero, "kl" in at_step_zero) == (
        objective == "ld_dpo", objective == "kto", "tdpo2" in objective
    )  # fmt: skip
    assert before["eval_drift"] == 0
    assert line["reward_accuracy"] == 0.5 or "alpha_dpo" in objective  # whose reward has no reference in it
    if objective == "ld_dpo":  # −log σ(0)
        assert line["loss"] == pytest.approx(math.log(2), abs=1e-7) and line["reward_margin"] == 0
        assert before["eval_loss"] == pytest.approx(math.log(2), abs=1e-7)


def test_a_step_of_more_rows_than_are_scored_at_a_time_elsewhere(world, arguments, tmp_path, at_step_zero):
    """300 pairs in a bf16 step of an objective that needs all log-probs of the batch before any gradient: α-DPO's margins and
    their z-scores are 0, so its loss is SimPO's with the same β and γ."""
    lines = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(lines[i % 40]) + "\n" for i in range(300)))
    how = dict(
        dataset=tmp_path / "many.jsonl", eval_size=0, samples=0, batch_size=300, dtype="bf16", tokens_per_microbatch=1500
    )
    losses = []
    for i, objective in enumerate(("alpha_dpo(beta=2.0, gamma=1.0, alpha=0.5)", "simpo(beta=2.0, gamma=1.0)")):
        run = train.prepare(train.parse_settings(arguments(objective=objective, out=tmp_path / str(i), **how)))
        losses.append(train.train_step(run, run.plan[0])["loss"])
    assert torch.equal(at_step_zero["logp"], at_step_zero["ref"]) and at_step_zero["logp"].shape == (300, 2)
    assert losses[0] == losses[1]


@pytest.mark.parametrize("objective", ["dpo", "alpha_dpo", "kto"])
@pytest.mark.parametrize("more", [dict(batch_size=12, tokens_per_microbatch=90), dict(batch_size=300, max_steps=1)])
def test_the_reference_is_scored_in_the_steps_own_microbatches(world, arguments, tmp_path, monkeypatch, objective, more):
    """The token ids of every pass: for the reference those of the steps, of their extra passes and of the evaluation."""
    lines = [json.loads(line) for line in (world / "pairs.jsonl").read_text().splitlines()]
    (tmp_path / "many.jsonl").write_text("".join(json.dumps(lines[i % 40]) + "\n" for i in range(308)))
    seen, reference = [], {}
    forward, reference_logps = train.ResponseLogProbs.forward, train.reference_logps

    def noted(policy, batch, outputs=()):
        seen.append((torch.is_grad_enabled(), batch.input_ids.tolist()))
        return forward(policy, batch, outputs)

    def noted_reference(run, examples, what, *how):
        start = len(seen)
        scored = reference_logps(run, examples, what, *how)
        reference[what] = [ids for _, ids in seen[start:]]
        return scored

    monkeypatch.setattr(train.ResponseLogProbs, "forward", noted)
    monkeypatch.setattr(train, "reference_logps", noted_reference)
    how = dict(objective=objective, dataset=tmp_path / "many.jsonl", samples=0, max_steps=3) | more
    run = train.prepare(train.parse_settings(arguments(**how)))
    seen.clear()
    train.evaluate(run)
    assert [ids for _, ids in seen] == reference["held-out rows"] + reference.get("held-out KL completions", [])
    trained, of_others = [], []
    for rows in run.plan:
        seen.clear()
        train.train_step(run, rows)
        with_gradient = [ids for gradient, ids in seen if gradient]
        without = [ids for gradient, ids in seen if not gradient]
        before = with_gradient if run.objective.coupled else []  # all log-probs first
        assert len(with_gradient) > 1 and without[len(without) - len(before) :] == before
        trained += with_gradient
        of_others += without[: len(without) - len(before)]
    assert trained == reference["rows"] and of_others == reference.get("KL completions", [])
    assert bool(of_others) == (objective == "kto")


def test_only_rows_that_steps_come_to_are_scored(arguments, tmp_path, at_step_zero):
    """Two steps of 8 of 32 rows: 16 rows of the first epoch; four epochs: each row once, and later steps find theirs."""
    run = train.prepare(train.parse_settings(arguments(objective="dpo", max_steps=2)))
    asked = sorted(run.plan[0] + run.plan[1])
    assert torch.isfinite(run.ref["ref"]).all(-1).nonzero().flatten().tolist() == asked and len(asked) == 16
    scored = [tuple(dist.load_tensors(file)["ref"].shape) for file in (tmp_path / "cache").glob("*")]
    assert sorted(scored) == [(8, 2), (16, 2)]  # held-out rows and these
    run = train.prepare(train.parse_settings(arguments(objective="dpo", epochs=4, max_steps=None, out=tmp_path / "other")))
    assert len(run.plan) == 16 and torch.isfinite(run.ref["ref"]).all()
    for rows in (run.plan[0], run.plan[9]):
        found = train.batch_inputs(run, [run.train[i] for i in rows], rows)["ref"]
        assert torch.allclose(found, train.log_probs(run, [run.train[i] for i in rows])["logp"], atol=1e-5)


def test_the_cache_knows_the_microbatches(arguments, tmp_path, monkeypatch):
    """What puts rows into other microbatches, or adds them up on another machine, scores anew; what does not, does not."""
    cache = tmp_path / "cache"

    def files(**more) -> int:
        how = dict(objective="dpo", samples=0, out=tmp_path / str(time.time())) | more
        train.prepare(train.parse_settings(arguments(**how)))
        return len(list(cache.glob("*")))

    assert files() == 2 == files(objective="ipo", lr=1e-4)  # training and held-out rows
    assert files(tokens_per_microbatch=100) == 4
    assert files(batch_size=4, max_steps=None) == 5  # evaluation has no steps
    monkeypatch.setattr(torch, "get_num_threads", lambda: 77)
    assert files() == 7


# ---- where a response ends, and on which day ------------------------------------------------------------------------------


@pytest.fixture
def other_model(world, tmp_path):
    """The world's model in a folder of its own, its EOS another token than the one that its chat template writes (<end>, 3)."""

    def build(template: str | None = None, eos: int | list[int] | None = 7) -> Path:
        folder = tmp_path / "other"
        model, tokenizer = AutoModelForCausalLM.from_pretrained(world / "model"), AutoTokenizer.from_pretrained(world / "model")
        model.generation_config.eos_token_id = eos
        model.save_pretrained(folder)
        tokenizer.chat_template = template or tokenizer.chat_template
        tokenizer.save_pretrained(folder)
        return folder

    return build


def tokens_until_the_end(folder: Path) -> int:
    """How many tokens transformers' own generation makes with a model that could only say <end>."""
    model = AutoModelForCausalLM.from_pretrained(folder)
    others = [i for i in range(model.config.vocab_size) if i != 3]
    return model.generate(torch.tensor([[5, 6]]), max_new_tokens=5, do_sample=False, suppress_tokens=others).shape[1] - 2


@pytest.mark.parametrize("eos, wanted", [(7, [7, 3]), ([7, 8], [7, 8, 3]), (None, [3])])
def test_the_templates_terminator_ends_generation(arguments, other_model, tmp_path, capsys, monkeypatch, eos, wanted):
    """Said before training, in a line; samples, checkpoints and both exports follow, and transformers stops there."""
    folder = other_model(eos=eos)
    assert tokens_until_the_end(folder) == 5
    asked = []
    generate = LlamaForCausalLM.generate
    with monkeypatch.context() as patch:
        patch.setattr(LlamaForCausalLM, "generate", lambda self, **how: asked.append(how) or generate(self, **how))
        train.main(arguments(model=folder, max_steps=1, save_every=1))
    said = capsys.readouterr().err
    lines = [line for line in said.splitlines() if "the chat template ends a response with <end> (3)" in line]
    assert len(lines) == 1 and f"not among this model's eos_token_id {wanted[:-1]}" in lines[0]
    assert said.index(lines[0]) < said.index("\nbefore ")
    assert asked and all(how["eos_token_id"] == wanted for how in asked)
    checkpoint = tmp_path / "out/checkpoints/step-000001"
    dist.main(["export", str(checkpoint), str(tmp_path / "exported")])
    for place in (checkpoint, tmp_path / "out/model", tmp_path / "exported"):
        assert json.loads((place / "generation_config.json").read_text())["eos_token_id"] == wanted, place
    assert tokens_until_the_end(tmp_path / "out/model") == tokens_until_the_end(tmp_path / "exported") == 1


def test_nothing_is_said_of_an_end_that_the_model_knows(arguments, world, tmp_path, capsys):
    train.main(arguments(max_steps=1))
    said = capsys.readouterr().err
    assert "the chat template" not in said and "date" not in said
    was, is_now = (json.loads((f / "generation_config.json").read_text()) for f in (world / "model", tmp_path / "out/model"))
    assert was["eos_token_id"] == is_now["eos_token_id"] == 3


def test_a_template_without_an_ending_is_said(arguments, other_model, tmp_path, capsys):
    """Nothing is made up: the exported model ends where the given one did."""
    train.main(arguments(model=other_model("{% for m in messages %}{{ m['content'] }} {% endfor %}"), max_steps=1))
    said = capsys.readouterr().err
    assert "so no ending is taught: let it write eos_token behind assistant turns" in said
    assert json.loads((tmp_path / "out/model/generation_config.json").read_text())["eos_token_id"] == 7


YEAR = "{% if strftime_now('%Y') == '2001' %}name two {% endif %}"  # words that only a prompt of that year begins with


def test_a_run_keeps_its_date(arguments, other_model, world, tmp_path, capsys, monkeypatch):
    """A run of another year, by its clock, killed and resumed today: the same ids, the same cache, the same weights."""
    template = YEAR + AutoTokenizer.from_pretrained(world / "model").chat_template
    how = dict(model=other_model(template), objective="dpo", save_every=2)
    strftime = time.strftime  # which a day's own calls
    with monkeypatch.context() as patch:
        patch.setattr(train.time, "strftime", lambda form, *day: strftime(form, *day) if day else "2001-02-03")
        train.main(arguments(**how, out=tmp_path / "a"))
    assert "date: the chat template is told 2001-02-03" in capsys.readouterr().err
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    shutil.rmtree(tmp_path / "b/checkpoints/step-000004")
    (tmp_path / "b/summary.json").unlink()
    assert json.loads((tmp_path / "b/run.json").read_text())["plainpo"]["date"] == "2001-02-03"
    assert json.loads((tmp_path / "b/settings.json").read_text())["date"] == "2001-02-03"
    said = refused(arguments(**how, out=tmp_path / "b", date="2001-02-04") + ["--resume"], capsys)
    assert "date is '2001-02-04' here and '2001-02-03' there" in said
    train.main(arguments(**how, out=tmp_path / "b") + ["--resume"])
    said = capsys.readouterr().err
    assert "resumed after step 2" in said and "2001-02-03" in said and "reference log-probs of 32 rows from" in said
    assert [x["loss"] for x in steps(tmp_path / "b")] == [x["loss"] for x in steps(tmp_path / "a")]
    one, two = ((tmp_path / x / "model/model.safetensors").read_bytes() for x in "ab")
    assert one == two
    run = train.prepare(train.parse_settings(arguments(**how, out=tmp_path / "c")))  # a new one has today's
    known = train.prepare(train.parse_settings(arguments(**how, out=tmp_path / "d", date="2001-12-31")))
    assert run.s.date == time.strftime("%Y-%m-%d")
    lengths = [[len(r.train[i].prompt) for i in range(3)] for r in (run, known)]
    assert [b - a for a, b in zip(*lengths)] == [2, 2, 2]


def test_a_date_that_no_id_depends_on_is_no_part_of_a_run(arguments, tmp_path, capsys):
    train.main(arguments(save_every=2, date="2001-02-03"))
    (tmp_path / "out/summary.json").unlink()
    assert "date" not in json.loads((tmp_path / "out/run.json").read_text())["plainpo"]
    assert train.main(arguments(save_every=2, date="2001-02-04") + ["--resume"])["steps"] == 4
    assert "2001" not in capsys.readouterr().err


# ---- a run that nobody watches -----------------------------------------------------------------------------------------


def copied_model(world: Path, folder: Path, change: float) -> Path:
    """The world's model in a folder that is called model too, one weight of it changed."""
    model = AutoModelForCausalLM.from_pretrained(world / "model")
    with torch.no_grad():
        model.model.norm.weight[0] += change
    model.save_pretrained(folder / "model")
    AutoTokenizer.from_pretrained(world / "model").save_pretrained(folder / "model")
    return folder / "model"


def unfinished(out: Path) -> Path:
    """Make a finished run one that was killed at its end."""
    (out / "summary.json").unlink()
    return out


def test_another_initial_model_is_another_run(arguments, world, tmp_path, capsys):
    """Though every export is called model. Weights that are the same, moved elsewhere, go on."""
    train.main(arguments(save_every=2))
    unfinished(tmp_path / "out")
    other = copied_model(world, tmp_path / "other", 1e-6)
    assert "initial weights (hash) is" in refused(arguments(model=other) + ["--resume"], capsys)
    same = copied_model(world, tmp_path / "same", 0.0)
    assert train.main(arguments(model=same) + ["--resume"])["steps"] == 4


@pytest.mark.parametrize(
    "edited, said", [("held", "held-out rows (hash)"), ("rows", "training rows (hash)"), ("mine", "mine.py (bytes, CRC-32)")]
)
def test_an_edited_file_is_another_run(arguments, world, tmp_path, capsys, edited, said):
    """A held-out label, a training label, one number in the user's own objective: all else is as it was."""
    rows = (world / "rows.jsonl").read_text()
    for name in ("held", "rows"):
        (tmp_path / f"{name}.jsonl").write_text(rows)
    (tmp_path / "mine.py").write_text(
        "from losses import average_logp, objective\n\n@objective(reward=average_logp)\n"
        "def mine(logp, desirable):\n    return -1.0 * logp\n"
    )
    more = dict(
        dataset=tmp_path / "rows.jsonl", eval_dataset=tmp_path / "held.jsonl", objective=f"{tmp_path}/mine.py:mine", max_steps=1
    )
    train.main(arguments(**more))
    unfinished(tmp_path / "out")
    for file in tmp_path.glob(f"{edited}.*"):
        text = file.read_text()
        changed = text.replace("true", "false", 1).replace("-1.0", "-2.0")
        assert changed != text
        file.write_text(changed)
    assert said in refused(arguments(**more) + ["--resume"], capsys)


def test_the_objective_is_recorded_with_its_defaults(arguments, tmp_path, capsys):
    train.main(arguments(objective="dpo", max_steps=1))
    whole = "dpo(beta=0.1, label_smoothing=0.0)"
    files = ("settings.json", "run.json", "summary.json")
    assert all(f'"objective": "{whole}"' in (tmp_path / "out" / name).read_text() for name in files)
    assert whole in (tmp_path / "out" / "model" / "README.md").read_text() and f"\n{whole}: " in capsys.readouterr().err


def test_a_survey_takes_one_row_at_a_time():
    """200 rows of 20,000 ids: all of them as text would be more than 20 MB."""
    row = data.Example(list(range(10_000)), [list(range(5_000))] * 2)

    tracemalloc.start()
    train.survey((row for _ in range(200)), {})
    assert tracemalloc.get_traced_memory()[1] < 2_000_000
    tracemalloc.stop()


def test_a_model_that_cannot_be_written_leaves_a_checkpoint(arguments, tmp_path, monkeypatch, capsys):
    """With save_every 0: nothing is trained again, and the model is the one of a run without that."""
    train.main(arguments(out=tmp_path / "a"))
    with monkeypatch.context() as patch:
        patch.setattr(dist, "_describe", lambda folder, *_: no_room() if "model" in folder.name else None)
        said = refused(arguments(), capsys)
    assert "No space left" in said and f"from which --resume --out {tmp_path / 'out'} goes on" in said
    monkeypatch.setattr(train, "train_step", lambda *_: pytest.fail("a step was done again"))
    train.main(arguments() + ["--resume"])
    a, b = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("a", "out"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    for name in ("samples.jsonl", "metrics.jsonl"):
        lines = [[json.loads(line) for line in (tmp_path / side / name).read_text().splitlines()] for side in ("a", "out")]
        assert [line["step"] for line in lines[0]] == [line["step"] for line in lines[1]]


def test_a_disk_with_no_room_for_a_checkpoint_either(arguments, tmp_path, monkeypatch, capsys):
    """The model is in the cache folder, as it would be in out/model."""
    train.main(arguments(out=tmp_path / "a"))
    describe = dist._describe
    monkeypatch.setattr(
        dist, "_describe", lambda folder, *more: no_room() if tmp_path / "out" in folder.parents else describe(folder, *more)
    )
    said = refused(arguments(), capsys)
    (folder,) = (tmp_path / "cache").glob("model-*")
    assert f"all steps are done; the model is in {folder}\n" in said and "error: " in said and "--resume" not in said
    a, b = (load_file(place / "model.safetensors") for place in (tmp_path / "a" / "model", folder))
    assert all(torch.equal(a[name], b[name]) for name in a)


def no_room(*_) -> None:
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("name", ["export", "answers", "evaluate"])
def test_a_signal_after_the_last_step_changes_nothing(arguments, tmp_path, monkeypatch, name):
    """The model is written first and the run comes to its end, code 0."""
    place = dist if name == "export" else train
    function = getattr(place, name)
    calls = []

    def signalled(*args):
        calls.append(name)
        if len(calls) == (1 if name == "export" else 2):
            os.kill(os.getpid(), signal.SIGTERM)
        assert name == "export" or len(calls) == 1 or (tmp_path / "out" / "model" / "model.safetensors").exists()
        return function(*args)

    monkeypatch.setattr(place, name, signalled)
    summary = train.main(arguments())
    assert calls == [name] * (1 if name == "export" else 2) and "eval_loss" in summary["after"]
    assert json.loads((tmp_path / "out" / "summary.json").read_text()) == summary


def test_a_signal_while_the_reference_is_scored(arguments, tmp_path, monkeypatch, capsys):
    """Code 143 at once, and the folder is in nobody's way: with and without --resume."""
    with monkeypatch.context() as patch, pytest.raises(SystemExit) as stop:
        patch.setattr(train, "log_probs", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        train.main(arguments(objective="dpo"))
    assert stop.value.code == 143 and "--resume starts there again" in capsys.readouterr().err
    shutil.copytree(tmp_path / "out", tmp_path / "other")
    train.main(arguments(objective="dpo", max_steps=1))
    train.main(arguments(objective="dpo", out=tmp_path / "other") + ["--resume"])


def test_a_step_that_is_not_finite_leaves_the_one_before(arguments, tmp_path, monkeypatch, capsys):
    """The gradient of step 3 is NaN. The export that is advised holds the weights after step 2."""
    clip = dist.clip_gradients
    norms = []

    def spoilt(*args):
        norms.append(clip(*args))
        return norms[-1] if len(norms) < 3 else torch.tensor(math.nan)

    train.main(arguments(out=tmp_path / "a", save_every=2))
    with monkeypatch.context() as patch:
        patch.setattr(dist, "clip_gradients", spoilt)
        said = refused(arguments(), capsys)
    command = re.search(r"`python distributed.py (export \S+/step-000002) NEW --dtype fp32`", said)[1]
    dist.main([*command.split(), str(tmp_path / "new"), "--dtype", "fp32"])
    expected = data_of(tmp_path / "a" / "checkpoints", "step-000002")
    found = dict(AutoModelForCausalLM.from_pretrained(tmp_path / "new").named_parameters())
    assert expected and all(torch.equal(found[name], expected[name]) for name in found)


@pytest.mark.parametrize("log", ["2>&1 | head -n 1", "> /dev/full 2>&1"])
def test_a_log_that_cannot_be_written_ends_nothing(world, tmp_path, log):
    command = f"{sys.executable} {processes.REPOSITORY}/train.py --model {world}/model --dataset {world}/pairs.jsonl --out out"
    more = "--eval-size 8 --batch-size 8 --max-steps 2 --samples 1 --sample-tokens 4 --dtype fp32 --cache cache"
    processes.run(f"({command} {more}; echo $? > code) {log}", tmp_path)
    assert (tmp_path / "code").read_text() == "0\n" and (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_records_that_cannot_be_written_end_nothing(arguments, tmp_path, monkeypatch, capsys):
    """A disk that is full during steps 2 and 3, a service that does not answer: two warnings, and the records are whole."""

    def opened(file, mode="r", **how):
        return (
            no_room()
            if mode == "a" and '"step": 2' in (tmp_path / "out" / "metrics.jsonl").read_text()
            else open(file, mode, **how)
        )

    monkeypatch.setattr(train, "open", opened, raising=False)
    monkeypatch.setattr(train, "open_log", lambda *_: lambda line: line["step"] != 1 or no_room())
    train.main(arguments())
    said = capsys.readouterr().err
    assert said.count("warning: ") == 2 and said.count("No space left") == 2
    assert [line["step"] for line in metrics(tmp_path / "out")] == [0, 1, 2, 3, 4, 4]


@pytest.mark.parametrize("name, title", [("cost$5$_$x^$.jsonl", None), ("pairs.jsonl", "broken")])
def test_a_picture_ends_no_run(arguments, world, tmp_path, monkeypatch, capsys, name, title):
    """A name that is no mathematics, and no matplotlib."""
    monkeypatch.undo()  # the curves, too
    shutil.copy(world / "pairs.jsonl", tmp_path / name)
    if title:
        monkeypatch.setitem(sys.modules, "matplotlib.figure", None)  # cannot be imported then
    train.main(arguments(dataset=tmp_path / name, max_steps=1))
    assert (tmp_path / "out" / "summary.json").exists()
    assert (tmp_path / "out" / "curves.png").exists() == (title is None)
    assert ("warning: curves.png failed" in capsys.readouterr().err) == (title is not None)


def test_a_clock_that_stands_still(arguments, monkeypatch):
    monkeypatch.setattr(time, "perf_counter", lambda: 1.0)
    assert train.main(arguments(max_steps=1))["seconds"] == 0


def test_names_of_the_home_folder_and_names_that_are_no_text(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "s.yaml").write_text("model: ~/m\nout: ~/o\ndataset: [~/a.jsonl, ~/b.jsonl]\neval_dataset: ~/c.jsonl\n")
    s = train.parse_settings([str(tmp_path / "s.yaml")])
    assert (s.model, s.out, s.eval_dataset) == (f"{tmp_path}/m", f"{tmp_path}/o", f"{tmp_path}/c.jsonl")
    (tmp_path / "b.jsonl").write_text("{}\n")
    assert data._files(data._sources(s.dataset)[1][0]) == [tmp_path / "b.jsonl"]
    assert train.parse_settings([str(tmp_path / "s.yaml"), "--out=~/x"]).out == f"{tmp_path}/x" and s.cache == Settings().cache
    for setting in ("out", "dataset", "model"):
        with pytest.raises(UserError, match=rf"{setting} is 'a.udcff', which is no text"):
            train.parse_settings(["--model=m", "--dataset=d", f"--{setting}=a\udcff"])


@pytest.mark.parametrize("left", [(), (".lock",), (".lock", "run.part"), (".lock", "run.json")])
@pytest.mark.parametrize("resume", [[], ["--resume"]])
def test_a_folder_of_a_run_that_was_killed_at_its_start_is_in_nobodys_way(arguments, tmp_path, left, resume):
    (tmp_path / "out").mkdir()
    for name in left:
        (tmp_path / "out" / name).write_text("")
    if left or not resume:
        assert train.main(arguments(max_steps=1) + resume)["steps"] == 1


def test_what_a_run_is_is_written_first(arguments, tmp_path, monkeypatch):
    seen = []
    score = train.score_initial_model
    monkeypatch.setattr(
        train, "score_initial_model", lambda run: seen.extend(p.name for p in Path(run.s.out).iterdir()) or score(run)
    )
    train.main(arguments(max_steps=1))
    assert sorted(seen) == [".lock", "run.json"]


@pytest.mark.parametrize("lost", ["missing", "", "{", '{"plainpo": 3}'])
def test_a_lost_run_json_is_made_again_from_a_checkpoint(arguments, tmp_path, capsys, lost):
    train.main(arguments(save_every=2))
    out = unfinished(tmp_path / "out")
    before = (out / "run.json").read_text()
    (out / "run.json").unlink() if lost == "missing" else (out / "run.json").write_text(lost)
    assert "lr is 0.5 here and 0.001 there" in refused(arguments(lr=0.5) + ["--resume"], capsys)
    train.main(arguments(save_every=2) + ["--resume"])
    assert "resumed after step 4" in capsys.readouterr().err and (out / "run.json").read_text() == before
