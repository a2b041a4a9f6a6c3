"""LoRR: which batches are used how often, what a reset does, what the SFT term adds."""

import json

import lorr
import pytest
import torch

import train


def arguments(small, out, *more) -> list[str]:
    line = ["--model", small / "model", "--dataset", small / "pairs.jsonl", "--out", out, "--dtype", "fp32", "--eval-size", 8]
    line += ["--batch-size", 8, "--samples", 1, "--sample-tokens", 4, "--lr", 1e-3, "--cache", out / "cache", *more]
    return [str(part) for part in line]


def lines_of(out) -> list[dict]:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "loss" in line]


def test_each_batch_is_used_in_a_row_with_a_growing_sft_weight(small, tmp_path):
    """λ of replay l of 3 is 0.6 (l + 1) / 3; steps, schedule and max_steps count replays."""
    more = ("--objective", "simpo", "--replays", 3, "--reset-alpha", 0.5, "--sft-weight", 0.6, "--max-steps", 7)
    summary = lorr.main(arguments(small, tmp_path / "out", *more))
    lines = lines_of(tmp_path / "out")
    assert summary["steps"] == len(lines) == 7
    assert [line["replay"] for line in lines] == [1, 2, 3, 1, 2, 3, 1]
    assert [line["sft_weight"] for line in lines] == pytest.approx([0.2, 0.4, 0.6, 0.2, 0.4, 0.6, 0.2])
    assert lines[0]["tokens"] == lines[1]["tokens"] == lines[2]["tokens"] != lines[3]["tokens"]
    assert (tmp_path / "out" / "model" / "model.safetensors").exists()


def test_one_replay_without_reset_and_sft_is_the_trainer(small, tmp_path):
    """Bit for bit: the defaults change nothing."""
    train.main(arguments(small, tmp_path / "a", "--max-steps", 3))
    lorr.main(arguments(small, tmp_path / "b", "--max-steps", 3))
    plain, replayed = lines_of(tmp_path / "a"), lines_of(tmp_path / "b")
    for name in ("loss", "grad_norm", "lr", "reward_margin", "logp_w_per_token"):
        assert [line[name] for line in plain] == [line[name] for line in replayed]


def test_the_sft_term_is_the_average_log_prob_of_the_chosen_response():
    """−logσ(2·0.8 − 1) + 0.5 · 1.2, the worked pair of losses.py."""
    total = lorr.with_sft(train.read_objective("simpo"), 0.5)
    tensors = {name: torch.tensor([x]) for name, x in dict(logp_w=-12.0, logp_l=-24.0, len_w=10, len_l=12).items()}
    assert total(tensors, [0]).item() == pytest.approx(0.43748795 + 0.6)


def test_a_reset_goes_part_of_the_way_back():
    weight = torch.nn.Parameter(torch.tensor([3.0, 5.0]))
    lorr.reset([(weight, torch.tensor([1.0, 1.0]))], 0.25)  # ¼·3 + ¾·1, ¼·5 + ¾·1
    assert weight.tolist() == [1.5, 2.0]


BAD = {
    "no replay": (("--replays", 0), "replays is at least 1"),
    "reset above 1": (("--reset-alpha", 1.5), "reset_alpha from 0 to 1"),
    "reset of nothing": (("--reset-alpha", 0.5, "--reset-modules", "down_proj,c_proj"), "'c_proj' is part of no"),
    "reset of no name": (("--reset-alpha", 0.5, "--reset-modules", ","), "reset_modules: ''"),
    "negative weight": (("--sft-weight", -0.1), "sft_weight not negative"),
    "single completions": (("--sft-weight", 0.5, "--objective", "kto"), "kto takes single completions"),
}


@pytest.mark.parametrize("name", BAD)
def test_what_cannot_be_meant_is_refused(small, tmp_path, capsys, name):
    more, said = BAD[name]
    with pytest.raises(SystemExit) as stop:
        lorr.main(arguments(small, tmp_path / "out", *more))
    assert stop.value.code == 2 and said in capsys.readouterr().err
