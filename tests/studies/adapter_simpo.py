"""The SimPO trainer of its authors, for conformance.py: a clone of github.com/princeton-nlp/SimPO, in the folder that the
environment variable SIMPO names. It is of the time of trl 0.9; what newer versions have renamed is given back its name here."""

import functools
import os
import sys
from importlib import import_module

import adapter_trl
import torch
import transformers
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer
from transformers_arguments import logged
from trl.experimental import cpo, utils

from data import UserError
from losses import parse_objective

if "SIMPO" not in os.environ:
    raise UserError("the environment variable SIMPO is not set; it names a clone of github.com/princeton-nlp/SimPO")
VERSION = f"with transformers {transformers.__version__} and trl {trl.__version__}"
TRAINERS = {"SimPOTrainer": ["simpo(beta=2.0, gamma=1.0, label_smoothing=0.0)"]}


def texts(tokenizer, row: dict) -> list[str]:
    """Prompt, chosen and rejected response, as the authors' run_simpo.py writes them: each a conversation of its own."""
    prompt = tokenizer.apply_chat_template([{"role": "system", "content": ""}, *row["prompt"]], tokenize=False)
    answers = [[{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")]
    return [prompt, *(tokenizer.apply_chat_template(x, tokenize=False).removeprefix(tokenizer.bos_token) for x in answers)]


def as_conversations(tokenizer, row: dict) -> tuple[list[int], list[list[int]]]:
    prompt, *responses = (tokenizer(text, add_special_tokens=False).input_ids for text in texts(tokenizer, row))
    return prompt, [r if r[-1] == tokenizer.eos_token_id else [*r, tokenizer.eos_token_id] for r in responses]


TOKENS = {"all that the template writes for a conversation that begins with the response": as_conversations}


@functools.cache
def today() -> tuple[type, type]:
    """The authors' trainer with what transformers asks of one today, and its settings."""

    def collator(label_pad_token_id, **more):
        return utils.DPODataCollatorWithPadding(**more)

    renamed = {
        "trl.trainer": {"CPOTrainer": cpo.CPOTrainer},
        "trl.import_utils": {"is_peft_available": lambda: False, "is_wandb_available": lambda: False},
        "transformers.utils": {"is_torch_fx_proxy": lambda _: False},
        "trl.trainer.utils": {
            "DPODataCollatorWithPadding": collator, "pad_to_length": utils.pad_to_length,
            "peft_module_casting_to_bf16": None, "trl_sanitze_kwargs_for_tagging": None,
        },
    }  # fmt: skip
    for module, names in renamed.items():
        vars(import_module(module)).update(names)
    sys.path.insert(0, os.path.join(os.environ["SIMPO"], "scripts"))
    from simpo_config import SimPOConfig
    from simpo_trainer import SimPOTrainer

    init = Trainer.__init__

    def today_init(self, *args, tokenizer=None, **more):
        init(self, *args, processing_class=tokenizer, **more)

    class Today(SimPOTrainer):
        get_batch_samples = Trainer.get_batch_samples  # the name means something else now
        tokenizer = None

        def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
            return super().compute_loss(model, inputs, return_outputs)

        def log(self, logs, start_time=None):
            super().log(logs)

    Trainer.__init__ = today_init
    return Today, SimPOConfig


def train(case) -> list[dict]:
    kind, config = today()
    (term,) = parse_objective(case.objective).terms
    given = dict(term.given)
    ratio = given.pop("gamma") / given["beta"]
    how = adapter_trl.common(case) | given | dict(gamma_beta_ratio=ratio, max_prompt_length=case.max_length * 7 // 8)
    tokenizer = AutoTokenizer.from_pretrained(case.model)
    rows = [dict(zip(("prompt", "chosen", "rejected"), texts(tokenizer, row))) for row in case.rows]
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    trainer = kind(model, config(**how), train_dataset=Dataset.from_list(rows), tokenizer=tokenizer)
    trainer.train(resume_from_checkpoint=case.resume)
    return logged(trainer.state.log_history)
