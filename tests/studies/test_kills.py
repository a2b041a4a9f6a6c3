"""The kill loop: where a run was struck, by hand; what is compared; and one run that is killed and goes on."""

import json
import random

import kills
import processes
import pytest

import train


def lay(out, step=None, folders=(), **files):
    """What a run of some steps left."""
    out.mkdir()
    if step is not None:
        (out / "metrics.jsonl").write_text("".join(json.dumps({"step": i}) + "\n" for i in range(step + 1)) + '{"step": 9')
    for name in folders:
        (out / "checkpoints" / name).mkdir(parents=True)
    for name in files:
        (out / f"{name}.json").write_text("{}")


@pytest.mark.parametrize(
    "left, place",
    [
        ({}, "before the first step"),
        ({"step": 0}, "before the first step"),
        ({"step": 3}, "between checkpoints"),
        ({"step": 4, "folders": ["step-000004.part"]}, "while a checkpoint is written"),
        ({"step": 4, "folders": ["step-000004"]}, "while a checkpoint is written"),
        ({"step": 12}, "at the export"),
        ({"step": 12, "summary": True}, "after the end"),
    ],
)
def test_where_a_run_was_struck(tmp_path, left, place):
    lay(tmp_path / "out", **left)
    assert kills.place_of(tmp_path / "out") == place


def test_damage_is_to_one_file_of_the_newest_whole_checkpoint(tmp_path):
    for seed in range(8):
        out = tmp_path / str(seed)
        for name in ("step-000002", "step-000004", "step-000006.part"):
            (out / "checkpoints" / name).mkdir(parents=True)
            for file in ("weights", "step.json", "complete")[: 2 if name.endswith("part") else 3]:
                (out / "checkpoints" / name / file).write_bytes(b"12345678")
        what = kills.damage(out, random.Random(seed))
        changed = [path for path in out.rglob("*") if path.is_file() and path.read_bytes() != b"12345678"]
        assert [path.parent.name for path in changed] == ["step-000004"] and changed[0].name in what != "complete"
        assert len(changed[0].read_bytes()) == (8 if "flipped" in what else int(what.rpartition(" ")[2]))
    assert kills.damage(tmp_path / "nothing", random.Random(0)) is None


def test_the_end_of_a_run_leaves_speeds_out(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "samples.jsonl").write_text("{}\n")
    ends = []
    for seconds, loss in ((1.0, 0.5), (2.0, 0.5), (1.0, 0.25)):
        (tmp_path / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "loss": loss, "seconds": seconds, "mfu": seconds}) + "\n"
        )
        ends.append(kills.end_of(tmp_path))
    assert ends[0] == ends[1] != ends[2]


def test_the_command_saves_every_second_of_twelve_steps():
    s = train.parse_settings(kills.COMMAND.split()[1:])
    assert (s.max_steps, s.save_every, s.out) == (12, 2, "out") and 40 - s.eval_size == 4 * s.batch_size and s.epochs * 4 == 12


def test_a_killed_run_goes_on_to_the_same_end(tmp_path):
    done = processes.run([kills.__file__, "--runs", "1"], tmp_path)
    assert done.code == 0, done.out + done.err
    assert done.out.splitlines()[-1].startswith("1 runs, ") and " 1 equal, 0 different, 0 lost, 0 error" in done.out
