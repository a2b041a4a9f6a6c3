"""Several processes against one, checkpoints against accidents, export against what was trained.

One process without a process group is the reference: every expected value comes from it, from algebra, or from transformers'
own `from_pretrained`. Ranks are forked processes that talk over gloo on this machine; torchrun itself is started where its
own behaviour matters.
"""

import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace

import lorr
import numpy as np
import pytest
import torch
import toy
from forked import allocated, port, rank_of, ranks
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    FalconH1Config,
    Gemma2Config,
    GPT2Config,
    GPTNeoConfig,
    LlamaConfig,
    MixtralConfig,
    Qwen2Config,
    Qwen3MoeConfig,
)
from worlds import world_pairs

import data
import distributed as dist
import train
from logprobs import ResponseLogProbs, completions

ROOT = Path(__file__).parent.parent
ALL = ("simpo", "dpo", "alpha_dpo(beta=2.5, gamma=0.375, alpha=0.125)", "tdpo2")  # β multiplies rounding: 2.5, not 10


CONFIGS = {
    # 36 and 10 are no multiples of 4, so that ranks own unequal shares
    "tied": LlamaConfig(
        hidden_size=36, intermediate_size=70, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
        tie_word_embeddings=True,
    ),
    "untied": Qwen2Config(
        hidden_size=32, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    ),
    "capped": Gemma2Config(
        hidden_size=32, intermediate_size=50, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=8,
        sliding_window=16,
    ),
    # experts, which transformers fuses at loading and renames; 4 are cut over ranks
    "mixtral": MixtralConfig(
        hidden_size=32, intermediate_size=24, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        num_local_experts=4,
    ),
    "qwen3_moe": Qwen3MoeConfig(
        hidden_size=32, intermediate_size=50, moe_intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, num_experts=4, num_experts_per_tok=2,
    ),
}  # fmt: skip
FAMILIES = [*CONFIGS, "two matrices"]  # the last: its config says tied, its file holds an embedding and another head


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with small models of several families and 60 pairs of the toy task."""
    folder = tmp_path_factory.mktemp("world")
    tokenizer, pairs = toy.word_tokenizer(), world_pairs(0, 1, 60)
    for i, (name, config) in enumerate(CONFIGS.items()):
        torch.manual_seed(i)
        config.update(dict(vocab_size=len(tokenizer), initializer_range=0.2, eos_token_id=3, pad_token_id=3, bos_token_id=None))
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
        tokenizer.save_pretrained(folder / name)
    shutil.copytree(folder / "tied", folder / "two matrices")
    file = folder / "two matrices/model.safetensors"
    weights = load_file(file)
    weights["lm_head.weight"] = 0.2 * torch.randn_like(weights["model.embed_tokens.weight"])
    save_file(weights, file, {"format": "pt"})
    rows = (
        {"prompt": r.prompt[0]["content"], "chosen": r.responses[0]["content"], "rejected": r.responses[1]["content"]}
        for r in pairs
    )
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def settings(folder: Path, **changed) -> train.Settings:
    values = dict(model=str(folder / "tied"), dataset=str(folder / "pairs.jsonl"), lr=1e-4, dtype="fp32", device="cpu")
    values |= dict(batch_size=10, tokens_per_microbatch=120, max_steps=5, eval_size=6, samples=2, sample_tokens=4)
    values |= dict(out=str(folder), cache=str(folder / "cache"))  # a run has an out of its own
    return train.Settings(**values | changed)


def loaded(s: train.Settings) -> ResponseLogProbs:
    """The policy alone: built, cut over the ranks, its weights read."""
    rows = {}
    train.survey([data.Example([4, 5, 6], [[7, 8], [9]])], rows)
    return train.build_policy(s, train.parse_objective(s.objective), torch.device("cpu"), rows)


def whole(parameter) -> np.ndarray:
    return dist._whole(parameter).numpy().copy()


def some_steps(s: train.Settings, steps: int = 5, sizes: tuple = (10, 3, 1, 7, 10)) -> dict:
    """What some of the trainer's own steps give, over uneven batches; one pair leaves ranks without work."""
    clip, plan_steps, outcome = dist.clip_gradients, train.plan_steps, {"loss": [], "norm": []}

    def clip_and_keep(policy, limit):
        if "grad" not in outcome:
            outcome["grad"] = {n: whole(p.grad) for n, p in policy.model.named_parameters()}
        return clip(policy, limit)

    with tempfile.TemporaryDirectory() as folder:
        rows = dict(dataset=f"{s.dataset}[:50]", eval_dataset=f"{s.dataset}[50:]", warmup_ratio=0.0, sample_tokens=6)
        batches = [list(range(i * 10, i * 10 + size)) for i, size in enumerate(sizes)]
        train.plan_steps = lambda *_: batches * 20  # a long plan, so that the learning rate stays near its peak
        run = train.prepare(replace(s, out=f"{folder}/o", cache=f"{folder}/cache", **rows))
        train.plan_steps = plan_steps
        for parameters in run.optimizer.param_groups:
            parameters["eps"] = 1e-5  # a gradient of 1e-8 is rounding, and must not move a weight
        if run.policy.reference is not None:
            train.check_step_zero = lambda *_: None  # which would refuse what comes now
            with torch.no_grad():  # else every token KL is 0
                for p in run.policy.reference.parameters():
                    p.mul_(1.01)
        dist.clip_gradients = clip_and_keep
        for rows in run.plan[:steps]:
            line = train.train_step(run, rows)
            outcome["loss"].append(line["loss"])
            outcome["norm"].append(line["grad_norm"])
        dist.clip_gradients = clip
        outcome["weights"] = {n: whole(p) for n, p in run.policy.model.named_parameters()}
        return outcome | {"eval": train.evaluate(run), "answers": train.answers(run)}


def apart(a: dict, b: dict) -> float:
    """Largest difference of two sets of tensors, each relative to the largest entry of its tensor."""
    assert a.keys() == b.keys()
    return max(np.abs(a[n] - b[n]).max() / max(np.abs(b[n]).max(), 1e-8) for n in a)


def steps_of_all(s_of) -> dict:
    return {name: some_steps(s_of(name)) for name in ALL}


@pytest.fixture(scope="session")
def alone(world) -> dict:
    """Every objective's five steps in one process without a process group."""
    return ranks(0, steps_of_all, lambda name: settings(world, objective=name))[0]


@pytest.mark.parametrize("count, more", [(1, {}), (2, {"gradient_checkpointing": True}), (4, {"mesh": "2x2"}), (4, {})])
def test_ranks_follow_one_trajectory(world, alone, count, more):
    """1, 2, 4 ranks, hybrid too: losses, all gradients, weights, evaluation and samples of one process, to fp32 rounding.

    A response's log-prob is a sum near −40 nats, whose last place in fp32 is 4e-6: no loss can be known better.
    """
    for one_rank in ranks(count, steps_of_all, lambda name: settings(world, objective=name, **more)):
        for name, one in alone.items():
            many = one_rank[name]
            assert many["loss"] == pytest.approx(one["loss"], abs=4e-6), name
            assert many["norm"] == pytest.approx(one["norm"], rel=2e-6), name
            assert apart(many["grad"], one["grad"]) < 3e-6, name
            assert apart(many["weights"], one["weights"]) < 1e-6, name
            assert many["eval"] == pytest.approx(one["eval"], rel=1e-5, abs=1e-6), name
            assert many["answers"] == one["answers"]


def test_rows_arrive_once_or_not_at_all():
    """Row i has the value i, computed on rank i mod 2; a row left out, and a row of two ranks, are errors on every rank."""

    def gather(left_out: int, doubled: int):
        mine = [i for i in range(5) if (i % 2 == dist.rank() or i == doubled) and i != left_out]
        try:
            return dist.gather_rows(torch.tensor(mine), torch.tensor([[float(i), -float(i)] for i in mine]), 5).tolist()
        except RuntimeError as error:
            return str(error)

    assert ranks(2, gather, -1, -1) == [[[i, -i] for i in range(5)]] * 2
    assert ranks(2, gather, 3, -1) == ["1 of 5 rows were not scored exactly once"] * 2
    assert ranks(2, gather, -1, 2) == ["1 of 5 rows were not scored exactly once"] * 2
    assert ranks(0, gather, 2, -1) == ["3 of 5 rows were not scored exactly once"]  # 1 and 3 are nobody's, 2 is left out


def test_bf16_within_its_bound(world):
    """bf16 has 8 bits of mantissa: losses near 1 within 2⁻⁵ of fp32; gradients, reduced in fp32, point the same way."""
    fp32 = ranks(0, lambda: some_steps(settings(world), 1))[0]
    for bf16 in ranks(2, lambda: some_steps(settings(world, dtype="bf16"), 1)):
        assert bf16["loss"] == pytest.approx(fp32["loss"], abs=2**-5)
        ours, theirs = (np.concatenate([x["grad"][n].ravel() for n in x["grad"]]) for x in (bf16, fp32))
        assert ours.dtype == np.float32
        assert ours @ theirs / np.linalg.norm(ours) / np.linalg.norm(theirs) > 0.99


def first_step(s: train.Settings) -> tuple:
    run = train.prepare(s)
    before = train.evaluate(run)
    line = train.train_step(run, run.plan[0])  # whose check of step 0 has the bound 0
    return line["loss"], line["reward_margin"], line["reward_accuracy"], before["eval_drift"]


@pytest.mark.parametrize("count, mesh, objective", [(2, None, "0.5*ld_dpo + 0.5*tdpo2"), (4, "2x2", "dpo")])
def test_step_one_is_exact_on_every_rank(world, tmp_path, count, mesh, objective):
    """In bf16 too: gathering weights and adding zeros round nothing. The loss is log 2, rewards and drift are 0."""
    s = settings(world, objective=objective, dtype="bf16", mesh=mesh, out=str(tmp_path / "o"), cache=str(tmp_path / "c"))
    for loss, *others in ranks(count, first_step, s):
        assert loss == pytest.approx(math.log(2), abs=1e-7) and others == [0, 0.5, 0]


def answered(s: train.Settings) -> list[str]:
    policy, tokenizer = loaded(s), data.load_tokenizer(s.model)
    policy.use_layout("padded")
    tokens = 2 + 5 * dist.rank()
    return policy.run_unsharded(completions, tokenizer, [[4, 5]], tokens, together=dist.world_size() > 1)[0][0].split()


def test_ranks_that_stop_at_different_tokens_wait_for_each_other(world):
    """Two ranks of a cut model, of which one wants 2 tokens and the other 7: what they say is what one process says."""
    short, long = ranks(2, answered, settings(world))
    assert ranks(0, answered, settings(world)) == [short] and len(long) > len(short) and long[: len(short)] == short


def test_torchrun_gives_each_rank_its_own_gpu(monkeypatch):
    """A GPU by number would be the same one for all ranks; without torchrun it is what was asked for."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert dist.setup("cuda:1") == torch.device("cuda", 1)
    for name in ("RANK", "MASTER_ADDR"):
        monkeypatch.setenv(name, "0")
    with pytest.raises(data.UserError, match="device is 'cuda:1'; torchrun gives each rank a GPU of its own"):
        dist.setup("cuda:1")


@pytest.mark.parametrize("error", [NotImplementedError("no flock"), OSError(37, "No locks available")])
def test_a_folder_that_cannot_be_locked_is_a_warning(tmp_path, monkeypatch, capsys, error):
    def acquire(lock):
        raise error

    monkeypatch.setattr(dist.FileLock, "acquire", acquire)
    dist.own(tmp_path)
    assert f"warning: {tmp_path} cannot be locked" in capsys.readouterr().err


def joined(variables: dict) -> str:
    """What setup says of an environment with these variables of a launcher and no others."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK"):
        os.environ.pop(name, None)
    os.environ.update(variables)
    dist.ANSWER_WITHIN, dist.SAID_AFTER = timedelta(seconds=4), 1.0
    try:
        return str(dist.setup("cpu"))
    except data.UserError as error:
        return f"error: {error}"


@pytest.mark.parametrize("variables, said", [
    ("WORLD_SIZE=2", "cpu"),
    ("MASTER_ADDR=localhost", "cpu"),
    ("RANK=0", "the environment says RANK=0 WORLD_SIZE= MASTER_ADDR= MASTER_PORT=; start with torchrun, or, where no launcher"),
    ("RANK=0 MASTER_ADDR=localhost", "WORLD_SIZE expected, but not set: the environment says"),
    ("RANK=0 MASTER_ADDR=localhost WORLD_SIZE=2", "MASTER_PORT expected, but not set"),
    ("RANK=x MASTER_ADDR=localhost WORLD_SIZE=2 MASTER_PORT=PORT", "'x'"),
    ("RANK=0 MASTER_ADDR=localhost WORLD_SIZE=2 MASTER_PORT=PORT", "1/2 clients joined"),
])  # fmt: skip
def test_variables_that_a_launcher_left(variables, said, capfd):
    """One message that names them. A partner that never comes is named after 1 s here, and given up after 4."""
    given = dict(word.split("=") for word in variables.replace("PORT=PORT", f"PORT={port()}").split())
    (found,) = ranks(0, joined, given)
    assert found.startswith("cpu" if said == "cpu" else "error: ") and said in found
    waited = "waiting for the other ranks: the environment says RANK=0 WORLD_SIZE=2 MASTER_ADDR=localhost"
    assert capfd.readouterr().err.count(waited) == ("clients" in said)


def test_a_rank_whose_partner_is_gone_says_so(monkeypatch, capsys):
    """Gloo's own words; and any other error has its trace."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    monkeypatch.setattr(os, "_exit", lambda code: None)
    for error, lines in (
        (RuntimeError("[…/pair.cc:547] Connection closed by peer [::1]:26\nmore"), 1),
        (ValueError("peer"), 2),
    ):
        try:
            raise error
        except (RuntimeError, ValueError) as raised:
            dist._leave(type(raised), raised, None if lines == 2 else raised.__traceback__)
        said = capsys.readouterr().err
        assert ("another rank is gone" in said) == (lines == 1) == (len(said.splitlines()) == 1 and "ValueError" not in said)


def test_rank_0_alone(world):
    """What on_rank_0 calls sees one process, also when it fails; afterwards all are there again."""

    def count():
        try:
            dist.on_rank_0(lambda: 1 // 0)
        except ZeroDivisionError:
            return dist.on_rank_0(dist.world_size), dist.world_size()

    assert ranks(2, count) == [(1, 2)] * 2


# ---- loading and export ----------------------------------------------------------------------------------------------


def logits(folder: Path) -> np.ndarray:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    return model(torch.arange(5, 45)[None] % 40).logits.detach().numpy()


def names_in(folder: Path) -> set[str]:
    """Names of all tensors in a folder's safetensors files."""
    return {name for file in folder.glob("*.safetensors") for name in load_file(file)}


def exported(s: train.Settings, out: Path) -> tuple:
    dist.FILE_LIMIT = "20kB"
    policy = loaded(s)
    policy.use_layout("padded")
    dist.export(policy.model, data.load_tokenizer(s.model), out, torch.float32, "# card\n")
    with torch.no_grad():
        ours = policy.run_unsharded(lambda model: model(torch.arange(5, 45)[None] % 40).logits)
    tied = policy.model.get_input_embeddings().weight is policy.model.get_output_embeddings().weight
    return ours.numpy().copy(), tied


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("count", [0, 2])
def test_loading_and_export(world, tmp_path, family, count):
    """Read by rank 0 and handed out, a model gives from_pretrained's logits, rotary buffers and all; written again in several
    files it is the same model, under the names of the file it came from, a tied head in none."""
    given, out = world / family, tmp_path / "out"
    for ours, tied in ranks(count, exported, settings(world, model=str(given)), out):
        np.testing.assert_allclose(ours, logits(given), atol=2e-6)
        assert tied == (family in ("tied", "capped"))
    np.testing.assert_array_equal(logits(out), logits(given))
    assert names_in(out) == names_in(given)
    assert ("lm_head.weight" in names_in(out)) == (family not in ("tied", "capped"))
    files = sorted(out.glob("*.safetensors"))
    assert len(files) > 2 and all(f.stat().st_size < 40_000 for f in files)
    assert (out / "README.md").read_text() == "# card\n"
    assert (out / "tokenizer.json").exists() and (out / "chat_template.jinja").exists()


def test_experts_have_the_names_of_the_hub(world):
    """What the names above are compared with: not those of transformers' fused parameters."""
    assert "model.layers.0.block_sparse_moe.experts.0.w1.weight" in names_in(world / "mixtral")
    assert "model.layers.0.mlp.experts.0.gate_proj.weight" in names_in(world / "qwen3_moe")


def two_steps(s: train.Settings) -> dict:
    return some_steps(s, 2)


@pytest.mark.parametrize("family", ["mixtral", "two matrices"])
def test_ranks_train_what_one_process_trains(world, family):
    """Two steps with fused experts, and with a head that its config calls tied: losses and weights, to fp32 rounding."""
    s = settings(world, model=str(world / family))
    one = ranks(0, two_steps, s)[0]
    for many in ranks(2, two_steps, s):
        assert many["loss"] == pytest.approx(one["loss"], abs=4e-6)
        assert apart(many["grad"], one["grad"]) < 3e-6
        assert apart(many["weights"], one["weights"]) < 1e-6


def test_an_export_keeps_what_else_is_in_its_folder(world, tmp_path):
    """A run that was killed after its export goes on into the folder that is there."""
    (tmp_path / "model").mkdir()
    (tmp_path / "model/mine.txt").write_text("mine")
    (tmp_path / "model/config.json").write_text("{}")
    ranks(0, exported, settings(world), tmp_path / "model")
    np.testing.assert_array_equal(logits(tmp_path / "model"), logits(world / "tied"))
    assert (tmp_path / "model/mine.txt").read_text() == "mine" and [p.name for p in tmp_path.iterdir()] == ["model"]


def modes(s: train.Settings, out: Path) -> set[int]:
    os.umask(0o027)
    exported(s, out)
    return {path.stat().st_mode & 0o777 for path in out.iterdir()}


def test_exported_files_have_the_mode_of_the_umask(world, tmp_path):
    assert ranks(0, modes, settings(world), tmp_path / "out") == [{0o640}]


def test_a_model_card_is_no_markup_and_names_no_folder(tmp_path, monkeypatch):
    """One block of JSON that no value ends, whatever is in it; of paths the last part, hub names whole."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "secret").mkdir()
    (tmp_path / "secret/model").mkdir()
    evil = "a | b\n```\n<img src=x> [x](http://x) `y` \x1b[31m"
    given = dict(
        model="secret/model", dataset="/secret/x|y.jsonl[:10], ~/secret/z.jsonl@2, org/data:train@0.5", cache="~/secret"
    )
    given |= dict(eval_dataset=None, out="secret/out", objective="simpo(beta=2.0)", columns=evil, lr=1e-6)
    card = dist.model_card(given, {"loss": 0.123456, evil: 1})
    assert "secret" not in card and "\x1b" not in card
    head, block = card.split("```json\n")
    assert head == "---\nlibrary_name: transformers\n---\n\n# Trained with plainpo\n\n"
    content, *after = re.split(r"^ *```", block, flags=re.MULTILINE)
    sources = dict(model="model", dataset="x|y.jsonl[:10], z.jsonl@2, org/data:train@0.5", eval_dataset=None)
    settings = sources | dict(objective="simpo(beta=2.0)", columns=evil, lr=1e-6)
    assert json.loads(content) == {"measured": {"loss": 0.123456, evil: 1}, "settings": settings} and after == ["\n"]


REMOTE = """
from transformers import LlamaForCausalLM, LlamaModel
class DoubledModel(LlamaModel):
    def forward(self, *args, **kwargs):
        out = super().forward(*args, **kwargs)
        out.last_hidden_state = 2 * out.last_hidden_state
        return out
class Doubled(LlamaForCausalLM):
    def __init__(self, config):
        super().__init__(config)
        self.model = DoubledModel(config)
        self.post_init()
"""


def logits_of(s: train.Settings) -> np.ndarray:
    policy = loaded(s)
    policy.use_layout("padded")
    with torch.no_grad():
        return policy.run_unsharded(lambda model: model(torch.arange(5, 45)[None] % 40).logits).numpy().copy()


def test_a_model_with_code_of_its_own(world, tmp_path, monkeypatch):
    """Its class is in its folder: ranks find it as one process does."""
    monkeypatch.setattr(sys.modules["transformers.dynamic_module_utils"], "HF_MODULES_CACHE", str(tmp_path / "cache"))
    shutil.copytree(world / "tied", tmp_path / "m")
    (tmp_path / "m/modeling_doubled.py").write_text(REMOTE)
    config = json.loads((tmp_path / "m/config.json").read_text())
    config["auto_map"] = {"AutoModelForCausalLM": "modeling_doubled.Doubled"}
    (tmp_path / "m/config.json").write_text(json.dumps(config))
    s = settings(world, model=str(tmp_path / "m"), trust_remote_code=True)
    for count in (0, 2):
        for ours in ranks(count, logits_of, s):
            np.testing.assert_allclose(ours, 2 * logits(world / "tied"), atol=4e-6)


def test_no_loader_runs_code_that_was_not_asked_for(world, tmp_path, monkeypatch):
    """A model folder and a checkpoint with code of their own: refused, and nobody is asked, whose answer would be yes."""
    shutil.copytree(world / "tied", tmp_path / "m")
    (tmp_path / "m/modeling_own.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n{REMOTE}")
    ranks(0, trained, settings(world, out=str(tmp_path / "o"), save_every=1, max_steps=1))
    checkpoint = tmp_path / "o/checkpoints/step-000001"
    shutil.copy(tmp_path / "m/modeling_own.py", checkpoint)
    for file in (tmp_path / "m/config.json", checkpoint / "config.json"):
        own = {
            "model_type": "own",
            "auto_map": {"AutoConfig": "modeling_own.C", "AutoModelForCausalLM": "modeling_own.Doubled"},
        }
        file.write_text(json.dumps(json.loads(file.read_text()) | own))
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    monkeypatch.setattr(dist, "validate", lambda _: None)  # of a checkpoint that somebody else has made
    with pytest.raises(data.UserError, match="contains custom code"):
        loaded(settings(world, model=str(tmp_path / "m")))
    with pytest.raises(data.UserError, match="contains custom code"):
        dist.export_checkpoint(dist.Export(checkpoint, tmp_path / "e"))
    assert not (tmp_path / "ran").exists()


def layout_of(s: train.Settings) -> tuple[str, int]:
    """The layout in which a model is trained, of rows beyond a window of 8, and how many blocks it has then."""
    rows = {}
    train.survey([data.Example([4, 5, 6] * 4, [[7, 8] * 4, [9] * 5]), data.Example([5], [[6], [7]])], rows)
    try:
        policy = train.build_policy(s, train.parse_objective(s.objective), torch.device("cpu"), rows)
    except data.UserError as error:
        return str(error), 0
    return policy.layout, len(dist.decoder_blocks(policy.model))


SMALL = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=5, num_attention_heads=4, num_key_value_heads=2)
LAYOUTS = {  # configuration → what several ranks say of it, in bf16, that see few of its blocks
    "llama": (LlamaConfig(**SMALL), "packed", 5),
    "falcon-h1": (FalconH1Config(**SMALL, mamba_d_ssm=32, mamba_n_heads=4, mamba_d_head=8, mamba_d_state=8), "padded", 5),
    "gpt-neo": (GPTNeoConfig(hidden_size=32, num_layers=4, num_heads=4, window_size=8,
                             attention_types=[[["global", "local"], 2]]), "padded", 4),
    "gpt-2": (GPT2Config(n_embd=32, n_layer=3, n_head=4, n_positions=12), "GPT2LMHeadModel cannot read , 20 tokens", 0),
}  # fmt: skip


@pytest.mark.parametrize("name", LAYOUTS)
def test_ranks_agree_on_the_layout_before_they_shard(world, tmp_path, name):
    config, layout, blocks = LAYOUTS[name]
    config.update(dict(vocab_size=len(toy.word_tokenizer()), initializer_range=0.2, eos_token_id=3, pad_token_id=3))
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "m")
    toy.word_tokenizer().save_pretrained(tmp_path / "m")
    s = settings(world, model=str(tmp_path / "m"), dtype="bf16")
    for said, left in ranks(2, layout_of, s):
        assert said.startswith(layout) and left == blocks


def dtypes(s: train.Settings) -> tuple:
    model = loaded(s).model
    return model.config.dtype, {p.dtype for p in model.parameters()}


def test_a_model_keeps_the_dtype_it_came_in(world, tmp_path):
    """A bf16 folder is trained in fp32, and exported as it came by one process and by several."""
    shutil.copytree(world / "tied", tmp_path / "m")
    AutoModelForCausalLM.from_pretrained(world / "tied", dtype=torch.bfloat16).save_pretrained(tmp_path / "m")
    for count in (0, 2):
        for kept in ranks(count, dtypes, settings(world, model=str(tmp_path / "m"))):
            assert kept == (torch.bfloat16, {torch.float32})


def refused(several: list[train.Settings]) -> list[str]:
    said = []
    for s in several:
        try:
            loaded(s)
            said.append("accepted")
        except Exception as error:
            said.append(f"{type(error).__name__}: {error}")
    return said


def test_unfit_weights_are_named(world, tmp_path):
    """A weight too few, one too many, one of another shape, other numbers of layers, .bin weights only; fused experts too."""
    expected = {}

    def case(said: str, given: str = "tied", weights: dict | None = None, **config) -> Path:
        folder = tmp_path / str(len(expected))
        shutil.copytree(world / given, folder)
        changed = load_file(folder / "model.safetensors") | (weights or {})
        kept = {name: tensor for name, tensor in changed.items() if tensor is not None}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        there = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(there | config))
        expected[folder] = said
        return folder

    name = "model.layers.1.mlp.up_proj.weight"
    case(f"1 weights are missing: {name}", weights={name: None})
    case("1 weights are unexpected: extra.weight", weights={"extra.weight": torch.ones(2)})
    shapes = "is (3, 3), the model has (70, 36)"
    case(f"1 weights are of another shape: {name} {shapes}", weights={name: torch.ones(3, 3)})
    case("18 weights are missing: model.layers.3.", num_hidden_layers=5)  # 9 weights a layer, of which the file has 3
    case("18 weights are unexpected: model.layers.1.", num_hidden_layers=1)
    router = "model.layers.0.mlp.gate.weight"
    case(f"1 weights are missing: {router}", "mixtral", {router.replace("mlp", "block_sparse_moe"): None})
    expert = "model.layers.0.block_sparse_moe.experts.1.w1.weight"
    case("no loadable causal language model", "mixtral", {expert: None})  # transformers' report names it
    for kind in ("bin", "safetensors.index"):
        folder = case("convert them to safetensors")
        (folder / "model.safetensors").rename(folder / f"pytorch_model.{kind}")
    os.truncate(case("no loadable causal language model") / "model.safetensors", 9000)
    for content in (b"", b"Dear diary, " * 500):
        (case("no loadable causal language model") / "model.safetensors").write_bytes(content)
    several = [settings(world, model=str(folder)) for folder in expected]
    for count in (0, 2):
        for messages in ranks(count, refused, several):
            for message, said in zip(messages, expected.values(), strict=True):
                assert message.startswith("UserError") and said in message


def test_one_message_of_all_ranks(world, tmp_path, capfd):
    """A model that only rank 0 reads: both ranks end, rank 0 with its message and code 2, before torchrun ends the other."""
    shutil.copytree(world / "tied", tmp_path / "m")
    (tmp_path / "m/model.safetensors").unlink()
    argv = options(settings(world, model=str(tmp_path / "m"), out=str(tmp_path / "o")))
    context = multiprocessing.get_context("fork")
    queue, at = context.SimpleQueue(), port()
    children = [context.Process(target=rank_of, args=(i, 2, at, queue, train.main, (argv,))) for i in range(2)]
    capfd.readouterr()
    for child in children:
        child.start()
    children[0].join(60)
    children[1].terminate()
    children[1].join(60)
    said = capfd.readouterr().err
    assert children[0].exitcode == 2 and children[1].exitcode == -signal.SIGTERM
    assert said.count("error") == 1 and "convert them to safetensors" in said


def memory_while_loading(s: train.Settings) -> tuple[int, int]:
    """(bytes that torch's CPU allocator had given out at most from building to loaded, bytes of this rank's parameters)"""
    with allocated() as most:
        policy = loaded(s)
    return most[0], sum(p.to_local().nbytes for p in policy.parameters())


@pytest.mark.parametrize("objective", ["simpo", "tdpo2"])
def test_memory_of_loading(world, tmp_path, objective):
    """2 ranks: rank 0 holds the whole model once, also where a reference is loaded too; beside that and its own shards one
    tensor. The other never holds the whole (what gloo's threads free is not seen, so its bound is no closer)."""
    sizes = dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=8, num_attention_heads=4, vocab_size=2000)
    model = AutoModelForCausalLM.from_config(LlamaConfig(**sizes))
    model.save_pretrained(tmp_path)
    data.load_tokenizer(str(world / "tied")).save_pretrained(tmp_path)
    whole = 4 * model.num_parameters()
    tensor = 4 * 2000 * 256
    first, second = ranks(2, memory_while_loading, settings(world, model=str(tmp_path), objective=objective))
    assert first[1] == second[1] == whole / 2 * (2 if objective == "tdpo2" else 1)
    assert whole + first[1] < first[0] < whole + first[1] + 2 * tensor
    assert second[1] < second[0] < second[1] + whole


def test_others_wait_for_rank_0_longer_than_for_each_other(monkeypatch):
    """Rank 0 takes 3 s, and 1 s is what ranks have in a step."""
    monkeypatch.setattr(dist, "ANSWER_WITHIN", timedelta(seconds=1))
    assert ranks(2, dist.on_rank_0, lambda: time.sleep(3) or 5) == [5, 5]


# ---- checkpoints -----------------------------------------------------------------------------------------------------


def trained(s: train.Settings) -> dict:
    """train.train in this process: (metrics without times, exported weights), or how it ended."""
    train.draw_curves = lambda *_: None  # seconds that no test here looks at
    try:
        train.train(s)
    except SystemExit as end:
        return {"exit": end.code}
    except Exception as error:
        return {"error": f"{type(error).__name__}: {error}"}
    return record(Path(s.out))


def all_trained(several: list[train.Settings]) -> list[dict]:
    return [trained(s) for s in several]


def record(out: Path) -> dict:
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    kept = [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second", "peak_memory_gib")} for line in lines]
    return {"lines": kept, "weights": {k: v.numpy() for k, v in load_file(out / "model/model.safetensors").items()}}


def same(a: dict, b: dict) -> bool:
    return a["lines"] == b["lines"] and all(np.array_equal(a["weights"][n], b["weights"][n]) for n in b["weights"])


def disagreeing(s: train.Settings, changed: dict) -> dict:
    """`trained`, with other settings on rank 1."""
    return trained(replace(s, **changed) if dist.rank() == 1 else s)


@pytest.mark.parametrize("name, value", [("lr", 2e-4), ("max_steps", 4), ("eval_every", 2), ("dataset", "other/pairs.jsonl")])
def test_ranks_that_were_started_differently(world, tmp_path, name, value):
    """Before the first step, by name, on all ranks; a file is compared by its rows, as it may lie elsewhere on each machine."""
    (tmp_path / "other").mkdir()
    lines = (world / "pairs.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "other" / "pairs.jsonl").write_text("".join([lines[1], lines[0], *lines[2:]]))
    changed = {name: str(tmp_path / value) if name == "dataset" else value}
    for end in ranks(2, disagreeing, settings(world, out=str(tmp_path / "o")), changed):
        what = r"training rows \(hash\)" if name == "dataset" else name
        there = ".*" if name == "dataset" else value
        assert re.match(rf"UserError: rank 1 was not started like rank 0: .*{what} is .* here and {there} there", end["error"])
    assert not (tmp_path / "o" / "metrics.jsonl").exists()


@pytest.fixture(scope="session")
def uninterrupted(world, tmp_path_factory) -> dict:
    runs = {}
    for layout, count in (("packed", 0), ("padded", 0), ("packed", 2)):
        s = settings(world, out=str(tmp_path_factory.mktemp("run") / "o"), layout=layout)
        runs[layout, count] = ranks(count, trained, s)[0]
    return runs


def stopped_after(s: train.Settings, step: int) -> dict:
    """A run that is killed without warning when it has finished `step`."""
    train_step = train.train_step

    def counted(run, rows):
        if run.step == step:
            raise KeyboardInterrupt
        return train_step(run, rows)

    train.train_step = counted
    try:
        train.train(s)
    except KeyboardInterrupt:
        return {}
    finally:
        train.train_step = train_step


@pytest.mark.parametrize("layout, count", [("packed", 0), ("padded", 0), ("packed", 2)])
def test_resume_is_exact(world, uninterrupted, tmp_path, layout, count):
    """Stopped after step 3 with a checkpoint of step 2: the same losses, metrics and weights to the last bit."""
    s = settings(world, out=str(tmp_path / "o"), layout=layout, save_every=2)
    ranks(count, stopped_after, s, 3)
    assert [p.name for p in dist.complete_checkpoints(tmp_path / "o/checkpoints")] == ["step-000002"]
    for resumed in ranks(count, trained, settings(world, out=s.out, layout=layout, save_every=2, resume=True)):
        assert same(resumed, uninterrupted[layout, count])


def test_resume_on_other_numbers_of_ranks(world, uninterrupted, tmp_path):
    """2 → 1 → 4 ranks. Each step rounds anew in fp32, so metrics agree to 1e-4 and weights to 1e-5."""
    s = settings(world, out=str(tmp_path / "o"), save_every=1)
    ranks(2, stopped_after, s, 2)
    s.resume = True
    ranks(0, stopped_after, s, 4)
    assert [p.name for p in dist.complete_checkpoints(tmp_path / "o/checkpoints")] == ["step-000003", "step-000004"]
    one = uninterrupted["packed", 0]
    for resumed in ranks(4, trained, s):
        for a, b in zip(resumed["lines"], one["lines"], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
        assert apart(resumed["weights"], one["weights"]) < 1e-5


def test_evaluations_and_samples_of_a_resumed_run_on_two_ranks(world, tmp_path):
    """Sharded over two ranks and stopped, with evaluations and samples in between, against one process."""
    more = dict(eval_every=2, save_every=3)
    one = ranks(0, trained, settings(world, out=str(tmp_path / "a"), **more))[0]
    s = settings(world, out=str(tmp_path / "b"), **more)
    ranks(2, stopped_after, s, 4)
    s.resume = True
    for resumed in ranks(2, trained, s):
        for a, b in zip(resumed["lines"], one["lines"], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
        assert apart(resumed["weights"], one["weights"]) < 1e-5
    samples = [(tmp_path / folder / "samples.jsonl").read_text() for folder in "ab"]
    assert samples[0] == samples[1] and '{"step": 2, ' in samples[0]


def replayed(s: lorr.Settings) -> dict:
    lorr.train_lorr(s)
    return record(Path(s.out))


def test_replay_and_reset_on_two_ranks(world, tmp_path):
    """LoRR sharded over two ranks against one process."""
    several = []
    for folder in "ab":
        plain = settings(world, out=str(tmp_path / folder), eval_every=2)
        several.append(lorr.Settings(**vars(plain), replays=2, reset_alpha=0.5, sft_weight=0.5))
    (one,) = ranks(0, replayed, several[0])
    for two in ranks(2, replayed, several[1]):
        for a, b in zip(two["lines"], one["lines"], strict=True):
            assert a == pytest.approx(b, rel=1e-4, abs=1e-5)
        assert apart(two["weights"], one["weights"]) < 1e-5


def test_damaged_checkpoints_are_skipped(world, uninterrupted, tmp_path, capfd):
    """Half-written, truncated and corrupted ones are passed over, newest first, each with its reason."""
    s = settings(world, out=str(tmp_path / "o"), save_every=1, keep=9)
    ranks(0, trained, s)
    five, four, three, two = (tmp_path / f"o/checkpoints/step-00000{n}" for n in (5, 4, 3, 2))
    (five / "complete").unlink()
    shard = next(four.glob("*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 1)
    shard = next(three.glob("*.safetensors"))
    content = bytearray(shard.read_bytes())
    content[-100] ^= 1
    shard.write_bytes(content)
    (two / "step.json").unlink()
    one, more = tmp_path / "o/checkpoints/step-000001", [tmp_path / f"o/checkpoints/step-00001{n}" for n in range(5)]
    for folder, marker in zip(more, ("[]", '{"step.json": 1}', "null", "\udcff", None)):
        shutil.copytree(one, folder)
        if marker is not None:
            (folder / "complete").write_bytes(marker.encode(errors="surrogateescape"))
    shutil.copy(next(one.glob("*.safetensors")), more[4] / "other.safetensors")
    (one / "notes").mkdir()  # neither is a reason to distrust what is whole
    (one / "link").symlink_to("nowhere")
    shutil.copytree(five, tmp_path / "o/checkpoints/step-000009.part")
    (tmp_path / "o/checkpoints/step-notes").mkdir()
    (tmp_path / "o/summary.json").unlink()
    s.resume = True
    capfd.readouterr()
    resumed = ranks(0, trained, s)[0]
    said = capfd.readouterr().err
    reasons = [(five, "it was not finished"), (two, "step.json is missing: [bytes, CRC-32] are None")]
    reasons += [(folder, "safetensors is damaged: [bytes, CRC-32] are [") for folder in (four, three)]
    reasons += [(folder, "its marker is damaged") for folder in more[:4]]
    reasons += [(more[4], ", the marker says None")]
    for folder, reason in reasons:
        assert any(f"skipped {folder}" in line and reason in line for line in said.splitlines()), reason
    assert "resumed after step 1" in said and same(resumed, uninterrupted["packed", 0])


def test_a_half_deleted_checkpoint_goes_with_the_next(world, tmp_path):
    """What a kill left of an old checkpoint, its marker gone, is deleted when a new one is written."""
    s = settings(world, out=str(tmp_path / "o"), save_every=1)
    ranks(0, stopped_after, s, 3)
    left = tmp_path / "o/checkpoints/step-000001"
    left.mkdir()
    (left / "config.json").write_text("{}")
    s.resume = True
    ranks(0, trained, s)
    assert sorted(p.name for p in left.parent.iterdir()) == ["step-000004", "step-000005"]


@pytest.mark.parametrize("keep, left", [(1, [6]), (2, [2, 6]), (9, [2, 6])])
def test_damaged_checkpoints_do_not_count_when_old_ones_are_deleted(tmp_path, keep, left):
    """Steps 2 and 6 are whole; 4 is cut, 5 has no marker, and 10, of which a bit is flipped, is why the run went on from 2."""

    def lay(name: str) -> dict:
        (tmp_path / name).mkdir()
        (tmp_path / name / "step.json").write_text('{"step": 6}')
        (tmp_path / name / "weights.safetensors").write_bytes(b"12345678")
        return dist._checksums(tmp_path / name)

    for name in ("step-000002", "step-000004", "step-000005", "step-000010"):
        (tmp_path / name / "complete").write_text(json.dumps(lay(name)))
    os.truncate(tmp_path / "step-000004/weights.safetensors", 7)
    (tmp_path / "step-000005/complete").unlink()
    (tmp_path / "step-000010/weights.safetensors").write_bytes(b"12345679")
    dist._commit(tmp_path / "new.part", tmp_path / "step-000006", lay("new.part"), keep)
    assert sorted(p.name for p in tmp_path.iterdir()) == [f"step-{step:06d}" for step in left]
    assert dist.validate(tmp_path / "step-000006") is None


def test_every_damage_of_kept_numbers_is_found(tmp_path, capsys):
    """Each byte flipped, each length cut to: what was kept, or nothing and a line that says so; of no file, no line."""
    file = tmp_path / "reference.safetensors"
    kept = {"ref": torch.tensor([[1.0, -2.5]]), "b": torch.tensor(3, dtype=torch.bfloat16)}
    assert dist.load_tensors(file) is None and not capsys.readouterr().err
    dist.save_tensors(kept, file)
    whole = file.read_bytes()
    damaged = [whole[:i] + bytes([whole[i] ^ 1]) + whole[i + 1 :] for i in range(len(whole))] + [
        whole[:n] for n in range(len(whole))
    ]
    found = 0
    for content in (*damaged, whole):
        file.write_bytes(content)
        read = dist.load_tensors(file)
        said = capsys.readouterr().err
        assert (said == f"{file} is damaged and made again\n") if read is None else not said
        if read is not None:
            assert read.keys() == kept.keys() and all(torch.equal(read[name], kept[name]) for name in kept)
            found += 1
    assert found < 5 and read is not None
    save_file(kept, file)  # as an older version did
    assert dist.load_tensors(file) is None and "damaged" in capsys.readouterr().err


def test_a_weight_without_gradient_is_saved_and_read_again(world, tmp_path):
    """AdamW makes no moments for it; a checkpoint holds zeros. The rest had gradient 1: moments 1 − β = 0.1, 0.001."""
    s = settings(world)
    policy = loaded(s)
    optimizer = torch.optim.AdamW(policy.parameters(), lr=0.0)
    first, *others = policy.model.parameters()
    for p in others:
        p.grad = torch.ones_like(p)
    optimizer.step()
    tokenizer = data.load_tokenizer(s.model)
    assert dist.save_checkpoint(tmp_path, policy.model, optimizer, {"step": 1, "run": {}}, 1, tokenizer)
    again = torch.optim.AdamW(policy.parameters(), lr=0.0)
    dist.load_checkpoint(tmp_path / "step-000001", policy.model, again, {})
    for p in (first, *others):
        assert again.state[p]["step"] == 1
        assert torch.allclose(again.state[p]["exp_avg"], torch.tensor(0.0 if p is first else 0.1))
        assert torch.allclose(again.state[p]["exp_avg_sq"], torch.tensor(0.0 if p is first else 0.001))


def test_another_run_is_refused_by_name(world, tmp_path):
    s = settings(world, out=str(tmp_path / "o"), save_every=2, max_steps=2)
    ranks(0, trained, s)
    (tmp_path / "o/summary.json").unlink()
    expected = (
        (dict(objective="ipo"), "objective is 'ipo(tau=0.1, average=True)' here and 'simpo(beta=2.0, gamma=1.0, "),
        (dict(model=str(world / "two matrices")), "model is 'two matrices' here and 'tied' there"),
        (dict(dataset=str(world / "pairs.jsonl[:40]")), "training rows (hash) is"),
        (dict(dtype="bf16"), "dtype is 'bf16' here and 'fp32' there"),
        (dict(layout="padded"), "layout is 'padded' here and 'packed' there"),
        (dict(tokens_per_microbatch=90), "tokens_per_microbatch is 90 here and 120 there"),
    )
    several = [settings(world, **{**vars(s), "resume": True, **changed}) for changed, _ in expected]
    for (_, said), end in zip(expected, ranks(0, all_trained, several)[0], strict=True):
        message = end["error"]
        assert message.startswith("UserError") and said in message


def test_full_disk_keeps_the_last_good_checkpoint(world, uninterrupted, tmp_path, capfd):
    """From step 3 on no file may exceed 10 kB (RLIMIT_FSIZE, as a full disk): the run goes on, step 2 stays, and resumes."""
    s = settings(world, out=str(tmp_path / "o"), save_every=1, keep=1)

    def squeezed():
        save, limits = dist.save_checkpoint, resource.getrlimit(resource.RLIMIT_FSIZE)

        def save_with_limit(folder, model, optimizer, state, *more):
            resource.setrlimit(resource.RLIMIT_FSIZE, (10_000 if state["step"] > 2 else limits[0], limits[1]))
            try:
                return save(folder, model, optimizer, state, *more)
            finally:
                resource.setrlimit(resource.RLIMIT_FSIZE, limits)

        dist.save_checkpoint = save_with_limit
        return trained(s)

    for count in (0, 2):
        shutil.rmtree(tmp_path / "o", ignore_errors=True)
        assert same(ranks(count, squeezed)[0], uninterrupted["packed", count])
        assert [p.name for p in (tmp_path / "o/checkpoints").iterdir()] == ["step-000002"]
        assert "step-000003 could not be written" in capfd.readouterr().err
        again = settings(world, **{**vars(s), "resume": True})
        assert same(ranks(count, trained, again)[0], uninterrupted["packed", count])


def test_too_little_space_is_said_before_training(world, tmp_path, monkeypatch, capsys):
    """2³⁰ parameters: 12 GiB a checkpoint and 2 a bf16 export; a file that is there already counts as room."""
    free = [36 * 2**30 - 2]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free[0]))
    (tmp_path / "there").write_text("x")
    model = torch.nn.Linear(2**15, 2**15, bias=False, device="meta")
    with pytest.raises(data.UserError, match="36.0 GiB of free space, but 3 checkpoints .* need 38.0 GiB; make room"):
        dist.check_space(tmp_path, model, 3, torch.bfloat16)
    free[0] = 38 * 2**30 - 1
    dist.check_space(tmp_path, model, 3, torch.bfloat16)
    arguments = [f"--{k}={v}" for k, v in vars(settings(world, out=str(tmp_path / "o"), max_steps=1)).items() if v is not None]
    free[0] = 1_000_000  # enough for the 0.2 MB of the export, not for checkpoints
    with pytest.raises(SystemExit, match="2"):
        train.main([*arguments, "--save_every", "1"])
    assert "make room" in capsys.readouterr().err and [p.name for p in (tmp_path / "o").iterdir()] == [".lock"]
    assert train.main(arguments)["steps"] == 1


@pytest.mark.parametrize("family", ["tied", "mixtral", "two matrices"])
def test_export_of_a_checkpoint(world, tmp_path, family):
    """A checkpoint of 2 ranks, exported by the command line, is the model that the run exported."""
    s = settings(world, model=str(world / family), out=str(tmp_path / "o"), save_every=2, max_steps=2)
    ranks(2, trained, s)
    export = ["export", str(tmp_path / "o/checkpoints/step-000002"), str(tmp_path / "e")]
    dist.main([*export, "--dtype", "fp32"])
    np.testing.assert_array_equal(logits(tmp_path / "e"), logits(tmp_path / "o/model"))
    assert names_in(tmp_path / "e") == names_in(tmp_path / "o/model") == names_in(world / family)
    files, files_of_run = ({path.name for path in folder.iterdir()} for folder in (tmp_path / "e", tmp_path / "o/model"))
    assert files == files_of_run
    assert json.loads((tmp_path / "e/config.json").read_text())["dtype"] == "float32"
    with pytest.raises(SystemExit):
        dist.main(export)


def test_an_export_that_fails_leaves_nothing_behind_and_deletes_nothing(world, tmp_path, capfd):
    """No file may exceed 10 kB (as on a full disk); a file in the way; a folder in which none can be made."""
    s = settings(world, out=str(tmp_path / "o"), save_every=5)
    ranks(0, trained, s)
    checkpoint = str(tmp_path / "o/checkpoints/step-000005")

    def attempt(out: Path) -> int:
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, resource.RLIM_INFINITY))
        with pytest.raises(SystemExit) as stop:
            dist.main(["export", checkpoint, str(out)])
        return stop.value.code

    (tmp_path / "b.part").mkdir()
    (tmp_path / "b.part/mine.txt").write_text("mine")
    for out, said in ((tmp_path / "a", "could not be written"), (tmp_path / "b", "b.part exists already"),
                      (world / "pairs.jsonl/c", "Not a directory"), (Path("/proc/d"), "could not be written")):  # fmt: skip
        capfd.readouterr()
        assert ranks(0, attempt, out) == [2] and said in capfd.readouterr().err
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.part", "o"] and (tmp_path / "b.part/mine.txt").exists()


# ---- signals and accidents, with torchrun ----------------------------------------------------------------------------


def options(s: train.Settings) -> list[str]:
    """What differs from the defaults, as a command line."""
    return [f"--{k}={v}" for k, v in vars(s).items() if v != getattr(train.Settings(), k)]


def torchrun(script: Path, s: train.Settings, processes: int = 2) -> list[str]:
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes), "--master-port", str(port())]
    return [sys.executable, *launcher, str(script), *options(s)]


def started(s: train.Settings) -> multiprocessing.Process:
    """A run as a command line, in a process of its own."""

    def run() -> None:
        torch.set_num_threads(1)
        train.main(options(s))

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    return process


def wait_for_step(out: Path, step: int, seconds: float = 60) -> None:
    until = time.time() + seconds
    while time.time() < until:
        if (out / "metrics.jsonl").exists() and f'"step": {step},' in (out / "metrics.jsonl").read_text():
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} was not reached")


def test_sigterm_saves_and_resumes(world, tmp_path, capfd):
    """SIGTERM: the step is finished, a checkpoint written, and the exit code is the shell's for it."""
    s = settings(world, out=str(tmp_path / "o"), epochs=40, max_steps=200)
    run = started(s)
    wait_for_step(tmp_path / "o", 3)
    run.terminate()
    run.join(60)
    assert run.exitcode == 128 + signal.SIGTERM and "go on with --resume" in capfd.readouterr().err
    (saved,) = dist.complete_checkpoints(tmp_path / "o/checkpoints")
    reached = json.loads((saved / "step.json").read_text())["step"]
    assert 3 <= reached < 200 and json.loads((tmp_path / "o/metrics.jsonl").read_text().splitlines()[-1])["step"] == reached


@pytest.mark.parametrize("number, to", [
    (signal.SIGTERM, "os.getppid()"), pytest.param(signal.SIGINT, "os.getpid()", marks=pytest.mark.slow),
])  # fmt: skip
def test_signals_under_torchrun(world, uninterrupted, tmp_path, number, to):
    """A signal to torchrun, or to one of 2 ranks, during step 3: step 3 is finished and saved, the ranks exit with 0, and
    --resume gives the uninterrupted run to the last bit. torchrun's own exit code is 0 only if no signal came to itself."""
    script = tmp_path / "signalled.py"
    script.write_text(
        f"import os, sys, time; sys.path.insert(0, {str(ROOT)!r})\nimport train, distributed as dist\n"
        "step = train.train_step\n"
        "def signalled(run, rows):\n"
        f"    if run.step == 2 and dist.rank() == 1:\n        os.kill({to}, {int(number)})\n        time.sleep(1)\n"
        "    return step(run, rows)\n"
        "train.train_step = signalled\ntrain.main()\n"
    )
    s = settings(world, out=str(tmp_path / "o"))
    run = subprocess.run(
        torchrun(script, s), capture_output=True, text=True, timeout=60, env={**os.environ, "OMP_NUM_THREADS": "1"}
    )
    assert "stopped after step 3; go on with --resume" in run.stderr
    assert run.returncode == (0 if to == "os.getpid()" else 1) and "exitcode" not in run.stderr
    assert [p.name for p in dist.complete_checkpoints(tmp_path / "o/checkpoints")] == ["step-000003"]
    s.resume = True
    assert same(ranks(2, trained, s)[0], uninterrupted["packed", 2])


def test_a_dead_rank_ends_the_run(world, tmp_path):
    """torchrun, 2 ranks: rank 1 raises in its second step; all is over within seconds and its error comes first."""
    script = tmp_path / "broken.py"
    script.write_text(
        f"import sys; sys.path.insert(0, {str(ROOT)!r})\nimport train, distributed as dist\n"
        "step = train.train_step\n"
        "def broken(run, rows):\n"
        "    if run.step == 1 and dist.rank() == 1:\n        raise ArithmeticError('rank one has had enough')\n"
        "    return step(run, rows)\n"
        "train.train_step = broken\ntrain.main()\n"
    )
    s = settings(world, out=str(tmp_path / "o"))
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    run = subprocess.Popen(torchrun(script, s), stderr=subprocess.PIPE, text=True, env=environment)
    wait_for_step(tmp_path / "o", 1)
    tick = time.time()
    _, said = run.communicate(timeout=60)
    assert run.returncode != 0 and time.time() - tick < 15
    assert re.search(r"^\w*(Error|Exception)\b.*", said, re.MULTILINE)[0] == "ArithmeticError: rank one has had enough"


def kill_and_resume(world, out: Path, delay: float, expected: dict) -> None:
    s = settings(world, out=str(out), save_every=1)
    run = started(s)
    wait_for_step(out, 1)
    time.sleep(delay)
    run.kill()
    run.join(60)
    before = dist.complete_checkpoints(out / "checkpoints")
    s.resume = True
    assert same(ranks(0, trained, s)[0], expected), f"killed after {delay:.3f} s with {[p.name for p in before]}"


def test_kill_nine(world, uninterrupted, tmp_path):
    kill_and_resume(world, tmp_path / "o", 0.05, uninterrupted["packed", 0])


@pytest.mark.slow
def test_kill_nine_at_ten_moments(world, uninterrupted, tmp_path):
    """Checkpoints of every step make most moments fall inside a save."""
    moments = np.random.default_rng(0).uniform(0, 0.6, 10)
    for i, delay in enumerate(moments):
        kill_and_resume(world, tmp_path / str(i), delay, uninterrupted["packed", 0])


def killed_at(s: train.Settings, event: int) -> int:
    """A run that kills itself at the event-th flush, rename or deletion of a folder, all inside saves; how many there were."""
    torch.set_num_threads(1)  # the threads of the process that this one was forked from are not here
    seen = []

    def counted(function):
        def call(*args, **kwargs):
            seen.append(function)
            if len(seen) == event:
                os.kill(os.getpid(), signal.SIGKILL)
            return function(*args, **kwargs)

        return call

    os.fsync, os.rename, shutil.rmtree = map(counted, (os.fsync, os.rename, shutil.rmtree))
    trained(s)
    return len(seen)


@pytest.mark.parametrize("count", [10, pytest.param(None, marks=pytest.mark.slow)])
def test_kill_inside_a_save(world, uninterrupted, tmp_path, count):
    """Ten random moments inside saves, or all of them: the run goes on to the uninterrupted one's weights, bit for bit."""
    events = ranks(0, killed_at, settings(world, out=str(tmp_path / "all"), save_every=1), 0)[0]
    assert events > 60  # 5 checkpoints of 8 files each, and what renames, marks and deletes them
    for event in np.random.default_rng(0).permutation(np.arange(1, events + 1))[:count]:
        s = settings(world, out=str(tmp_path / str(event)), save_every=1)
        child = multiprocessing.get_context("fork").Process(target=killed_at, args=(s, event), daemon=True)
        child.start()
        child.join(60)
        assert child.exitcode == -signal.SIGKILL
        s.resume = True
        assert same(ranks(0, trained, s)[0], uninterrupted["packed", 0]), f"killed at event {event} of {events}"


@pytest.mark.parametrize("arguments, said", [
    (["export", "CHECKPOINT", "OUT", "--dtype", "fp8"], "--dtype: invalid choice: 'fp8' (choose from"),
    (["pack"], "pack is no command; there are export"),
])  # fmt: skip
def test_commands_that_cannot_be_meant(capsys, arguments, said):
    with pytest.raises(SystemExit, match="2"):
        dist.main(arguments)
    assert said in capsys.readouterr().err


def test_help_names_the_command(capsys):
    with pytest.raises(SystemExit, match="0"):
        dist.main(["--help"])
    assert "distributed.py export" in capsys.readouterr().out
