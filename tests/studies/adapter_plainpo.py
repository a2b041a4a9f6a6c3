"""This trainer, for conformance.py: equal everywhere."""

import json
from pathlib import Path

import data
import train as trainer
from losses import OBJECTIVES, parse_objective

VERSION = "of this clone"
LOGPS = {"logp_w", "logp_l", "old_w", "old_l", "ref_w", "ref_l", "len_w", "len_l"}
SINGLE = {"logp", "ref", "desirable", "logp_kl", "ref_kl"}
KNOWN = {name: loss for name, loss in OBJECTIVES.items() if set(loss.tensors) <= LOGPS | SINGLE and not loss.random}
ALL = [str(parse_objective(name)) for name in {"dpo": None, **KNOWN}]  # the checks of the trainer are made with the first
TRAINERS = {"packed": ALL, "padded": ["simpo(beta=2.0, gamma=1.0)", "kto(beta=0.1)"]}


def train(case) -> list[dict]:
    trainer.draw_curves = lambda *_: None  # takes longer than these runs
    out = Path(case.out)
    rows = [""] * len(case.rows)
    plan = data.step_plan(len(rows), case.batch_size, seed=0, epoch=0)
    order = [i for step in plan for i in step]
    for row, i in zip(case.rows, order):
        rows[i] = json.dumps(row)  # where the plan takes it in its turn
    file = out.with_suffix(".jsonl")
    file.write_text("\n".join(rows))
    s = trainer.Settings(
        model=case.model, dataset=str(file), objective=case.objective, out=str(out), layout=case.trainer, lr=case.lr,
        batch_size=case.batch_size, tokens_per_microbatch=10**6 if case.accumulation == 1 else 800 // case.accumulation,
        max_length=case.max_length, max_prompt_length=case.max_length - 1, warmup_ratio=0.0, max_grad_norm=0.0,
        dtype="bf16" if case.bf16 else "fp32", device="cpu", eval_size=0, samples=0, save_every=case.save_every,
        resume=case.resume, cache=f"{out}-cache",
    )  # fmt: skip
    trainer.train(s)
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]
