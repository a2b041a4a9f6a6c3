"""What the tests of the studies share."""

import json
import subprocess
import sys
from pathlib import Path

import processes
import pytest
import torch
import toy
from transformers import LlamaConfig, LlamaForCausalLM
from worlds import world_pairs


@pytest.fixture(scope="session")
def small(tmp_path_factory) -> Path:
    """A folder with an untrained model, 40 pairs and 40 labelled completions, as a user would have them."""
    folder = tmp_path_factory.mktemp("small")
    tokenizer, pairs = toy.word_tokenizer(), world_pairs(0, 0, 40)
    shape = dict(vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4)
    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**shape, tie_word_embeddings=True, bos_token_id=None, eos_token_id=3, pad_token_id=3))
    for part in (model, tokenizer):
        part.save_pretrained(folder / "model")
    paired = [{"prompt": p.prompt, "chosen": p.responses[0]["content"], "rejected": p.responses[1]["content"]} for p in pairs]
    single = [
        {"prompt": p.prompt, "completion": p.responses[i % 2]["content"], "label": i % 2 == 0} for i, p in enumerate(pairs)
    ]
    for name, rows in (("pairs", paired), ("rows", single)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture(scope="session")
def tasks(tmp_path_factory) -> str:
    """The folder of toy tasks that are built once."""
    return str(tmp_path_factory.mktemp("tasks"))


@pytest.fixture
def small_task(tasks, monkeypatch) -> dict:
    """What jobs on a small toy task share, of which the initial model has hardly learnt."""
    for name, value in (("DEMONSTRATIONS", 512), ("SUPERVISED_STEPS", 20), ("PROMPTS", 48), ("HELD_OUT_PROMPTS", 16)):
        monkeypatch.setattr(toy, name, value)
    return dict(world="plain", cache=tasks, seed=0, eval_size=16)


@pytest.fixture
def warm(monkeypatch, tmp_path) -> None:
    """The processes of Python that a study starts are forks of this one, which has imported all that they import."""

    def run(command: list[str], **_) -> subprocess.CompletedProcess:
        assert command[0] == sys.executable
        done = processes.run(command[1:], tmp_path)
        return subprocess.CompletedProcess(command, done.code, done.out, done.err)

    monkeypatch.setattr(subprocess, "run", run)
