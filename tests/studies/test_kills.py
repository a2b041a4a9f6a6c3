"""The kill loop: where a run was struck, by hand; what is compared; and one run that is killed and goes on."""

import json
import random
import zlib

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
        ({"step": 12}, "after the last step"),
        ({"step": 12, "summary": True}, "after the end"),
    ],
)
def test_where_a_run_was_struck(tmp_path, left, place):
    lay(tmp_path / "out", **left)
    assert kills.place_of(tmp_path / "out") == place


def checkpoint(out, step, content=b"12345678"):
    folder = out / f"checkpoints/step-{step:06d}"
    folder.mkdir(parents=True)
    files = {"weights": content, "step.json": b"{}"}
    for name, text in files.items():
        (folder / name).write_bytes(text)
    (folder / "complete").write_text(json.dumps({name: [len(text), zlib.crc32(text)] for name, text in files.items()}))
    return folder


def test_damage_is_to_one_file(tmp_path):
    """A file of the newest whole checkpoint, the reference log-probs, or run.json; once that one is, only the log-probs."""
    kinds = set()
    for seed in range(40):
        out = tmp_path / str(seed) / "out"
        for step in (2, 4, 6):
            checkpoint(out, step)
        (out / "checkpoints/step-000006/weights").write_bytes(b"12345679")  # damaged before
        (out / "run.json").write_text("12345678")
        (out.parent / "cache").mkdir()
        (out.parent / "cache/reference-1.safetensors").write_text("12345678")
        before = {path: path.read_bytes() for path in out.parent.rglob("*") if path.is_file()}
        what = kills.damage(out, random.Random(seed))
        changed = [path for path, content in before.items() if not path.exists() or path.read_bytes() != content]
        assert len(changed) == 1 and changed[0].name in what != "complete"
        assert changed[0].parent.name in ("step-000004", "cache", "out")
        kinds.add((changed[0].parent.name, what.split()[1]))
        if changed[0].parent.name == "step-000004":
            assert kills.whole_checkpoints(out) == [out / "checkpoints/step-000002"]
        (out / "run.json").write_text("")
        then = kills.damage(out, random.Random(seed))
        assert then is None or then.startswith("reference-1")
    assert len(kinds) == 6
    assert kills.damage(tmp_path / "nothing", random.Random(0)) is None


def test_a_checkpoint_damaged_twice_is_not_whole(tmp_path):
    folder = checkpoint(tmp_path, 2)
    assert kills.whole_checkpoints(tmp_path) == [folder]
    (folder / "weights").write_bytes(b"1234567")
    (folder / "step.json").write_bytes(b"")
    assert kills.whole_checkpoints(tmp_path) == []


def test_the_end_of_a_run_leaves_speeds_out(tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "model.safetensors").write_bytes(b"weights")
    (tmp_path / "samples.jsonl").write_text("{}\n")
    ends = []
    for seconds, loss in ((1.0, 0.5), (2.0, 0.5), (1.0, 0.25)):
        (tmp_path / "metrics.jsonl").write_text(
            json.dumps({"step": 1, "loss": loss, "seconds": seconds, "tokens_per_second": seconds}) + "\n"
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
