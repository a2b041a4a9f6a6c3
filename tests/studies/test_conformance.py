"""The yardstick itself: a plain padded trainer is equal everywhere, and each way to break it is found by the check for it."""

import functools
import json
import os
from pathlib import Path
from types import SimpleNamespace

import conformance
import pytest
import torch
from conformance import Checks, ids_of, run_check
from torch import distributed
from transformers import AutoModelForCausalLM, AutoTokenizer

from losses import parse_objective

SIMPO = "simpo(beta=2.0, gamma=1.0)"


def padded(tokenizer, sequences: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    batch = tokenizer.pad({"input_ids": sequences}, return_tensors="pt")
    return batch["input_ids"], batch["attention_mask"]


def log_probs(model, tokenizer, examples, broken: str) -> torch.Tensor:
    """(rows, responses), from one padded batch."""
    whole = [prompt + r for prompt, responses in examples for r in responses]
    ids, mask = padded(tokenizer, whole)
    logits = model(ids, attention_mask=None if broken == "no attention mask" else mask).logits.float()
    scored = logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
    sums = []
    for row, (sequence, r) in enumerate(zip(whole, (r for _, responses in examples for r in responses))):
        end = ids.shape[1] if tokenizer.padding_side == "left" else len(sequence)
        sums.append(scored[row, end - len(r) - 1 : end - 1].sum())
    return torch.stack(sums).view(len(examples), -1)


def tokens_of(tokenizer, row: dict, case, broken: str):
    prompt, responses = ids_of(tokenizer, row)
    if broken == "no terminator":
        responses = [r[:-1] for r in responses]
    room = case.max_length - len(prompt)
    return prompt, [r[:room] for r in responses]


def train(case, broken: str = "") -> list[dict]:
    """A trainer that pads, accumulates, averages over processes, saves and resumes; or one that is broken in this way."""
    rank, world = (int(os.environ.get(name, default)) for name, default in (("RANK", 0), ("WORLD_SIZE", 1)))
    tokenizer, model = AutoTokenizer.from_pretrained(case.model), AutoModelForCausalLM.from_pretrained(case.model)
    objective = parse_objective(case.objective.replace("gamma=1.5", "gamma=1.0") if broken == "gamma" else case.objective)
    optimizer = torch.optim.AdamW(model.parameters(), lr=case.lr, weight_decay=0.1 if broken == "weight decay" else 0.0)
    saved = Path(case.out, "state.pt")
    saved.parent.mkdir(exist_ok=True)
    start, logs = 0, []
    if case.resume and broken != "begins anew":
        state = torch.load(saved)
        start = state["step"]
        model.load_state_dict(state["model"])
        if broken != "optimizer state":
            optimizer.load_state_dict(state["optimizer"])
    for step, batch in enumerate(case.batches()):
        if step < start or (broken == "ends early" and step == 3) or (broken == "last batch" and len(batch) < case.batch_size):
            continue
        mine = batch[rank::world]
        size = -(-case.batch_size // case.accumulation // world)
        parts = [mine[i : i + size] for i in range(0, len(mine), size)]
        optimizer.zero_grad()
        losses, rewards = [], []
        for part in parts:
            examples = [tokens_of(tokenizer, row, case, broken) for row in part]
            with torch.autocast("cpu", torch.bfloat16, enabled=case.bf16):
                logp = log_probs(model, tokenizer, examples, broken)
            lengths = torch.tensor([[len(r) for r in responses] for _, responses in examples])
            loss = objective.row_losses({"logp": logp}, {"len": lengths}, [0])
            shares = {"sums": 1 / len(part), "mean of means": 1 / len(part) / len(parts)}
            loss_scale = 1.5 if broken == "bf16" and case.bf16 else 1.0
            (loss_scale * loss.sum() * shares.get(broken, 1 / len(batch))).backward()
            losses += loss.tolist()
            rewards.append(objective.reward(logp.detach(), torch.zeros(()), lengths))
        if world > 1 and broken != "no reduction":
            for p in model.parameters():
                distributed.all_reduce(p.grad)
        if broken == "one gradient":
            model.model.norm.weight.grad *= 0.5
        optimizer.step()
        reward = torch.cat(rewards) / (2.0 if broken == "rewards without beta" else 1.0)
        logs.append({"loss": sum(losses) / len(losses), "reward_margin": (reward[:, 0] - reward[:, 1]).mean().item()})
        if broken == "logged loss":
            logs[-1]["loss"] *= case.accumulation
        if case.save_every and (step + 1) % case.save_every == 0 and rank == 0:
            torch.save({"step": step + 1, "model": model.state_dict(), "optimizer": optimizer.state_dict()}, saved)
    return logs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("conformance")
    conformance.build(folder)
    return folder


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(conformance, "STEPS", 4)


def found(folder: Path, check, broken: str = "", objective: str = SIMPO) -> dict[str, conformance.Finding]:
    adapter = SimpleNamespace(train=functools.partial(train, broken=broken))
    findings = run_check(Checks(adapter, "plain", folder), check, objective)
    return {finding.check: finding for finding in findings}


@pytest.mark.parametrize("check", conformance.EACH + conformance.ONCE, ids=lambda check: check.__name__)
def test_a_plain_trainer_is_equal_everywhere(folder, check):
    findings = found(folder, check)
    assert findings and not [finding.verdict for finding in findings.values() if finding.wrong]


@pytest.mark.parametrize(
    "check, broken, wrong",
    [
        (Checks.steps, "one gradient", ["gradient, step 1", "its worst tensor"]),
        (Checks.steps, "no terminator", ["loss, step 1", "gradient, step 1", "its worst tensor", "weights, step 4"]),
        (Checks.steps, "weight decay", ["weights, step 4"]),
        (Checks.accumulated, "sums", ["gradient, step 2, 2 microbatches", "gradient, step 2, 4 microbatches"]),
        (Checks.settings, "gamma", ["settings"]),
        (Checks.tokens, "no terminator", ["tokens scored"]),
        (Checks.padding, "no attention mask", ["padding on the left"]),
        (Checks.last_batch, "last batch", ["last batch, a row short", "last batch, a row short, 2 microbatches"]),
        (Checks.last_batch, "mean of means", ["last batch, a row short, 2 microbatches"]),
        (Checks.processes, "no reduction", ["two processes", "two processes, last batch, a row short"]),
        (Checks.logged, "logged loss", ["logged, before a step", "logged, all steps"]),
        (Checks.logged, "rewards without beta", ["logged, before a step", "logged, all steps"]),
        (Checks.killed, "optimizer state", ["killed and resumed"]),
        (Checks.killed, "begins anew", ["killed and resumed"]),
        (Checks.steps, "ends early", ["weights, step 4"]),
        (Checks.bf16, "bf16", ["gradient in bf16"]),
    ],
    ids=lambda x: x if isinstance(x, str) else None,
)
def test_what_is_broken_is_found(folder, check, broken, wrong):
    findings = found(folder, check, broken)
    assert [name for name, finding in findings.items() if finding.wrong] == wrong
    assert all("**differs by" in findings[name].verdict for name in wrong)


def test_a_finding_says_what_explains_it(folder):
    assert found(folder, Checks.tokens, "no terminator")["tokens scored"].said == "no terminator"
    assert found(folder, Checks.truncation)["a row too long"].verdict == "responses lose their end"
    assert found(folder, Checks.settings, "gamma")["settings"].said == "gamma is not read"
    assert found(folder, Checks.logged, "logged loss")["logged, all steps"].said == "loss"


def test_of_ways_with_the_same_gradient_the_first_is_named():
    """A header that both responses share cancels out of DPO's first gradient; rounding does not choose the name."""
    gradient = {"w": torch.ones(3)}
    ways = {"other": {"w": torch.zeros(3)}, "right": {"w": torch.ones(3) * (1 + 1e-6)}, "header too": {"w": torch.ones(3)}}
    assert conformance.way_of(gradient, ways) == "right"
    assert conformance.way_of({"w": 2 * torch.ones(3)}, ways) == "none of 3 known ways"


def test_a_trainer_that_cannot_says_why(folder):
    def train(case):
        raise RuntimeError("no such loss")

    (finding,) = run_check(Checks(SimpleNamespace(train=train), "plain", folder), Checks.tokens, SIMPO)
    assert finding.wrong and finding.verdict == "cannot: no such loss"


@pytest.fixture
def few(monkeypatch):
    """Some of the checks."""
    monkeypatch.setattr(conformance, "EACH", (Checks.steps,))
    monkeypatch.setattr(conformance, "ONCE", (Checks.tokens, Checks.truncation, Checks.last_batch))


def test_a_difference_in_tokens_is_found_once(tmp_path, capsys, few):
    """And a file of one's own is an adapter; exit code 1 says that something is not equal."""
    file = tmp_path / "mine.py"
    lines = [
        "import functools, test_conformance", 'VERSION = "1"', f'TRAINERS = {{"plain": ["{SIMPO}"]}}',
        'train = functools.partial(test_conformance.train, broken="no terminator")',
    ]  # fmt: skip
    file.write_text("\n".join(lines))
    assert conformance.main(["--trainer", str(file)]) == 1
    said = capsys.readouterr().out
    assert said.count("**differs by") == 1 and "(no terminator)" in said
    assert "are not equal" in said


def test_this_trainer_is_equal(capsys, few):
    assert conformance.main(["--only", "padded: simpo"]) == 0
    assert "**" not in capsys.readouterr().out


@pytest.mark.slow
def test_this_trainer_is_equal_everywhere():
    assert conformance.main([]) == 0


@pytest.mark.parametrize(
    "words, said",
    [
        (
            ["--trainer", "trll"],
            "trainer is 'trll'; known are axolotl, llamafactory, plainpo, simpo, swift, trl, or a file of your own",
        ),
        (["--trainer", "needs.py"], "needs.py: No module named 'nowhere'; install it, or name another --trainer"),
        (["--only", "simpoo"], "only is 'simpoo'; there are packed, padded, with the objectives of each"),
    ],
)
def test_user_errors(tmp_path, monkeypatch, capsys, words, said):
    monkeypatch.chdir(tmp_path)
    Path("needs.py").write_text("import nowhere")
    with pytest.raises(SystemExit) as stopped:
        conformance.main(words)
    assert stopped.value.code == 2
    assert said in capsys.readouterr().err


def test_rows_of_unpaired_objectives(folder):
    """Chosen and rejected by turns, each with its label."""
    case = Checks(SimpleNamespace(), "plain", folder).case("kto", 4)
    rows = json.loads((folder / "rows.json").read_text())
    assert [row["completion"] for row in case.rows] == [
        rows[0]["chosen"],
        rows[1]["rejected"],
        rows[2]["chosen"],
        rows[3]["rejected"],
    ]
    assert [row["label"] for row in case.rows] == [True, False, True, False]
