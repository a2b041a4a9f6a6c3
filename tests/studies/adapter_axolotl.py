"""axolotl, for conformance.py. Version 0.19.0 wants transformers 5.16.1 and trl 1.9.0: an environment of its own."""

import importlib.metadata
import json
import os
from pathlib import Path

from axolotl.cli.args import TrainerCliArgs
from axolotl.cli.config import load_cfg
from axolotl.common.datasets import load_preference_datasets
from axolotl.train import train as axolotl_train
from axolotl.utils.dict import DictDefault
from torch.utils.data import SequentialSampler
from transformers import Trainer
from transformers_arguments import logged

from losses import parse_objective

Trainer._get_train_sampler = lambda self, *_: SequentialSampler(self.train_dataset)  # no setting keeps the order of rows
VERSION = importlib.metadata.version("axolotl")
TRAINERS = {
    "dpo": ["dpo(beta=0.1)", "dpo(beta=0.1, label_smoothing=0.1)", "ipo(tau=0.1)", "rso_hinge(beta=0.05)"],
    "simpo": ["simpo(beta=2.0, gamma=1.0)"],
}
LOSSES = {"dpo": "sigmoid", "rso_hinge": "hinge", "ipo": "ipo"}
NAMES = {"beta": "rl_beta", "tau": "rl_beta", "gamma": "simpo_gamma", "label_smoothing": "dpo_label_smoothing"}


def train(case) -> list[dict]:
    (term,) = parse_objective(case.objective).terms
    how = {NAMES[key]: value for key, value in term.given.items()}
    how |= {"cpo_alpha": 0.0} if case.trainer == "simpo" else {"dpo_loss_type": [LOSSES[term.name]]}
    rows = Path(case.out).with_suffix(".jsonl")
    rows.write_text("".join(json.dumps(row) + "\n" for row in case.rows))
    processes = int(os.environ.get("WORLD_SIZE", 1))
    cfg = load_cfg(DictDefault(how | dict(
        base_model=case.model, rl=case.trainer, chat_template="tokenizer_default", output_dir=case.out,
        datasets=[{"path": str(rows), "ds_type": "json", "type": "chat_template.default", "field_messages": "prompt"}],
        dataset_prepared_path=f"{case.out}.prepared", dataset_num_proc=1, shuffle_merged_datasets=False,
        sequence_len=case.max_length, micro_batch_size=case.batch_size // case.accumulation // processes,
        gradient_accumulation_steps=case.accumulation, num_epochs=1, learning_rate=case.lr, lr_scheduler="constant",
        optimizer="adamw_torch", weight_decay=0.0, max_grad_norm=0.0, bf16=case.bf16, fp32=not case.bf16, logging_steps=1,
        save_strategy="steps" if case.save_every else "no", save_steps=case.save_every or None,
        resume_from_checkpoint=f"{case.out}/checkpoint-{case.save_every}" if case.resume else None,
    )))  # fmt: skip
    _, _, trainer = axolotl_train(cfg=cfg, dataset_meta=load_preference_datasets(cfg=cfg, cli_args=TrainerCliArgs()))
    return logged(trainer.state.log_history)
