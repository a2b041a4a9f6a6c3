"""TR-DPO: the reference is the policy of some steps ago, or moves by its share."""

import json
import math

import pytest
import torch
import tr_dpo


def arguments(small, out, *more) -> list[str]:
    line = ["--model", small / "model", "--dataset", small / "pairs.jsonl", "--out", out, "--dtype", "fp32", "--eval-size", 8]
    line += ["--batch-size", 8, "--samples", 1, "--sample-tokens", 4, "--lr", 1e-3, "--cache", out / "cache", *more]
    return [str(part) for part in line]


@pytest.mark.parametrize("objective", ["dpo", "ld_dpo"])
def test_a_moving_reference_is_the_policy_of_some_steps_ago(small, tmp_path, objective):
    """Hard updates after every second step: at steps 3 and 5 policy = reference, so the loss is log 2 again."""
    more = (
        "--objective",
        objective,
        "--sync-every",
        2,
        "--sync-alpha",
        1.0,
        "--max-steps",
        5,
        "--epochs",
        2,
        "--eval-every",
        1,
    )
    tr_dpo.main(arguments(small, tmp_path / "out", *more))
    lines = [json.loads(line) for line in (tmp_path / "out" / "metrics.jsonl").read_text().splitlines()]
    losses = [line["loss"] for line in lines if "loss" in line]
    assert [abs(x - math.log(2)) < 1e-5 for x in losses] == [True, False, True, False, True]
    held_out = [line["eval_loss"] for line in lines if "eval_loss" in line]
    assert [abs(x - math.log(2)) < 1e-5 for x in held_out] == [True, False, True, False, True, False]


def test_a_reference_moves_by_its_share():
    torch.manual_seed(0)
    reference, policy = torch.nn.Linear(3, 2), torch.nn.Linear(3, 2)
    there, here = ([p.detach().clone() for p in m.parameters()] for m in (reference, policy))
    tr_dpo.move(reference, policy, 0.25)
    for p, a, b in zip(reference.parameters(), there, here):
        torch.testing.assert_close(p.detach(), 0.25 * b + 0.75 * a)


BAD = {
    "no reference": (("--objective", "simpo"), "no reference's log-probs"),
    "a KL of other prompts": (("--objective", "kto"), "estimates a KL"),
    "never": (("--objective", "dpo", "--sync-every", 0), "sync_every is at least 1"),
    "too far": (("--objective", "dpo", "--sync-alpha", 2), "sync_alpha from 0 to 1"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_refused(small, tmp_path, capsys, name):
    more, said = BAD[name]
    with pytest.raises(SystemExit) as stop:
        tr_dpo.main(arguments(small, tmp_path / "out", *more))
    assert stop.value.code == 2 and said in capsys.readouterr().err
