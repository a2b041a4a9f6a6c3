"""trl's trainers, for conformance.py."""

import torch
import trl
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers_arguments import arguments, logged
from trl import DPOConfig, DPOTrainer, KTOConfig, KTOTrainer
from trl.experimental.cpo import CPOConfig, CPOTrainer
from trl.experimental.orpo import ORPOConfig, ORPOTrainer

from losses import parse_objective

VERSION = trl.__version__
MISMATCH = -1
LOSS_TYPES = {
    "dpo": "sigmoid", "dpo_norm": "sigmoid_norm", "robust_dpo": "robust", "rso_hinge": "hinge", "exo": "exo_pair",
    "nca": "nca_pair", "sppo": "sppo_hard", "cpo": "sigmoid", "orpo": None,
}  # fmt: skip
# of an objective's settings, or of that of one objective
NAMES = {"gamma": "simpo_gamma", "lam": "cpo_alpha", "lambda_d": "desirable_weight", "lambda_u": "undesirable_weight"}
NAMES |= {"tau": "discopop_tau", "ipo.tau": "beta", "orpo.lam": "beta"}
DPO = ["dpo(beta=0.1, label_smoothing=0.1)", "dpo_norm(beta=5.0)", "ipo(tau=0.1)", "rso_hinge(beta=0.05)", "nca(beta=0.01)"]
DPO += ["robust_dpo(beta=0.1, label_smoothing=0.1)", "exo(beta=0.1, label_smoothing=0.001)", "bco_pair(beta=0.1)"]
DPO += ["sppo(beta=0.1)", "apo_zero(beta=0.1)", "apo_down(beta=0.1)", "discopop(beta=0.05, tau=0.05)", "aot(beta=1.0)"]
DPO += ["aot_unpaired(beta=1.0)", "sft"]
TRAINERS = {
    "DPOTrainer": ["dpo(beta=0.1)", *DPO],
    "DPOTrainer, padding_free": ["dpo(beta=0.1)"],
    "DPOTrainer, precompute_ref_log_probs": ["dpo(beta=0.1)"],
    "KTOTrainer": ["apo_zero_unpaired(beta=0.1)", "kto(beta=0.1, lambda_d=1.0, lambda_u=1.5)"],
    "CPOTrainer": ["simpo(beta=2.0, gamma=1.0, label_smoothing=0.0)", "cpo(beta=0.1, lam=1.0)",
                   "alphapo(beta=2.5, gamma=0.25, alpha=0.25)"],
    "ORPOTrainer": ["orpo(lam=0.1)"],
}  # fmt: skip
KINDS = {"DPO": (DPOTrainer, DPOConfig), "KTO": (KTOTrainer, KTOConfig), "CPO": (CPOTrainer, CPOConfig),
         "ORP": (ORPOTrainer, ORPOConfig)}  # fmt: skip


def settings(case) -> dict:
    """The objective's, with their names there."""
    (term,) = parse_objective(case.objective).terms
    renamed = {NAMES.get(f"{term.name}.{key}", NAMES.get(key, key)): value for key, value in term.given.items()}
    loss_type = LOSS_TYPES.get(term.name, term.name)
    extra = {"cpo_alpha": 0.0} if term.name == "simpo" else {}
    return renamed | extra | ({"loss_type": loss_type} if loss_type else {})


def common(case) -> dict:
    more = dict(train_sampling_strategy="sequential", gradient_checkpointing=False, max_length=case.max_length)
    return arguments(case) | more


def train(case) -> list[dict]:
    kind, config = KINDS[case.trainer[:3]]
    switches = {name: True for name in case.trainer.split(", ")[1:]}
    model = AutoModelForCausalLM.from_pretrained(case.model, dtype=torch.float32)
    rows = [{key: [{"role": "assistant", "content": x}] if isinstance(x, str) else x for key, x in row.items()}
            for row in case.rows]  # fmt: skip
    how = dict(args=config(**common(case), **settings(case), **switches), train_dataset=Dataset.from_list(rows))
    trainer = kind(model, processing_class=AutoTokenizer.from_pretrained(case.model), **how)
    trainer.train(resume_from_checkpoint=case.resume)
    return logged(trainer.state.log_history)
