"""The toy task: its language by hand, the committed folder, building and judging."""

import json
import math
import os
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
import toy
from safetensors.torch import load_file
from worlds import world_pairs

import data
import train

# ---- the language ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prompt, response, quality", [
    ("name three fruits", "apple pear plum", 1.0),
    ("name three fruits", "well so apple pear plum", 0.8),  # two idle words
    ("name three fruits", "apple pear plum fig", 1 - 0.5 / 3),  # a fourth item is surplus
    ("name three fruits", "well apple apple hammer", 1 / 3 - 0.5 * 2 / 3 - 0.1),  # one right, one repeated, one of another kind
    ("name three fruits", "", 0.0),
    ("list two metals and four tools", "iron gold and saw drill axe rake", 1.0),
    ("list two metals and four tools", "iron gold tin and saw", 3 / 6 - 0.5 * 1 / 6),  # three of six; a third metal is surplus
])  # fmt: skip
def test_quality_by_hand(prompt, response, quality):
    assert toy.quality(prompt, response) == pytest.approx(quality)


def test_repetition_by_hand():
    assert toy.repetition("so apple pear apple and apple") == 0.5 and toy.repetition("so") == 0


def test_prompts_are_all_there_once():
    """6 verbs, 3 numbers of 8 kinds alone, or with one of 3 numbers of the 7 other kinds."""
    prompts = toy.all_prompts(3)
    assert len(prompts) == len(set(prompts)) == 6 * (3 * 8 + 3 * 8 * 3 * 7)
    assert sorted(prompts) == sorted(toy.all_prompts(4)) and prompts != toy.all_prompts(4)


def test_annotator_adds_noise_and_length_bias():
    row, quality = {"prompt": [{"role": "user", "content": "name two fruits"}]}, {"apple pear": 1.0, "so so apple pear": 0.8}
    exact, biased = toy.Annotator(), toy.Annotator(length_bias=0.15)
    assert all(exact(row, text) == pytest.approx(q) for text, q in quality.items())
    assert [biased(row, text) for text in quality] == pytest.approx([1.0 + 0.3, 0.8 + 0.6])  # the longer is now preferred
    noisy = [toy.Annotator(noise=0.5, seed=seed)(row, "apple pear") for seed in range(2000)]
    assert np.mean(noisy) == pytest.approx(1.0, abs=0.05) and np.std(noisy) == pytest.approx(0.5, abs=0.03)  # 4 standard errors
    assert toy.Annotator(noise=0.5, seed=7)(row, "apple pear") == noisy[7]  # drawn from texts and seed, not from a state


def test_demonstrations_and_pairs_are_in_the_vocabulary():
    tokenizer, shown = toy.word_tokenizer(), toy.demonstrations(seed=1, count=50)
    pairs = world_pairs(1, 50, 50)
    assert len(shown) == len(pairs) == 50
    for row in pairs:
        better, worse = (toy.quality(row.prompt[0]["content"], r["content"]) for r in row.responses)
        assert better > worse
    held_out = toy.all_prompts(1)[: toy.HELD_OUT_PROMPTS]
    for row in shown + pairs:
        example, cuts = data.encode(row, tokenizer, 128, 120)
        assert tokenizer.unk_token_id not in example.prompt + sum(example.responses, []) and not cuts
        assert all(r[-1] == tokenizer.eos_token_id for r in example.responses)
        assert row.prompt[0]["content"] not in held_out
    assert toy.demonstrations(seed=1, count=50) == shown != toy.demonstrations(seed=2, count=50)
    assert world_pairs(1, 50, 50) == pairs != world_pairs(2, 50, 50)
    assert world_pairs(1, 0, 50) != pairs  # drawn after the demonstrations


# ---- the committed task ----------------------------------------------------------------------------------------------


def lines_of(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def test_the_committed_task_is_what_it_says():
    """Scored pairs of prompts that are not held out, a small model with its tokenizer, settings that name both."""
    pairs, held_out = lines_of(toy.FOLDER / "pairs.jsonl"), [row["prompt"] for row in lines_of(toy.FOLDER / "prompts.jsonl")]
    assert held_out == toy.all_prompts(0)[: toy.HELD_OUT_PROMPTS] and len(held_out) == 512
    assert [row["prompt"][0]["content"] for row in pairs] == toy.all_prompts(0)[512:][: toy.PROMPTS]
    annotator = toy.Annotator(0.1, 0.0, 0)
    for row in pairs:
        assert annotator(row, row["chosen"]) == row["score_chosen"] > row["score_rejected"] == annotator(row, row["rejected"])
    weights = load_file(toy.FOLDER / "model" / "model.safetensors")
    assert 300_000 < sum(x.numel() for x in weights.values()) < 400_000
    assert all(x.dtype == torch.float32 and x.isfinite().all() for x in weights.values())
    kept, fresh = data.load_tokenizer(str(toy.FOLDER / "model")), toy.word_tokenizer()
    assert kept.get_vocab() == fresh.get_vocab() and kept.chat_template == fresh.chat_template
    assert (toy.FOLDER / "simpo.yaml").read_text() == toy.SETTINGS.format(options="")
    assert sum(file.stat().st_size for file in toy.FOLDER.rglob("*")) < 2_500_000


@pytest.mark.slow
def test_the_committed_task_is_built_again(tmp_path):
    """Texts equal, weights to rounding. Half a minute."""
    built = toy.main(["build", "--out", str(tmp_path / "toy")])
    files = sorted(file.relative_to(toy.FOLDER) for file in toy.FOLDER.rglob("*") if file.is_file())
    assert sorted(file.relative_to(built) for file in built.rglob("*") if file.is_file()) == files
    for file in files:
        if file.suffix != ".safetensors":
            ours, theirs = (toy.FOLDER / file).read_text(), (built / file).read_text()
            assert without_version(ours) == without_version(theirs), file
    committed, again = (load_file(folder / "model" / "model.safetensors") for folder in (toy.FOLDER, built))
    assert committed.keys() == again.keys()
    for name in committed:
        torch.testing.assert_close(again[name], committed[name], atol=1e-3, rtol=0)


def without_version(text: str) -> list[str]:
    return [line for line in text.splitlines() if "transformers_version" not in line]


@pytest.mark.slow
def test_the_main_job_improves_the_answers(tmp_path, capsys):
    """The README's numbers; the last digits depend on the processor."""
    summary = train.main(["--out", str(tmp_path / "out"), "--cache", str(tmp_path / "cache")])
    assert summary["rows"] == toy.PROMPTS - 200
    assert summary["after"]["eval_reward_margin"] > summary["before"]["eval_reward_margin"] + 0.5
    measures = toy.main(["judge", str(tmp_path / "out" / "model")])
    assert measures["win_rate"] == pytest.approx([0.5, 0.744], abs=0.01)
    assert measures["quality"] == pytest.approx([0.589, 0.745], abs=0.01)
    assert measures["kl"] == pytest.approx([0, 1.52], abs=0.05)


# ---- building --------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(monkeypatch):
    """Tasks whose initial model hardly learns, of few prompts."""
    for name, value in (("DEMONSTRATIONS", 256), ("SUPERVISED_STEPS", 3), ("PROMPTS", 16), ("HELD_OUT_PROMPTS", 16)):
        monkeypatch.setattr(toy, name, value)


def test_a_built_task_is_trained_and_judged(small, tmp_path, capsys):
    """As the help text has it. The annotator's length bias is in the pairs' scores, and the settings say how it was built."""
    out = tmp_path / "biased"
    toy.main(["build", "--length-bias", "0.5", "--seed", "2", "--out", str(out)])
    assert {file.name for file in out.iterdir()} == {"model", "pairs.jsonl", "prompts.jsonl", "simpo.yaml"}
    assert "build --seed 2 --length-bias 0.5`" in (out / "simpo.yaml").read_text()
    annotator = toy.Annotator(0.1, 0.5, 2)
    for row in lines_of(out / "pairs.jsonl"):
        assert annotator(row, row["chosen"]) == row["score_chosen"] > row["score_rejected"]
    assert [row["prompt"] for row in lines_of(out / "prompts.jsonl")] == toy.all_prompts(2)[:16]
    more = ["--eval-size", "4", "--batch-size", "4", "--max-steps", "1", "--samples", "0", "--cache", str(tmp_path / "cache")]
    train.main([str(out / "simpo.yaml"), "--out", str(out / "run"), *more])
    capsys.readouterr()
    measures = toy.main(["judge", str(out / "run" / "model"), "--toy", str(out)])
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "answers to 16 held-out prompts (temperature 1), before → after:" and len(said) == 1 + 6 + 3 * 3
    for line, (name, (title, digits)) in zip(said[1:], toy.MEASURES.items()):
        was, now = measures[name]
        assert line.split("  ")[1] == title and line.endswith(f" {was:.{digits}f} → {now:.{digits}f}")
    assert said[7] == f"  prompt  {toy.all_prompts(2)[0]!r}" and said[8].startswith("  before  '")


def test_studies_share_what_is_built(small, tmp_path, monkeypatch):
    """A task of another annotator has the same model and answers; each is built once, and is what `build` makes."""
    plain = toy.cached(seed=2, cache=str(tmp_path / "cache"))
    monkeypatch.setattr(toy, "make_initial_model", lambda *_: pytest.fail("built again"))
    noisy = toy.cached(seed=2, noise=0.5, cache=str(tmp_path / "cache"))
    assert toy.cached(seed=2, cache=str(tmp_path / "cache")) == plain != noisy
    names = {"model", "pairs.jsonl", "prompts.jsonl", "simpo.yaml", "answers.jsonl"}
    assert {file.name for file in plain.iterdir()} == {file.name for file in noisy.iterdir()} == names
    for name in ("model/model.safetensors", "prompts.jsonl", "answers.jsonl"):
        assert (plain / name).read_bytes() == (noisy / name).read_bytes()
    assert lines_of(plain / "pairs.jsonl") != lines_of(noisy / "pairs.jsonl")
    monkeypatch.undo()
    for name, value in (("DEMONSTRATIONS", 256), ("SUPERVISED_STEPS", 3), ("PROMPTS", 16), ("HELD_OUT_PROMPTS", 16)):
        monkeypatch.setattr(toy, name, value)
    built = toy.main(["build", "--seed", "2", "--noise", "0.5", "--out", str(tmp_path / "built")])
    for name in ("model/model.safetensors", "prompts.jsonl", "pairs.jsonl", "simpo.yaml"):
        assert (built / name).read_bytes() == (noisy / name).read_bytes()


def test_what_a_killed_build_left_is_built_again(small, tmp_path, monkeypatch):
    """Killed after its model was written: the next build begins anew, also in a process of the same number, and is whole."""

    def killed(*args):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(toy, "answer", killed)
        with pytest.raises(KeyboardInterrupt):
            toy.cached(cache=str(tmp_path / "cache"))
    left = [file.name for file in (tmp_path / "cache").glob("toy-*")]
    assert len(left) == 1 and left[0].endswith(".part")
    folder = toy.cached(cache=str(tmp_path / "cache"))
    assert len(lines_of(folder / "answers.jsonl")) == 16 and (folder / "pairs.jsonl").exists()
    assert [file.name for file in (tmp_path / "cache").glob("toy-*")] == [folder.parent.name]


def test_a_cache_that_cannot_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(data.UserError, match="file/cache cannot be written"):
        toy.cached(cache=str(tmp_path / "file" / "cache"))


# ---- judging ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def few(tmp_path) -> Path:
    """The committed task with the first 64 of its held-out prompts."""
    folder = tmp_path / "few"
    folder.mkdir()
    os.symlink(toy.FOLDER / "model", folder / "model")
    lines = (toy.FOLDER / "prompts.jsonl").read_text().splitlines(keepends=True)
    (folder / "prompts.jsonl").write_text("".join(lines[:64]))
    return folder


def test_judging_the_initial_model_against_itself(few, tmp_path):
    """Its own answers with the same seed: every measure as before, no KL; with another seed other answers."""
    toy.answer(few / "model", few / "prompts.jsonl", few / "answers.jsonl")
    same = toy.judge(few / "model", few, tmp_path / "a.jsonl")
    assert all(now == pytest.approx(was, abs=1e-6) for was, now in same.values())
    assert same["win_rate"] == [0.5, 0.5] and same["length"][0] > 5
    toy.answer(few / "model", few / "prompts.jsonl", tmp_path / "b.jsonl", seed=1)
    answers = [row["responses"] for row in lines_of(tmp_path / "b.jsonl")]
    assert len(answers) == 64 and all(len(x) == 1 for x in answers)
    assert answers != [row["responses"] for row in lines_of(few / "answers.jsonl")]


def test_length_controlled_win_rate():
    """Wins drawn from σ(θ + φ tanh(Δ/std)): the estimate is σ(θ), wherever the lengths lie; without lengths the plain rate."""
    generator = torch.Generator().manual_seed(0)
    difference = torch.randn(40_000, generator=generator, dtype=torch.float64) * 5 + 4
    chance = torch.sigmoid(0.4 + 1.5 * torch.tanh(difference / difference.std()))
    win = (torch.rand(40_000, generator=generator, dtype=torch.float64) < chance).double()
    assert win.mean() > 0.7
    assert toy.length_controlled(win, difference) == pytest.approx(1 / (1 + math.exp(-0.4)), abs=0.02)
    assert toy.length_controlled(win, torch.zeros_like(win)) == pytest.approx(win.mean().item(), abs=1e-4)


BAD = {
    "no command": ([], ["a command is missing", "build, judge"]),
    "no model": (["judge"], ["model"]),
    "a model that is not there": (["judge", "nowhere"], ["model nowhere: there is no nowhere/config.json"]),
    "a task that is not there": (["judge", "MODEL", "--toy", "nowhere"], ["toy nowhere: there is no nowhere/model"]),
    "an out that holds files": (["build", "--out", "OUT"], ["already holds files"]),
    "an out that is a file": (["build", "--out", "OUT/letter.txt"], ["already holds files"]),
    "negative noise": (["build", "--noise", "-1", "--out", "NEW"], ["noise is -1", "not be negative"]),
    "noise nan": (["build", "--noise", "nan", "--out", "NEW"], ["noise is nan", "finite"]),
    "an unknown world": (["build", "--world", "stok", "--out", "NEW"], ["world is 'stok'; accepted are plain, stock"]),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_inputs_end_with_a_message_and_code_2(tmp_path, capsys, monkeypatch, name):
    line, expected = BAD[name]
    monkeypatch.chdir(tmp_path)
    (tmp_path / "OUT").mkdir()
    (tmp_path / "OUT" / "letter.txt").write_text("mine")
    shutil.copytree(toy.FOLDER / "model", tmp_path / "MODEL")
    with pytest.raises(SystemExit) as stop:
        toy.main(line)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and all(part in error for part in expected) and "error: " in error
    assert (tmp_path / "OUT" / "letter.txt").read_text() == "mine" and not (tmp_path / "NEW").exists()
