"""What the tests of the studies share."""

import json
from pathlib import Path

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
    paired = [{"prompt": p.prompt, "chosen": p.responses[0], "rejected": p.responses[1]} for p in pairs]
    single = [{"prompt": p.prompt, "completion": p.responses[i % 2], "label": i % 2 == 0} for i, p in enumerate(pairs)]
    for name, rows in (("pairs", paired), ("rows", single)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
