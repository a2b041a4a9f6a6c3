"""The settings files of published runs, tests/published/*.yaml: each says what the papers' tables say."""

from dataclasses import fields
from pathlib import Path

import pytest

import train

FOLDER = Path(__file__).parent / "published"

# Initial model → model, data, (prompt, total) lengths, {method: (objective, lr)}. γ and α in the papers' units.
ULTRA = "HuggingFaceH4/ultrafeedback_binarized:train_prefs"
MISTRAL, LLAMA = "mistralai/Mistral-7B-Instruct-v0.2", "meta-llama/Meta-Llama-3-8B-Instruct"
PUBLISHED = {
    "mistral-7b-base": ("alignment-handbook/zephyr-7b-sft-full", ULTRA, (512, 1024), {
        "simpo": ("simpo(beta=2.0, gamma=1.6)", 3e-7), "simper": ("simper", 3e-7)}),
    "mistral-7b-instruct": (MISTRAL, "princeton-nlp/mistral-instruct-ultrafeedback", (1800, 2048), {
        "simpo": ("simpo(beta=2.5, gamma=0.25)", 5e-7), "simper": ("simper", 5e-7),
        "alpha-dpo": ("alpha_dpo(beta=2.5, gamma=0.375, alpha=0.125)", 6e-7),
        "gamma-simpo": ("gamma_simpo(beta=2.5, gamma=0.375, tau=10.0)", 6e-7)}),
    "llama-3-8b-base": ("princeton-nlp/Llama-3-Base-8B-SFT", ULTRA, (1800, 2048), {
        "simpo": ("simpo(beta=2.0, gamma=1.0)", 6e-7), "simper": ("simper", 6e-7)}),
    "llama-3-8b-instruct": (LLAMA, "princeton-nlp/llama3-ultrafeedback", (1800, 2048), {
        "simpo": ("simpo(beta=2.5, gamma=1.375)", 1e-6), "simper": ("simper", 1e-6),
        "alpha-dpo": ("alpha_dpo(beta=2.5, gamma=1.5, alpha=0.5)", 1e-6)}),
    "llama-3-8b-instruct-v0.2": (LLAMA, "princeton-nlp/llama3-ultrafeedback-armorm", (1800, 2048), {
        "simpo": ("simpo(beta=10.0, gamma=3.0)", 1e-6), "alpha-dpo": ("alpha_dpo(beta=10.0, gamma=4.0, alpha=2.0)", 1e-6),
        "gamma-simpo": ("gamma_simpo(beta=10.0, gamma=4.0, tau=10.0)", 1e-6)}),
    "gemma-2-9b-it": ("google/gemma-2-9b-it", "princeton-nlp/gemma2-ultrafeedback-armorm", (1800, 2048), {
        "simpo": ("simpo(beta=10.0, gamma=5.0)", 8e-7), "alpha-dpo": ("alpha_dpo(beta=10.0, gamma=4.0, alpha=0.5)", 8e-7),
        "gamma-simpo": ("gamma_simpo(beta=10.0, gamma=5.0, tau=20.0)", 8e-7)}),
}  # fmt: skip
RUNS = [(start, method) for start, (*_, methods) in PUBLISHED.items() for method in methods]


@pytest.mark.parametrize("start, method", RUNS)
def test_a_file_says_what_is_published(start, method):
    """Nothing else differs from the defaults but what makes it fit: activations are recomputed, and the tokens of a microbatch
    are those of a step of 8 GPUs at 1,000 tokens a pair, with room to spare: one microbatch, so no whole gradients wait."""
    model, dataset, (prompt, total), methods = PUBLISHED[start]
    objective, lr = methods[method]
    s = train.parse_settings([str(FOLDER / f"{start}-{method}.yaml")])
    published = dict(model=model, dataset=dataset, objective=objective, lr=lr, max_prompt_length=prompt, max_length=total)
    published |= dict(batch_size=128, epochs=1, warmup_ratio=0.1, weight_decay=0.0, max_grad_norm=1.0)
    ours = dict(dtype="bf16", gradient_checkpointing=True, tokens_per_microbatch=32768)
    expected = {f.name: f.default for f in fields(train.Settings)} | published | ours
    assert train.asdict(s) == expected
    assert s.tokens_per_microbatch >= 2 * s.batch_size * 1000 / 8
    train.try_objective(train.parse_objective(s.objective))


def test_every_published_run_has_a_file_and_every_file_is_one():
    assert sorted(file.name for file in FOLDER.iterdir()) == sorted(f"{start}-{method}.yaml" for start, method in RUNS)


def test_options_beside_a_file_win():
    """And gamma is the paper's: the released config has the ratio 0.5, β is 10."""
    s = train.parse_settings([str(FOLDER / "gemma-2-9b-it-simpo.yaml"), "--lr", "1e-5"])
    assert (s.objective, s.lr, s.max_length, s.max_prompt_length) == ("simpo(beta=10.0, gamma=5.0)", 1e-5, 2048, 1800)
