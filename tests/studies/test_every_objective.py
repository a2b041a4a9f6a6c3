"""The table of every objective: its rows, its numbers, and its exit code."""

import json

import every_objective
import pytest

import train


def arguments(small, tmp_path, *only: str) -> list[str]:
    files = ["--model", str(small / "model"), "--pairs", str(small / "pairs.jsonl"), "--rows", str(small / "rows.jsonl")]
    sizes = ["--steps", "2", "--lr", "1e-3", "--batch-size", "8", "--eval-size", "8", "--cache", str(tmp_path / "cache")]
    return [*files, *sizes, "--out", str(tmp_path / "out"), "--only", *only]


def test_the_table_holds_what_the_runs_recorded(small, tmp_path, capsys):
    """One paired objective on the pairs, one unpaired one on the rows; settings of train.py are passed on."""
    assert every_objective.main(arguments(small, tmp_path, "dpo", "kto")) == 0
    table = (tmp_path / "out" / "table.md").read_text().splitlines()
    assert "\n".join(table) in capsys.readouterr().out and len(table) == 4
    assert len({line.replace("`", "").count("|") for line in table}) == 1  # as many columns in every line
    for line, name, dataset in zip(table[2:], ("dpo", "kto"), ("pairs.jsonl", "rows.jsonl")):
        folder = tmp_path / "out" / name
        settings, summary = (json.loads((folder / f"{file}.json").read_text()) for file in ("settings", "summary"))
        assert settings["dataset"].endswith(dataset) and settings["lr"] == 1e-3 and summary["steps"] == 2
        losses = [x["loss"] for x in map(json.loads, (folder / "metrics.jsonl").read_text().splitlines()) if "loss" in x]
        accuracy = [summary[side]["eval_reward_accuracy"] for side in ("before", "after")]
        assert line.startswith(f"| `{name}` | {losses[0]:.4f} | {losses[1]:.4f} | {accuracy[0]:.3f} | {accuracy[1]:.3f} | ")


@pytest.mark.parametrize("value, code", [(0.5, 0), (float("inf"), 1), (float("nan"), 1)])
def test_exit_code_1_where_a_number_is_not_finite(tmp_path, monkeypatch, value, code):
    """A run that recorded two steps, the second with a gradient norm of `value`, and no rewards, as sft has none."""

    def recorded(argv):
        (tmp_path / "sft").mkdir()
        lines = [{"step": 1, "loss": 2.0, "grad_norm": 1.0}, {"step": 2, "loss": 1.25, "grad_norm": value}]
        (tmp_path / "sft" / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
        return {"before": {"eval_loss": 2.0}, "after": {"eval_loss": 1.25}}

    monkeypatch.setattr(train, "main", recorded)
    assert every_objective.main(["--out", str(tmp_path), "--only", "sft"]) == code
    expected = "| `sft` | 2.0000 | 1.2500 | – | – | – | – |" + " NOT FINITE" * code
    assert (tmp_path / "table.md").read_text().splitlines()[2] == expected


def test_a_run_that_ends_with_a_message_ends_the_table(small, tmp_path):
    """The trainer's own message, with the name of the objective, as the reason for exit code 1."""
    with pytest.raises(SystemExit, match="dpo: error: batch_size is 0"):
        every_objective.main([*arguments(small, tmp_path, "dpo"), "--batch-size", "0"])
