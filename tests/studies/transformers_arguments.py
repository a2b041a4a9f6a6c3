"""For the adapters of conformance.py: what all trainers built on transformers.Trainer are told, and what they log."""

import os

NAMES = {
    "loss": "loss", "rewards/chosen": "reward_chosen", "rewards/rejected": "reward_rejected",
    "rewards/margins": "reward_margin", "rewards/accuracies": "reward_accuracy",
}  # fmt: skip


def arguments(case) -> dict:
    processes = int(os.environ.get("WORLD_SIZE", 1))
    return dict(
        output_dir=case.out, per_device_train_batch_size=case.batch_size // case.accumulation // processes,
        gradient_accumulation_steps=case.accumulation, learning_rate=case.lr, lr_scheduler_type="constant", max_grad_norm=0.0,
        weight_decay=0.0, num_train_epochs=1, bf16=case.bf16, use_cpu=True, logging_steps=1, report_to=[], disable_tqdm=True,
        save_strategy="steps" if case.save_every else "no", save_steps=case.save_every or 500,
    )  # fmt: skip


def logged(history: list[dict]) -> list[dict]:
    """From the trainer's log_history."""
    lines = [line for line in history if "loss" in line]
    return [{NAMES[key]: float(value) for key, value in line.items() if key in NAMES} for line in lines]
