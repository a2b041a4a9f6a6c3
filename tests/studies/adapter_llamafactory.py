"""LLaMA-Factory, for conformance.py. Version 0.9.5 wants transformers ≤ 5.6 and trl ≤ 0.24: an environment of its own."""

import importlib.machinery
import importlib.metadata
import json
import sys
from pathlib import Path
from types import ModuleType

from conformance import behind, ids_of
from transformers_arguments import arguments, logged

from losses import parse_objective

try:
    import torchaudio  # noqa: F401
except (ImportError, OSError):  # LLaMA-Factory imports it for other data; the registry's may not fit the torch
    sys.modules["torchaudio"] = ModuleType("torchaudio")
    sys.modules["torchaudio"].__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
from llamafactory.train.tuner import run_exp  # noqa: E402

VERSION = importlib.metadata.version("llamafactory")
MISMATCH = -1
TRAINERS = {
    "dpo": ["dpo(beta=0.1)", "dpo(beta=0.1, label_smoothing=0.1)", "ipo(tau=0.1)", "rso_hinge(beta=0.05)",
            "simpo(beta=2.0, gamma=1.0)", "orpo(lam=0.1)"],
    "kto": ["kto(beta=0.1, lambda_d=1.0, lambda_u=1.5)"],
}  # fmt: skip
LOSSES = {"dpo": "sigmoid", "rso_hinge": "hinge"}
NAMES = {
    "beta": "pref_beta", "tau": "pref_beta", "lam": "pref_beta", "gamma": "simpo_gamma",
    "label_smoothing": "dpo_label_smoothing", "lambda_d": "kto_chosen_weight", "lambda_u": "kto_rejected_weight",
}  # fmt: skip
SYSTEM = {"role": "system", "content": "You are a helpful AI assistant named SmolLM, trained by Hugging Face."}
COLUMNS = {
    "dpo": {"prompt": "question", "chosen": "chosen", "rejected": "rejected"},
    "kto": {"prompt": "question", "response": "completion", "kto_tag": "label"},
}


def own_template(tokenizer, row: dict):
    """Its template "smollm2": the default system prompt ends with a full stop, and a line break is scored."""
    return ids_of(tokenizer, row | {"prompt": [SYSTEM, *row["prompt"]]}, lambda r: r + behind(tokenizer))


TOKENS = {"its own template: another system prompt, also what is written behind the terminator": own_template}


def train(case) -> list[dict]:
    (term,) = parse_objective(case.objective).terms
    folder = Path(case.out).with_suffix(".data")
    folder.mkdir(exist_ok=True)
    rows = [row | {"question": row["prompt"][0]["content"]} for row in case.rows]
    (folder / "rows.json").write_text(json.dumps(rows))
    table = {"file_name": "rows.json", "ranking": case.trainer == "dpo", "columns": COLUMNS[case.trainer]}
    (folder / "dataset_info.json").write_text(json.dumps({"rows": table}))
    checkpoint = f"{case.out}/checkpoint-{case.save_every}" if case.resume else None
    how = arguments(case) | {NAMES[key]: value for key, value in term.given.items()}
    if case.trainer == "dpo":
        how["pref_loss"] = LOSSES.get(term.name, term.name)
    run_exp(how | dict(
        model_name_or_path=case.model, stage=case.trainer, do_train=True, finetuning_type="full", dataset="rows",
        dataset_dir=str(folder), template="smollm2", cutoff_len=case.max_length, disable_shuffling=True,
        disable_gradient_checkpointing=True, resume_from_checkpoint=checkpoint, overwrite_cache=True, report_to="none",
    ))  # fmt: skip
    state = Path(case.out, "trainer_state.json")  # of the first process alone
    return logged(json.loads(state.read_text())["log_history"]) if state.exists() else []
