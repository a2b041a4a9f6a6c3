"""ms-swift, for conformance.py. Version 4.6.0 wants transformers < 5.20 and trl < 1.0: an environment of its own."""

import importlib.metadata
import json
from pathlib import Path

from swift import RLHFArguments, rlhf_main
from transformers_arguments import arguments, logged

from losses import parse_objective

VERSION = importlib.metadata.version("ms-swift")
TRAINERS = {  # without KTO, which shuffles its rows whatever the settings say
    "dpo": ["dpo(beta=0.1)", "dpo(beta=0.1, label_smoothing=0.1)", "ipo(tau=0.1)", "rso_hinge(beta=0.05)"],
    "cpo": ["simpo(beta=2.0, gamma=1.0)"],
    "orpo": ["orpo(lam=0.1)"],
}
LOSSES = {"dpo": "sigmoid", "rso_hinge": "hinge", "ipo": "ipo", "simpo": "simpo"}
NAMES = {"beta": "beta", "tau": "beta", "lam": "beta", "gamma": "simpo_gamma", "label_smoothing": "label_smoothing"}
SYSTEM = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face"}


def conversation(row: dict) -> dict:
    """Its template "chatml" with the model's system prompt writes what the model's own template does."""
    answer = {"role": "assistant", "content": row["chosen"]}
    return {"messages": [SYSTEM, *row["prompt"], answer], "rejected_response": row["rejected"]}


def train(case) -> list[dict]:
    (term,) = parse_objective(case.objective).terms
    how = arguments(case) | {NAMES[key]: value for key, value in term.given.items()}
    if term.name in LOSSES:
        how["loss_type"] = [LOSSES[term.name]]
    if term.name == "simpo":
        how |= {"rlhf_type": "simpo", "cpo_alpha": 0.0}
    rows = Path(case.out).with_suffix(".jsonl")
    rows.write_text("".join(json.dumps(conversation(row)) + "\n" for row in case.rows))
    checkpoint = f"{case.out}/checkpoint-{case.save_every}" if case.resume else None
    order = dict(dataset_shuffle=False, train_dataloader_shuffle=False, train_sampling_strategy="sequential")
    result = rlhf_main(RLHFArguments(**{"rlhf_type": case.trainer} | how | order | dict(
        model=case.model, model_type="llama", template="chatml", dataset=[str(rows)], tuner_type="full", adam_beta2=0.999,
        max_length=case.max_length, torch_dtype="bfloat16" if case.bf16 else "float32", gradient_checkpointing=False,
        resume_from_checkpoint=checkpoint, add_version=False, split_dataset_ratio=0.0,
        check_model=False,  # it would ask a hub about the folder
    )))  # fmt: skip
    return logged(result["log_history"])
