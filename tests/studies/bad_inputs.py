"""What a user gets who gives something bad: some 400 command lines, each a process of its own in a fresh folder.

    python tests/studies/bad_inputs.py                                  # all; a table of what is not good
    python tests/studies/bad_inputs.py --only checkpoint --jobs 2       # those with a word in their name; --list names them all
    python tests/studies/bad_inputs.py --exec                           # a new interpreter for each, as a shell would start it

A case is a line of a table: name, command line, a word that the message must hold, what was broken before. Good is: the
expected exit code (2), no traceback, a message that begins with "error:" and is short, and every file that was there is as it
was; where a run may go on, its model is the unbroken run's. Exit code 1 if any case is not good. No network is used, and a
process may take 8 GiB of address space.
"""

import argparse
import fnmatch
import gzip
import hashlib
import json
import os
import re
import resource
import shlex
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import processes  # noqa: E402
from processes import REPOSITORY, SMALL, TRAIN  # noqa: E402

SECONDS = 40.0  # a process that takes longer hangs
LINES, CHARACTERS = 12, 2000  # of a message, at most
VERDICTS = ("good", "hang", "traceback", "file lost", "wrong exit code", "wrong model", "unhelpful")


class Case(NamedTuple):
    name: str
    command: str | list[str]  # the words of a command line; with shell=True a line for bash
    word: str = ""  # a regular expression that the output must match, "." for the - or _ of a setting
    before: Callable[[Path], object] | None = None  # what is broken first, in the folder
    code: tuple[int, ...] = (2,)  # accepted exit codes
    changes: tuple[str, ...] = ()  # patterns of the files that may change
    shell: bool = False
    model: str = ""  # if the exit code is 0: a folder that must hold the model of the unbroken run
    beside: str = ""  # a command line that runs meanwhile, and must end well when it is asked to stop


class Result(NamedTuple):
    verdict: str
    message: str
    seconds: float


# ---- what can be broken ----------------------------------------------------------------------------------------------


def write(name: str, content: str | bytes) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return act


def rows(name: str, *lines) -> Callable[[Path], object]:
    return write(name, "".join(json.dumps(line) + "\n" for line in lines))


def remove(*patterns: str) -> Callable[[Path], object]:
    return lambda folder: [path.unlink() for pattern in patterns for path in list(folder.glob(pattern))]


def both(*actions: Callable[[Path], object]) -> Callable[[Path], object]:
    return lambda folder: [act(folder) for act in actions]


def move(old: str, new: str) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        (folder / new).parent.mkdir(parents=True, exist_ok=True)
        (folder / old).rename(folder / new)

    return act


def config(**changes) -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        file = folder / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | changes))

    return act


def tensors(change: Callable[[dict], object], file: str = "model/model.safetensors") -> Callable[[Path], object]:
    def act(folder: Path) -> None:
        from safetensors.torch import load_file, save_file

        named = load_file(folder / file)
        change(named)
        save_file(named, folder / file, {"format": "pt"})

    return act


def few_embeddings(named: dict) -> None:
    named["model.embed_tokens.weight"] = named["model.embed_tokens.weight"][:60].clone()


def pickled(folder: Path) -> None:
    import torch
    from safetensors.torch import load_file

    weights = folder / "model" / "model.safetensors"
    torch.save(load_file(weights), folder / "model" / "pytorch_model.bin")
    weights.unlink()


def adapter_only(folder: Path) -> None:
    move("model/model.safetensors", "model/adapter_model.safetensors")(folder)
    write("model/adapter_config.json", '{"peft_type": "LORA", "base_model_name_or_path": "no/such-model"}')(folder)
    (folder / "model" / "config.json").unlink()


# ---- the cases -------------------------------------------------------------------------------------------------------

KEPT = (
    TRAIN.replace("--out out", "--out run --epochs 2") + " --max-steps 8 --save-every 2 --keep 9"
)  # made `run`, interrupted: `stopped`
STOPPED = KEPT.replace("--out run", "--out stopped") + " --resume"
FILE = TRAIN.replace("train.py", "train.py {}").replace("--model model --dataset pairs.jsonl ", "")
SETTINGS = "model: model\ndataset: pairs.jsonl\n"
SAMPLE = "tests/tools/on_policy.py sample --model model --prompts prompts.jsonl --out new.jsonl --max-tokens 4 -n 2"
TREE = SAMPLE.replace("tools/on_policy", "studies/diversify")
SCORE = "tests/tools/on_policy.py score --responses sampled.jsonl --out new.jsonl"
PAIRS = "tests/tools/on_policy.py pairs --scored scored.jsonl --out new.jsonl"
ANSWERS = "tests/tools/answers.py --model model --prompts prompts.jsonl --out new.json --max-new-tokens 4"
CLEAN = "tests/tools/clean.py"
SHOW = "data.py show --model model --dataset"
STATS = "data.py stats --model model --dataset"
EXPORT = "distributed.py export stopped/checkpoints/step-000004"
PLAN = "tests/tools/will_it_fit.py --gpus 1 --lengths 8 8 8 --model model"
LONG = "9" * 400
OPTIONS = "--max-steps 1 --lr 1e-3 --eval-size 8 --batch-size 8 --samples 1 --sample-tokens 4 --cache cache --dtype fp32"


def output_folders() -> Iterator[Case]:
    """Nothing of a user's is ever deleted: a folder that holds anything is refused as it is."""
    name = "out: {}".format
    project = both(write("out/settings.json", "{}"), write("out/thesis.txt", "years of work"))
    yield Case(name("a project with settings.json and a thesis"), TRAIN, "out", project)
    foreign = both(write("out/checkpoints/mine.txt", "mine"), write("out/notes.txt", "mine"))
    yield Case(name("a folder with checkpoints/ and foreign files"), TRAIN, "out", foreign)
    yield Case(name("a folder of files"), TRAIN, "out", write("out/notes.txt", "mine"))
    yield Case(name("a run"), TRAIN.replace("--out out", "--out run"), "resume")
    yield Case(name("a project, resumed"), f"{TRAIN} --resume", "no run to resume", project)
    yield Case(name("none, resumed"), TRAIN.replace("--out out", "--resume"), "out")
    yield Case(name("--overwrite, which is gone"), f"{TRAIN} --overwrite", "unknown setting")


def resuming() -> Iterator[Case]:
    name, going_on = "resume: {}".format, dict(changes=("stopped/*",), model="stopped/model")
    yield Case(name("a finished run"), f"{KEPT} --resume", "finished|nothing left|complete|done", None, (0, 2))
    yield Case(name("of nothing"), f"{TRAIN} --resume", "out")
    damaged = both(
        write("stopped/checkpoints/step-000002/complete", "x"), write("stopped/checkpoints/step-000004/complete", "x")
    )
    yield Case(name("all markers damaged"), STOPPED, "marker|damaged", damaged, (0, 2), **going_on)
    for setting, value in (("lr", "1e-4"), ("batch-size", "4"), ("objective", "dpo"), ("max-steps", "6"), ("seed", "1"),
                           ("dataset", "pairs2.jsonl"), ("layout", "padded"), ("dtype", "bf16")):  # fmt: skip
        yield Case(name(f"with another {setting}"), f"{STOPPED} --{setting} {value}", setting.replace("-", "."))
    early = both(lambda folder: shutil.rmtree(folder / "stopped" / "checkpoints"), remove("stopped/metrics.jsonl"))
    yield Case(name("killed before the first checkpoint"), STOPPED, "", early, (0,), **going_on)
    long = f"{TRAIN} --max-steps 100000 --epochs 30000 --save-every 10"
    for second in ("--resume", ""):
        yield Case(
            name(f"of a run that runs ({second or 'neither'})"), f"{long} {second}", "run", None, (2,), ("out/*",), beside=long
        )


def models() -> Iterator[Case]:
    weights = "model/model.safetensors"
    drop = tensors(lambda named: named.pop("model.layers.1.mlp.up_proj.weight"))
    nan = tensors(lambda named: named["model.norm.weight"].fill_(float("nan")))
    broken = {
        "a tensor removed": (drop, "up_proj|missing"),
        "5 layers in the configuration, 2 in the file": (config(num_hidden_layers=5), "layers|missing"),
        "1 layer in the configuration, 2 in the file": (config(num_hidden_layers=1), "layers|unexpected"),
        "another shape in the configuration": (config(intermediate_size=96), "shape|size|proj"),
        "something else under model.safetensors": (write(weights, "Dear diary, " * 500), "safetensors|model"),
        "an empty model.safetensors": (write(weights, ""), "safetensors|model"),
        "model.safetensors cut": (lambda f: os.truncate(f / weights, 9000), "safetensors|model"),
        "NaN weights": (nan, "finite"),
        "no configuration": (remove("model/config.json"), "config"),
        "a configuration that is no JSON": (write("model/config.json", "{model_type: llama"), "config"),
        "a configuration of an unknown kind": (config(model_type="grail"), "grail|model"),
        "a configuration that is a list": (write("model/config.json", "[]"), "config"),
        "no tokenizer": (remove("model/tokenizer*"), "tokenizer"),
        "a tokenizer that is no JSON": (write("model/tokenizer.json", "{"), "tokenizer"),
        "a chat template with an error": (write("model/chat_template.jinja", "{% for %}"), "template"),
        "more ids than embeddings": (both(tensors(few_embeddings), config(vocab_size=60)), "embeddings|ids"),
        ".bin weights only": (pickled, "bin"),
        "an adapter only": (adapter_only, "adapter|config|safetensors"),
        "an empty folder": (lambda f: [p.unlink() for p in (f / "model").iterdir()], "model"),
    }
    for what, (before, word) in broken.items():
        yield Case(f"model: {what}", TRAIN, word, before)
        if what in ("a tensor removed", "5 layers in the configuration, 2 in the file", "NaN weights", "no tokenizer",
                    "an empty folder", "an empty model.safetensors"):  # fmt: skip
            yield Case(f"model: {what} (sample)", SAMPLE, word, before)
    names = {"a file": "pairs.jsonl", "a hub name of nothing": "no/such-model", "../x": "../x", "with spaces": "no such model",
             "300 characters": "m" * 300, "empty": "", "a name that is no name": "a/b/c/d"}  # fmt: skip
    for what, value in names.items():
        command = shlex.split(TRAIN) + ["--model", value]
        yield Case(f"model: {what}", command, re.escape(value[:20]) or "model|tokenizer")
    yield Case("model: a file (sample)", f"{SAMPLE} --model pairs.jsonl", "pairs.jsonl")
    yield Case("model: a file (show)", f"{SHOW} pairs.jsonl --model pairs.jsonl", "pairs.jsonl")


def settings() -> Iterator[Case]:
    for option, values in {
        "weight-decay": "nan inf -1", "max-grad-norm": "nan -1", "lr": "nan inf 0 -1 ten", "warmup-ratio": "2 nan -0.1",
        "batch-size": "0 -1 1.5", "epochs": "0 -1", "max-steps": "0 -1", "sample-tokens": "0 -3", "samples": "-1",
        "eval-size": "10000 -1", "seed": "-1 x", "mesh": "axb 2x2 0x0",
        "equal-length": "2 nan -1", "device": "cuda:7 gpu meta", "dtype": "fp64", "layout": "tree", "log-to": "nothing",
        "export-dtype": "int4",
        "tokens-per-microbatch": "0", "keep": "0", "save-every": "-1", "eval-every": "-1",
        "max-drop-fraction": "nan 2", "gradient-checkpointing": "perhaps", "max-length": "1 0 -5",
        "max-prompt-length": "0 4096", "learning-rate": "1e-3",
    }.items():  # fmt: skip
        for value in values.split():
            word = "mesh|torchrun" if option == "mesh" else option.replace("-", ".")
            yield Case(f"settings: {option} {value[:24]}", f"{TRAIN} --{option} {value}", word)
    yield Case("settings: seed of 400 digits", f"{TRAIN} --seed {LONG}", "", None, (0, 2))
    yield Case("settings: lr 1e30", f"{TRAIN} --lr 1e30", "lr|finite")
    yield Case("settings: a billion epochs", f"{TRAIN} --epochs 1000000000", "", None, (0, 2))
    yield Case("settings: batch cut short", f"{TRAIN} --batch 4", "batch")
    yield Case("settings: a value is missing", f"{TRAIN} --lr", "lr")
    yield Case("settings: a word too many", f"{TRAIN} surprise", "surprise")
    for options, word in (
        ("--replays 0", "replays"), ("--reset-alpha 2", "reset.alpha"), ("--reset-alpha nan", "reset.alpha"),
        ("--sft-weight -1", "sft.weight"), ("--reset-alpha 0.5 --reset-modules nothing", "reset.modules"),
    ):  # fmt: skip
        yield Case(f"lorr.py: {options}", f"{TRAIN.replace('train.py', 'tests/studies/lorr.py')} {options}", word)
    yield Case("settings: no dataset", "train.py --model model --out out", "dataset")
    yield Case("settings: no model", "train.py --dataset pairs.jsonl --out out", "model")
    for option, value in (("noise", "nan"), ("noise", "-1"), ("length-bias", "nan"), ("world", "nobody"), ("seed", "x")):
        yield Case(f"toy.py: build --{option} {value}", f"tests/tools/toy.py build --out new --{option} {value}", option[:5])
    yield Case("toy.py: build onto files", "tests/tools/toy.py build --out model", "model")
    yield Case("toy.py: judge no model", "tests/tools/toy.py judge pairs.jsonl", "pairs.jsonl")
    yield Case("toy.py: judge by no task", "tests/tools/toy.py judge model --toy cache", "cache")
    for what, out in (("of 300 characters", "o" * 300), ("a file", "pairs.jsonl"), ("under a file", "pairs.jsonl/out"),
                      ("in /proc", "/proc/plainpo"), ("in a read-only folder", "/sys/plainpo")):  # fmt: skip
        yield Case(f"settings: out {what}", f"{TRAIN} --out {out}", "out")
    yield Case("settings: cache a file", f"{TRAIN} --objective dpo --cache pairs.jsonl", "cache|pairs.jsonl", None, (0, 2))
    yield Case("settings: cache in /proc", f"{TRAIN} --objective dpo --cache /proc/x", "cache|/proc/x", None, (0, 2))


def settings_files() -> Iterator[Case]:
    laughs = "\n".join(["a0: &a0 " + "[x, x, x, x, x, x, x, x, x]"]
                       + [f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)])  # fmt: skip
    for what, content, code, word in (
        ("latin-1", "dataset: p\xe4rs.jsonl\n".encode("latin-1"), (2,), "mine.yaml"),
        ("UTF-16", SETTINGS.encode("utf-16"), (2,), "UTF-8"),
        ("binary", bytes(range(256)) * 20, (2,), "mine.yaml"),
        ("a setting with nothing", SETTINGS + "batch_size:\n", (2,), "batch_size"),
        ("20,000 brackets", SETTINGS + "columns: " + "[" * 20_000, (2,), "mine.yaml"),
        ("20,000 brackets, closed", SETTINGS + "columns: " + "[" * 20_000 + "]" * 20_000, (2,), "mine.yaml"),
        ("aliases that explode", SETTINGS + laughs, (2,), "mine.yaml"),
        ("aliases that explode, as dataset", f"model: model\n{laughs}\ndataset: *a11\n", (2,), "mine.yaml"),
        ("a key twice", SETTINGS + "epochs: 1\nepochs: 2\n", (2,), "epochs"),
        ("a list of datasets", "model: model\ndataset: [pairs.jsonl, pairs2.jsonl]\n", (0,), ""),
        ("a list", "- model\n- pairs.jsonl\n", (2,), "mine.yaml"),
        ("a number", "7\n", (2,), "mine.yaml"),
        ("empty", "", (2,), "mine.yaml"),
        ("an unknown setting", SETTINGS + "learning_rate: 1\n", (2,), "learning.rate"),
        ("a value of the wrong kind", SETTINGS + "batch_size: many\n", (2,), "batch.size"),
        ("a value that is a mapping", SETTINGS + "batch_size: {a: 1}\n", (2,), "batch.size"),
        ("a date", SETTINGS + "batch_size: 2024-01-01\n", (2,), "batch.size"),
        ("a Python object", SETTINGS + "columns: !!python/object/apply:os.getcwd []\n", (2,), "mine.yaml"),
        ("a tab", "model:\tmodel\n\tdataset: x\n", (2,), "mine.yaml"),
        ("a key that is a list", SETTINGS + "? [a, b]\n: 1\n", (2,), "mine.yaml"),
    ):
        yield Case(f"settings file: {what}", FILE.format("mine.yaml"), word, write("mine.yaml", content), code)
    yield Case("settings file: {}", FILE.format("mine.json"), "mine.json", write("mine.json", "{}"))
    yield Case("settings file: JSON cut", FILE.format("mine.json"), "mine.json", write("mine.json", '{"model": "mod'))
    yield Case("settings file: not there", FILE.format("nowhere.yaml"), "nowhere.yaml")
    yield Case("settings file: a folder", FILE.format("mine.yaml"), "mine.yaml", lambda folder: (folder / "mine.yaml").mkdir())


def objectives() -> Iterator[Case]:
    for what, objective, word in (
        ("unknown", "dpp", "dpp"), ("an unknown argument", "simpo(bta=1)", "bta"),
        ("of the wrong kind", "simpo(beta='a')", "beta"), ("a list", "simpo(beta=[1])", "beta"),
        ("the same argument twice", "simpo(beta=1, beta=2)", "beta|objective"),
        ("an integer of 400 digits", f"simpo(beta={LONG})", "beta|objective"),
        ("an integer of 5,000 digits", f"simpo(beta={'9' * 5000})", "beta|objective"),
        ("3,000 minus signs", f"simpo(beta={'-' * 3000}1)", "beta|objective"),
        ("3,000 brackets", f"simpo(beta={'(' * 3000}1{')' * 3000})", "beta|objective"),
        ("positional", "simpo(2.0)", "objective|named"), ("a nested call", "simpo(beta=float('nan'))", "objective"),
        ("code", "__import__('os').system('rm -r model')", "objective"), ("empty", "", "objective"),
        ("a NUL", "simpo(\0)", "objective"),
        ("beta 1e999", "simpo(beta=1e999)", "beta"), ("beta nan", "simpo(beta=nan)", "objective"),
        ("beta 0", "dpo(beta=0)", "beta"),
        ("label_smoothing 0.7", "dpo(label_smoothing=0.7)", "label.smoothing"), ("stars", "simpo(**{'beta': 1})", "objective"),
        ("two", "dpo, simpo", "objective"), ("a lambda", "(lambda: 1)()", "objective"), ("imaginary", "dpo(beta=1j)", "beta"),
        ("tau 0", "gamma_simpo(tau=0)", "tau"), ("a divergence of no name", "f_dpo(divergence='x')", "divergence"),
    ):  # fmt: skip
        before = both(write("mine.json", json.dumps({"model": "model", "dataset": "pairs.jsonl", "objective": objective})))
        yield Case(f"objective: {what}", FILE.format("mine.json"), word, before)
    long = json.dumps({"model": "model", "dataset": "pairs.jsonl", "objective": f"simpo({'x' * 200_000})"})
    yield Case("objective: 200,000 characters", FILE.format("mine.json"), "objective", write("mine.json", long))
    yield Case("objective: dpo, but rows are unpaired", f"{TRAIN} --dataset rows.jsonl --objective dpo", "rows.jsonl|single")
    yield Case("objective: odpo, but rows have no scores", f"{TRAIN} --objective odpo", "score.chosen")
    for what, options, word in (
        ("without a reference", "--objective simpo --sync-every 2", "reference"),
        ("-1", "--objective dpo --sync-every -1", "sync.every"),
        ("alpha 1.5", "--objective dpo --sync-every 2 --sync-alpha 1.5", "sync.alpha"),
        ("alpha nan", "--objective dpo --sync-every 2 --sync-alpha nan", "sync.alpha"),
    ):  # fmt: skip
        yield Case(f"tr_dpo.py: sync_every {what}", f"{TRAIN.replace('train.py', 'tests/studies/tr_dpo.py')} {options}", word)
    yield Case("objective: kto with one prompt", f"{TRAIN} --dataset new.jsonl --objective kto", "prompt", rows(
        "new.jsonl", *({"prompt": "a", "completion": f"b {'c ' * i}", "label": i % 2 == 0} for i in range(20))))  # fmt: skip


def datasets() -> Iterator[Case]:
    pair = {"prompt": "name two fruits", "chosen": "apple and pear", "rejected": "so apple"}
    single = {"prompt": "name two fruits", "completion": "apple and pear", "label": True}
    lines = [json.dumps(pair | {"chosen": "apple " * (i + 1)}) + "\n" for i in range(30)]
    text, number = "".join(lines), "9" * 5000
    surrogate, long = (f'{{"prompt": {x}, "chosen": "b", "rejected": "c"}}\n' * 30 for x in ('"\\ud800"', number))
    broken = {
        "empty": ("new.jsonl", "", "new.jsonl"),
        "an empty gz": ("new.jsonl.gz", b"", "new.jsonl.gz"),
        "a cut gz": ("new.jsonl.gz", gzip.compress(os.urandom(9000) + text.encode())[:3000], "new.jsonl.gz"),
        "no gz": ("new.jsonl.gz", text, "new.jsonl.gz"),
        "no parquet": ("new.parquet", text, "new.parquet"),
        "an empty parquet": ("new.parquet", b"", "new.parquet"),
        "a JSON object": ("new.json", json.dumps(pair), "new.json|eval.size|dataset"),
        "a JSON number": ("new.json", "7", "new.json"),
        "a list of numbers": ("new.json", "[1, 2, 3]", "new.json"),
        "JSON cut": ("new.json", json.dumps([pair] * 30)[:-200], "new.json"),
        "too many errors": ("new.jsonl", text + "{broken\n" * 10, "new.jsonl|max.drop.fraction"),
        "unknown columns": ("new.jsonl", '{"question": "a", "good": "b", "bad": "c"}\n' * 30, "question|columns"),
        "bytes that are no UTF-8": ("new.jsonl", b'{"prompt": "\xff\xfe", "chosen": "b", "rejected": "c"}\n' * 30, "new.jsonl"),
        "UTF-16": ("new.jsonl", text.encode("utf-16"), "new.jsonl"),
        "NUL bytes": ("new.jsonl", b"\0" * 4096, "new.jsonl"),
        "one row": ("new.jsonl", lines[0], "new.jsonl|eval.size"),
        "20,000 brackets": ("new.jsonl", "[" * 20_000 + "\n", "new.jsonl"),
        "20,000 brackets in a JSON file": ("new.json", "[" * 20_000, "new.json"),
        "a prompt of lone surrogates": ("new.jsonl", surrogate, "new.jsonl"),
        "a number of 5,000 digits": ("new.jsonl", long, "new.jsonl"),
        "null columns": ("new.jsonl", '{"prompt": null, "chosen": null, "rejected": null}\n' * 30, "new.jsonl"),
        "texts that spell special tokens": ("new.jsonl", text.replace("name two", "<end> two"), "special token <end>"),
        "prompts of no text": ("new.jsonl", '{"prompt": 5, "chosen": {}, "rejected": []}\n' * 30, "new.jsonl"),
    }  # fmt: skip
    for what, (file, content, word) in broken.items():
        yield Case(f"data: {what}", f"{TRAIN} --dataset {file}", word, write(file, content))
        if what in ("empty", "no parquet", "a cut gz", "NUL bytes", "unknown columns", "20,000 brackets in a JSON file"):
            yield Case(f"data: {what} (stats)", f"{STATS} {file}", word.split("|")[0], write(file, content))
    same = write("new.jsonl", lines[0] * 30)
    yield Case("data: all rows identical", f"{TRAIN} --dataset new.jsonl", "", same, (0, 2))
    yield Case("data: all rows identical, and dropped", f"{CLEAN} new.jsonl new2.jsonl --identical", "no row is left", rows(
        "new.jsonl", *[pair | {"rejected": pair["chosen"]}] * 30))  # fmt: skip
    mixed = rows("new.jsonl", pair, single, pair, single)
    kto = "--objective kto --eval-size 1"
    for what, command, code in (
        ("in a file, stats", f"{STATS} new.jsonl", (0, 2)), ("in a file, kto", f"{TRAIN} --dataset new.jsonl {kto}", (0, 2)),
        ("files, stats", f"{STATS} pairs.jsonl,rows.jsonl", (0, 2)), ("files, show", f"{SHOW} rows.jsonl,pairs.jsonl", (0, 2)),
        ("files, kto", f"{TRAIN} --dataset pairs.jsonl,rows.jsonl {kto}", (0, 2)),
        ("files, dpo", f"{TRAIN} --dataset pairs.jsonl,rows.jsonl --objective dpo", (2,)),
        ("held out unpaired", f"{TRAIN} --eval-dataset rows.jsonl", (2,)),
        ("held out paired", f"{TRAIN} --dataset rows.jsonl --eval-dataset pairs.jsonl {kto}", (0, 2)),
    ):  # fmt: skip
        yield Case(f"data: paired and unpaired, {what}", command, "", mixed, code)
    splits = both(write("split/train.jsonl", text), write("split/test.jsonl", text))
    for what, dataset, word in (("of two splits", "split", "split:train"), ("without that split", "split:dev", "split:test"),
                                ("by a pattern", "'split/*.jsonl'", "split/.*:test")):  # fmt: skip
        yield Case(f"data: a folder {what}", f"{TRAIN} --dataset {dataset}", word, splits)
        yield Case(f"data: a folder {what} (stats)", f"{STATS} {dataset}", word, splits)
    saved = both(
        write("saved/dataset_info.json", "{}"), write("saved/state.json", '{"_data_files": [{"filename": "a.arrow"}]}')
    )
    yield Case("data: half of what save_to_disk wrote", f"{TRAIN} --dataset saved", "saved/state.json", saved)
    asked, answers = {"question": "name two fruits"}, {"chosen": "apple and pear", "rejected": "so apple"}
    spelled = json.dumps([{"role": "assistant", "content": "apple and pear"}])
    for what, row, word in (
        ("messages as JSON in a string", pair | {"chosen": spelled}, "chosen is a string that spells messages"),
        ("messages as Python prints them", pair | {"prompt": str([{"role": "user", "content": "name"}])}, "prompt is a string"),
        ("two columns that could be the prompt", asked | answers | {"query": "name three"}, "question and query"),
        ("two system texts", {"prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "b"}], "system": "c"}
         | answers, "system message"),
        ("a system text that is none", asked | answers | {"system": [1]}, "system is a list"),
        ("answers alone", answers, "begin with the same words"),
    ):  # fmt: skip
        yield Case(f"data: {what}", f"{TRAIN} --dataset new.jsonl", word, rows("new.jsonl", *[row] * 30))
    for what, dataset, word in (
        ("missing", "nowhere.jsonl", "nowhere"), ("a folder without data", "model", "model"),
        ("no match", "'*.nothing'", "nothing"), ("a split of a file", "pairs.jsonl:train", "pairs.jsonl:train"),
        ("a billionfold", "pairs.jsonl@1000000000", "pairs.jsonl|weight"), ("weight 0", "pairs.jsonl@0", "pairs.jsonl|weight"),
        ("weight nan", "pairs.jsonl@nan", "pairs.jsonl|weight"), ("weight -1", "pairs.jsonl@-1", "pairs.jsonl|weight"),
        ("weight 1e-9", "pairs.jsonl@1e-9", "pairs.jsonl|weight|rows|eval.size"),
        ("a slice to 10²³", f"'pairs.jsonl[5:{10**23}]'", ""), ("a slice of nothing", "'pairs.jsonl[5:5]'", "pairs.jsonl"),
        ("a slice beyond the end", "'pairs.jsonl[500:]'", "pairs.jsonl"), ("nothing between commas", "pairs.jsonl,,", ""),
        ("a name of 5,000 characters", "p" * 5000 + ".jsonl", "ppp"), ("a hub name of nothing", "no/such-data", "no/such-data"),
        ("empty name", "''", "dataset"),
    ):  # fmt: skip
        code = (0, 2) if "10²³" in what or "commas" in what else (2,)
        yield Case(f"data: {what}", f"{TRAIN} --dataset {dataset}", word, None, code)
    for option, value, word in (("columns", "prompt=question", "question"), ("columns", "nonsense", "columns"),
                                ("format", "nonsense", "format|nonsense"), ("format", "hh", "hh|pairs.jsonl")):  # fmt: skip
        yield Case(f"data: {option} {value}", f"{TRAIN} --{option} {value}", word)
        yield Case(f"data: {option} {value} (show)", f"{SHOW} pairs.jsonl --{option} {value}", word)
    lengths = f"{STATS} pairs.jsonl --max-length"
    yield Case("data: max_length 1 (stats)", f"{lengths} 1", "max.length")
    yield Case("data: max_prompt_length above max_length (stats)", f"{lengths} 64 --max-prompt-length 65", "max.prompt.length")
    yield Case("data: show -n -1", f"{SHOW} pairs.jsonl -n -1", "n ", None, (0, 2))
    yield Case("data: standard input", f"{STATS} -", "no such file")
    yield Case("data: weight with sample", f"{SAMPLE} --prompts prompts.jsonl@2", "weight|@2")


def commands() -> Iterator[Case]:
    name = "data.py: {}".format
    yield Case(name("no command"), "data.py", "command")
    yield Case(name("an unknown command"), "data.py shwo", "shwo")
    yield Case(name("show without model"), "data.py show --dataset pairs.jsonl", "model")


def tools() -> Iterator[Case]:
    name, study, judges = "on_policy.py: {}".format, "diversify.py: {}".format, "answers.py: {}".format
    yield Case(name("sample of nothing"), "tests/tools/on_policy.py sample", "model|prompts")
    for option, value, word in (
        ("temperature", "nan", "temperature"), ("temperature", "inf", "temperature"), ("temperature", "-1", "temperature"),
        ("n", "0", "n,|n "), ("top-p", "nan", "top.p"), ("top-p", "0", "top.p"),
        ("max-tokens", "0", "max.tokens"), ("batch-size", "0", "batch.size"), ("seed", LONG, "seed"),
        ("device", "cuda:7", "device|cuda"), ("device", "gpu", "device|gpu"), ("device", "meta", "device|meta"),
        ("prompts", "rules.py", "rules.py"), ("out", "model", "model"), ("out", "/proc/x/y.jsonl", "/proc/x"),
        ("out", "o" * 300, "ooo"),
    ):  # fmt: skip
        yield Case(name(f"sample --{option} {value[:20]}"), f"{SAMPLE} --{option} {value}", word)
    tree = f"{TREE} --strategy mcts --rule rules.py:words"
    yield Case(study("sample by no strategy"), f"{TREE} --strategy mad", "mad")
    yield Case(study("sample by mcts without a rule"), f"{TREE} --strategy mcts", "rule")
    yield Case(study("sample by plain with a rule"), f"{TREE} --rule rules.py:words", "rule|mcts")
    for rule in ("nowhere.py:f", "rules.py:NUMBER", "rules.py:raises", "rules.py:text", "rules.py:one"):
        yield Case(
            study(f"sample by mcts --rule {rule}"), f"{TREE} --max-tokens 64 --strategy mcts --rule {rule}", re.escape(rule)
        )
    for option, value in (("iterations", "0"), ("iterations", LONG), ("exploration", "-1"), ("exploration", "nan"),
                          ("step-end", "''")):  # fmt: skip
        yield Case(study(f"sample by mcts --{option} {value[:20]}"), f"{tree} --{option} {value}", option.replace("-", "."))
    yield Case(name("sample, out is prompts"), f"{SAMPLE} --out prompts.jsonl", "prompts.jsonl")
    yield Case(name("sample, out of other settings"), f"{SAMPLE} --out sampled.jsonl --temperature 0.5", "temperature")
    yield Case(name("sample, out is no JSON"), f"{SAMPLE} --out rules.py", "rules.py")
    yield Case(name("sample, out is other data"), f"{SAMPLE} --out pairs.jsonl", "pairs.jsonl")
    yield Case(
        name("sample, no prompt fits"), f"{SAMPLE} --prompts none.jsonl", "none.jsonl", rows("none.jsonl", {"prompt": ""})
    )
    yield Case(name("score without a rule"), SCORE, "rule")
    yield Case(name("score by rule and model"), f"{SCORE} --rule rules.py:words --reward-model judge", "rule")
    broken = {
        "not there": "nowhere.py:f", "no function": "rules.py:nothing", "no function named": "rules.py",
        "no module": "no_module:f",
        "raises when it is imported": "raises.py:f", "leaves when it is imported": "leaves.py:f",
        "is no Python": "prompts.jsonl:f",
        "is a number": "rules.py:NUMBER", "raises": "rules.py:raises", "leaves": "rules.py:leaves", "gives nan": "rules.py:nan",
        "gives None": "rules.py:none", "gives text": "rules.py:text", "gives a list": "rules.py:many",
        "takes one argument": "rules.py:one",
    }  # fmt: skip
    for what, rule in broken.items():
        yield Case(name(f"score, the rule {what}"), f"{SCORE} --rule {rule}", re.escape(rule.partition(":")[0]))
    yield Case(name("score by a causal model"), f"{SCORE} --reward-model model", "model")
    yield Case(name("score by a model that is missing"), f"{SCORE} --reward-model nowhere", "nowhere")
    yield Case(name("score, out is responses"), f"{SCORE} --rule rules.py:words --out sampled.jsonl", "sampled.jsonl")
    yield Case(name("score of rows without responses"), f"{SCORE} --rule rules.py:words --responses pairs.jsonl", "responses")
    yield Case(name("pairs, out is scored"), f"{PAIRS} --out scored.jsonl", "scored.jsonl")
    yield Case(name("pairs, how is nonsense"), f"{PAIRS} --how nonsense", "nonsense")
    yield Case(name("pairs, no scores"), f"{PAIRS} --scored sampled.jsonl", "scores")
    steps = "tests/studies/diversify.py steps --model model --sampled scored.jsonl --out new.jsonl"
    yield Case(study("steps without a tree"), steps, "mcts")
    yield Case(study("steps, min_visits 0"), f"{steps} --min-visits 0", "min.visits")
    training = TRAIN.replace("train.py", "tests/studies/diversify.py train")
    yield Case(study("training on steps that are none"), training, "not a pair of steps")
    yield Case(name("clean, out is in"), f"{CLEAN} pairs.jsonl pairs.jsonl --duplicates", "pairs.jsonl")
    yield Case(name("clean of nothing"), CLEAN, "source|out")
    yield Case(name("clean, min_margin without scores"), f"{CLEAN} pairs.jsonl new.jsonl --min-margin 1", "min.margin|scores")
    yield Case(name("clean, an unknown switch"), f"{CLEAN} pairs.jsonl new.jsonl --double", "double")
    yield Case(name("clean, out is a folder"), f"{CLEAN} pairs.jsonl model", "model")
    yield Case(name("pairs, min_margin nan"), f"{PAIRS} --min-margin nan", "min.margin")
    yield Case(name("pairs, out is a folder"), f"{PAIRS} --out model", "model")
    yield Case(name("pairs, out under a file"), f"{PAIRS} --out rules.py/new.jsonl", "rules.py")
    yield Case(judges("out is there"), f"{ANSWERS} --out scored.jsonl", "scored.jsonl")
    for option, value in (("style", "nonsense"), ("decoding", "nonsense"), ("temperature", "nan"), ("max-new-tokens", "0"),
                          ("device", "gpu"), ("model", "nowhere"), ("prompts", "nowhere.jsonl")):  # fmt: skip
        yield Case(judges(f"--{option} {value}"), f"{ANSWERS} --{option} {value}", f"{option.replace('-', '.')}|nowhere")


def plans_and_exports() -> Iterator[Case]:
    name = "distributed.py: {}".format
    yield Case(name("no command"), "distributed.py", "command")
    yield Case(name("export of nothing"), "distributed.py export", "checkpoint|out")
    yield Case(name("export of no checkpoint"), "distributed.py export nowhere new", "nowhere")
    yield Case(name("export of a model folder"), "distributed.py export model new", "model")
    yield Case(name("export of a file"), "distributed.py export pairs.jsonl new", "pairs.jsonl")
    flip = both(lambda folder: flipped(folder / "stopped" / "checkpoints" / "step-000004"))
    yield Case(name("export of a damaged checkpoint"), f"{EXPORT} new", "damaged", flip)
    yield Case(name("export onto a folder"), f"{EXPORT} model", "model")
    yield Case(name("export onto a file"), f"{EXPORT} pairs.jsonl", "pairs.jsonl")
    yield Case(name("export into the checkpoint"), f"{EXPORT} stopped/checkpoints/step-000004", "exists|step-000004")
    yield Case(name("export under a file"), f"{EXPORT} pairs.jsonl/new", "pairs.jsonl")
    yield Case(name("export into /proc"), f"{EXPORT} /proc/new", "/proc/new")
    yield Case(name("export, a foreign OUT.part"), f"{EXPORT} new", "", write("new.part/mine.txt", "mine"), (0, 2))
    yield Case(name("export in int4"), f"{EXPORT} new --dtype int4", "int4")
    yield Case("will_it_fit.py: nothing", "tests/tools/will_it_fit.py", "model")
    for option, value in (("gpus", "0"), ("gpus", "-1"), ("gpu-memory", "nan"), ("gpu-memory", "-1"), ("lengths", "1 2"),
                          ("lengths", "0 8 8"), ("lengths", "-8 8 8"), ("model", "nonsense"), ("rows", "-1"),
                          ("batch-size", "-1"), ("mfu", "0"), ("mfu", "nan"), ("tflops", "0")):  # fmt: skip
        yield Case(f"will_it_fit.py: --{option} {value}", f"{PLAN} --{option} {value}", f"{option.replace('-', '.')}|nonsense")


def outputs() -> Iterator[Case]:
    emoji = rows("new.jsonl", *({"prompt": "🍐 ä", "chosen": f"🍎 {i}", "rejected": "x"} for i in range(30)))
    losses, python = "{repository}/losses.py", "{python}"
    show = "{python} {repository}/" + f"{SHOW} new.jsonl"
    for what, line, code in (
        ("losses.py from another folder", f"{python} {losses}", (0,)),
        ("losses.py | head -1", f"{python} {losses} | head -1", (0, 2, 141)),
        ("losses.py into a pipe that is closed", f"{python} {losses} | (exec <&-; sleep 4)", (0, 2, 141)),
        ("losses.py in ASCII", f"PYTHONIOENCODING=ascii {python} {losses}", (0,)),
        ("losses.py in the C locale", f"LC_ALL=C PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 {python} {losses}", (0,)),
        ("data.py show in ASCII", f"PYTHONIOENCODING=ascii {show}", (0,)),
        ("data.py stats in ASCII", f"PYTHONIOENCODING=ascii {show.replace(' show ', ' stats ')}", (0,)),
        ("data.py show > /dev/full", f"{show} > /dev/full", (2,)),
        ("data.py show into a pipe that is closed", f"{show} | (exec <&-; sleep 9)", (0, 2, 141)),
        (
            "data.py --help into a pipe that is closed",
            "{python} {repository}/data.py show --help | (exec <&-; sleep 9)",
            (0, 2, 141),
        ),
        ("train.py in ASCII", "PYTHONIOENCODING=ascii {python} {repository}/" + f"{TRAIN} --dataset new.jsonl", (0,)),
        ("train.py, standard error is full", "{python} {repository}/" + f"{TRAIN} 2> /dev/full", (0, 1, 2, 120)),
    ):
        yield Case(f"output: {what}", line, "", emoji, code, shell=True)


def flipped(checkpoint: Path) -> None:
    weights = next(checkpoint.glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[len(content) // 2] ^= 0x40
    weights.write_bytes(content)


def older(checkpoint: Path) -> None:
    """Put the weights of step 2 in a later checkpoint as well, under names that its marker does not know."""
    weights = next((checkpoint.parent / "step-000002").glob("*.safetensors"))
    for name in ("a.safetensors", "z.safetensors"):
        shutil.copy(weights, checkpoint / name)


def half_listed(checkpoint: Path) -> None:
    """A damaged file of weights, and a marker that does not list it."""
    sums = json.loads((checkpoint / "complete").read_text())
    (checkpoint / "complete").write_text(json.dumps({"step.json": sums["step.json"]}))
    shutil.copy(next((checkpoint.parent / "step-000002").glob("*.safetensors")), checkpoint)


def checkpoints() -> Iterator[Case]:
    newest, going_on = "stopped/checkpoints/step-000004", dict(changes=("stopped/*",), model="stopped/model")
    weights = f"{newest}/shard-00001-model-00001-of-00001.safetensors"

    def cut(folder):
        return os.truncate(folder / weights, 5000)

    def inside(folder):
        return (folder / newest / "mine").mkdir()

    def dangling(folder):
        return (folder / newest / "link").symlink_to("nowhere")

    def half(folder):
        return os.truncate(folder / newest / "complete", 40)

    for what, before, word in (
        ("a bit flipped", lambda folder: flipped(folder / newest), "damaged"), ("a file cut", cut, "cut|damaged"),
        ("a file removed", remove(weights), "missing"), ("step.json removed", remove(f"{newest}/step.json"), "missing"),
        ("marker []", write(f"{newest}/complete", "[]"), "marker"),
        ("marker null", write(f"{newest}/complete", "null"), "marker"),
        ("marker a: 1", write(f"{newest}/complete", '{"a": 1}'), "marker|missing"),
        ("marker a: [1]", write(f"{newest}/complete", '{"step.json": [1]}'), "marker|damaged"),
        ("marker of step.json: null", write(f"{newest}/complete", '{"step.json": null}'), "marker|damaged"),
        ("marker binary", write(f"{newest}/complete", bytes(range(256))), "marker"),
        ("marker cut", half, "marker"), ("marker empty", write(f"{newest}/complete", ""), "marker"),
        ("marker a folder", both(remove(f"{newest}/complete"), write(f"{newest}/complete/x", "")), "marker|finished"),
        ("an unlisted file of weights", lambda folder: shutil.copy(folder / "model/model.safetensors", folder / newest), ""),
        ("a marker that lists step.json only", lambda folder: half_listed(folder / newest), ""),
        ("an older one's weights under other names", lambda folder: older(folder / newest), ""),
        ("both damaged", lambda folder: [flipped(c) for c in (folder / newest).parent.iterdir()], "damaged"),
        ("renamed to another step", move(newest, "stopped/checkpoints/step-000006"), ""),
        ("a folder in it", inside, ""), ("a dangling link in it", dangling, ""),
        ("a folder of another name beside it", write("stopped/checkpoints/step-best/complete", "{}"), ""),
        ("a file of that name beside it", write("stopped/checkpoints/step-000008", "x"), ""),
        ("all removed but a .part", both(remove(f"{newest}/complete"), move(newest, f"{newest}.part")), ""),
        ("metrics.jsonl with bytes that are no UTF-8", write("stopped/metrics.jsonl", b'{"step": 0}\n\xff\xfe\n'), ""),
        ("metrics.jsonl with []", write("stopped/metrics.jsonl", '{"step": 0}\n[]\n'), ""),
        ("metrics.jsonl with 1", write("stopped/metrics.jsonl", '{"step": 0}\n1\n'), ""),
        ("metrics.jsonl with {}", write("stopped/metrics.jsonl", '{"step": 0}\n{}\n'), ""),
        ("metrics.jsonl with a step of text", write("stopped/metrics.jsonl", '{"step": "x"}\n'), ""),
        ("metrics.jsonl missing", remove("stopped/metrics.jsonl"), ""),
        ("samples.jsonl with bytes that are no UTF-8", write("stopped/samples.jsonl", b"\xff\xfe\n"), ""),
        ("samples.jsonl with []", write("stopped/samples.jsonl", "[]\n"), ""),
        ("samples.jsonl with 1", write("stopped/samples.jsonl", "1\n"), ""),
        ("samples.jsonl with {}", write("stopped/samples.jsonl", "{}\n"), ""),
        ("samples.jsonl with a list of answers", write("stopped/samples.jsonl", '{"during": [1]}\n'), ""),
        ("samples.jsonl a folder", both(remove("stopped/samples.jsonl"), write("stopped/samples.jsonl/x", "")), ""),
        ("settings.json binary", write("stopped/settings.json", bytes(range(256))), ""),
        ("a reference cache that is damaged", write("cache/reference-0.safetensors", "x"), ""),
    ):  # fmt: skip
        yield Case(f"checkpoint: {what}", STOPPED, word, before, (0, 2), **going_on)


GROUPS = (output_folders, resuming, models, settings, settings_files, objectives, datasets, commands, tools,
          plans_and_exports, outputs, checkpoints)  # fmt: skip


def all_cases() -> list[Case]:
    cases = [case for group in GROUPS for case in group()]
    assert len({case.name for case in cases}) == len(cases), Counter(case.name for case in cases).most_common(1)
    return cases


# ---- the folder of every case ----------------------------------------------------------------------------------------

RULES = """
import sys
NUMBER = 7
def words(row, response): return len(response.split())
def raises(row, response): raise RuntimeError("no opinion")
def leaves(row, response): sys.exit(0)
def nan(row, response): return float("nan")
def none(row, response): return None
def text(row, response): return "good"
def many(row, response): return [1, 2]
def one(response): return 1.0
"""


def fixture(folder: Path) -> None:
    """Model, judge, pairs, labelled rows, prompts, samples, scores, rules, a finished run, and one stopped in step 6."""
    import torch
    import toy
    from transformers import LlamaConfig, LlamaForSequenceClassification

    processes.small_world(folder)
    torch.manual_seed(1)
    tokenizer = toy.word_tokenizer()
    LlamaForSequenceClassification(LlamaConfig(vocab_size=len(tokenizer), **SMALL, num_labels=1)).save_pretrained(
        folder / "judge"
    )
    tokenizer.save_pretrained(folder / "judge")
    shutil.copy(folder / "pairs.jsonl", folder / "pairs2.jsonl")
    prompts = [f"name {number} fruits" for number in ("two", "three", "four")]
    made = dict(model="model", strategy="plain", n=2, batch_size=8, temperature=0.8, top_p=0.95, max_tokens=4, seed=0)
    answers = [{"prompt": [{"role": "user", "content": p}], "responses": ["apple", "pear and rice"]} for p in prompts]
    ids = [hashlib.sha256(json.dumps(row["prompt"]).encode()).hexdigest()[:16] for row in answers]
    rows("prompts.jsonl", *({"prompt": p} for p in prompts))(folder)
    rows("sampled.jsonl", *({"id": key, **row, **made} for key, row in zip(ids, answers)))(folder)
    rows("scored.jsonl", *({"id": key, **row, **made, "scores": [1.0, 3.0]} for key, row in zip(ids, answers)))(folder)
    for name, text in (("rules.py", RULES), ("raises.py", "1 / 0\n"), ("leaves.py", "import sys\nsys.exit(0)\n")):
        write(name, text)(folder)
    result = processes.wait(processes.start(shlex.split(KEPT), folder, folder.parent / "fixture"), SECONDS)
    if result != 0:
        sys.exit(f"the run that the cases start from ended with {result}:\n{(folder.parent / 'fixture.err').read_text()}")
    run, stopped = folder / "run", folder / "stopped"
    shutil.copytree(run, stopped)
    shutil.rmtree(stopped / "model")
    for step in (6, 8):
        shutil.rmtree(stopped / "checkpoints" / f"step-{step:06d}")
    remove("summary.json", "curves.png", "samples.jsonl")(stopped)
    lines = (run / "metrics.jsonl").read_text().splitlines(keepends=True)
    (stopped / "metrics.jsonl").write_text("".join(line for line in lines if json.loads(line)["step"] < 6))
    shutil.rmtree(folder / "cache", ignore_errors=True)


def snapshot(folder: Path) -> dict[str, str]:
    """{file, link or folder: what is in it}"""
    seen = {}
    for path in folder.rglob("*"):
        kind = "folder" if path.is_dir() else f"link to {os.readlink(path)}" if path.is_symlink() else None
        seen[str(path.relative_to(folder))] = kind or hashlib.sha256(path.read_bytes()).hexdigest()
    return seen


# ---- running a case --------------------------------------------------------------------------------------------------


def judge(case: Case, code: int | None, output: str, lost: list[str], same: bool = True) -> tuple[str, str]:
    """(verdict, what to say of it)"""
    lines = [line for line in output.splitlines() if line.strip()] or [""]
    where = next((i for i, line in enumerate(lines) if line.startswith("error:")), None)
    message = "\n".join(lines[where:])
    said = lines[-1 if where is None else where][:200]
    if code is None:
        return "hang", "; ".join([said, *lost])
    if "Traceback (most recent call last)" in output:
        return "traceback", lines[-1][:200]
    if lost:
        return "file lost", f"{', '.join(lost[:4])}{', …' * (len(lost) > 4)} (exit code {code}): {said}"
    if code not in case.code:
        return "wrong exit code", f"exit code {code}: {said}"
    if code == 0 and not same:
        return "wrong model", said
    if case.word and not re.search(case.word, message, re.IGNORECASE):
        return "unhelpful", f"no word of {case.word!r}: {said}"
    if code == 2 and where is None:
        return "unhelpful", f'no "error:": {said}'
    if code == 2 and (len(lines) - where > LINES or len(message) > CHARACTERS):
        return "unhelpful", f"{len(lines) - where} lines, {len(message)} characters: {said}"
    return "good", said


def words(command: str | list[str]) -> list[str]:
    return shlex.split(command) if isinstance(command, str) else command


def started(case: Case, folder: Path, output: Path, fresh: bool) -> int:
    if not case.shell:
        return processes.start(words(case.command), folder, output, fresh)
    return processes.start(case.command.format(python=sys.executable, repository=REPOSITORY), folder, output)


def run_beside(case: Case, folder: Path, output: Path) -> Callable[[], list[str]]:
    """Start what runs meanwhile, until it has a checkpoint; the function returned ends it and says what it lost."""
    process = processes.start(words(case.beside), folder, output)
    end = time.monotonic() + SECONDS
    while not list(folder.glob("out/checkpoints/*/complete")) and time.monotonic() < end:
        time.sleep(0.02)

    def ended() -> list[str]:
        time.sleep(0.5)
        processes.kill(process, signal.SIGTERM)
        if (code := processes.wait(process, SECONDS)) != 0:
            return [f"the run beside it (exit code {code}, {output.with_suffix('.err').read_text()[-200:]})"]
        try:
            steps = [json.loads(line)["step"] for line in (folder / "out" / "metrics.jsonl").read_text().splitlines()]
            whole = steps == list(range(len(steps)))
        except (OSError, ValueError):
            whole = False
        return [] if whole else ["metrics of the run beside it"]

    return ended


def run_case(case: Case, given: Path, place: Path, fresh: bool, seconds: float) -> Result:
    """One case in a copy of the folder `given`, in `place`."""
    folder, output, cache = place / "here", place / "output", place / "tokens"
    shutil.copytree(given, folder, symlinks=True)
    os.environ |= {"PLAINPO_CACHE": str(cache)}
    resource.setrlimit(resource.RLIMIT_AS, (8 * 2**30, 8 * 2**30))
    if case.before:
        case.before(folder)
    before = snapshot(folder)
    ended = run_beside(case, folder, place / "beside") if case.beside else lambda: []
    tick = time.monotonic()
    try:
        code = processes.wait(started(case, folder, output, fresh), min(seconds, 15) if case.beside else seconds)
        seconds = time.monotonic() - tick
    finally:
        harmed = ended()
    after = snapshot(folder)
    lost = [name for name, content in before.items() if after.get(name) != content]
    lost = [name for name in lost if not any(fnmatch.fnmatch(name, pattern) for pattern in case.changes)]
    text = "".join(output.with_suffix(end).read_text(errors="replace") for end in (".out", ".err"))
    same = code != 0 or not case.model or _weights(folder / case.model) == _weights(folder / "run/model")
    verdict, message = judge(case, code, text, harmed + lost, same)
    return Result(verdict, message, seconds)


def _weights(model: Path) -> bytes:
    return (model / "model.safetensors").read_bytes()


def in_parallel(cases: list[Case], given: Path, jobs: int, fresh: bool, seconds: float) -> Iterator[tuple[Case, Result]]:
    """Every case in a process that prepares, starts and judges it; results in the order in which they end."""
    waiting, running = list(reversed(cases)), {}
    while waiting or running:
        while waiting and len(running) < jobs:
            case, place = waiting.pop(), Path(tempfile.mkdtemp(dir=given.parent))
            if (worker := os.fork()) == 0:
                try:
                    result = run_case(case, given, place, fresh, seconds)
                    (place / "result").write_text(json.dumps(result))
                except BaseException:
                    traceback.print_exc()
                finally:
                    os._exit(0)
            running[worker] = case, place
        worker, _ = os.wait()
        case, place = running.pop(worker)
        if not (place / "result").exists():
            sys.exit(f"{case.name}: the study itself failed")
        yield case, Result(*json.loads((place / "result").read_text()))
        shutil.rmtree(place)


def table(results: list[tuple[Case, Result]]) -> str:
    """What is not good, a line each."""

    def cell(text):
        return text.replace("|", "\\|").replace("\n", " ")

    lines = ["| case | verdict | message |", "| --- | --- | --- |"]
    return "\n".join(lines + [f"| {cell(c.name)} | {r.verdict} | {cell(r.message)} |" for c, r in results])


def by_kind(results: list[tuple[Case, Result]]) -> str:
    """How many of each kind, the word in front of a case's colon, are good."""
    cases, good = Counter(), Counter()
    for case, result in results:
        kind = case.name.partition(":")[0]
        cases[kind] += 1
        good[kind] += result.verdict == "good"
    return "\n".join(
        ["| kind | cases | good |", "| --- | --- | --- |", *(f"| {k} | {n} | {good[k]} |" for k, n in cases.items())]
    )


def main(argv: list[str] | None = None, cases: list[Case] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", help="cases whose name holds one of these words")
    parser.add_argument("--jobs", type=int, default=2, help="cases at a time (2)")
    parser.add_argument("--exec", action="store_true", help="a new interpreter for each case instead of a fork of this one")
    parser.add_argument("--seconds", type=float, default=SECONDS, help=f"a process that takes longer hangs ({SECONDS:g})")
    parser.add_argument("--list", action="store_true", help="print the names of the cases and their command lines")
    parser.add_argument("--all", action="store_true", help="also print the good ones, with their message")
    args = parser.parse_args(argv)
    cases = all_cases() if cases is None else cases
    cases = [case for case in cases if args.only is None or any(word in case.name for word in args.only)]
    if args.list:
        print("\n".join(f"{case.name:<60} {shlex.join(words(case.command))[:400]}" for case in cases))
        return 0
    processes.preload()
    import data

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as place:
        os.environ["TMPDIR"] = tempfile.tempdir = place
        (given := Path(place) / "given").mkdir()
        fixture(given)
        done = in_parallel(cases, given, args.jobs, args.exec, args.seconds)
        order, results = [case.name for case in cases], list(data.progress(done, "bad inputs", "cases", len(cases)))
        tempfile.tempdir = None
    results.sort(key=lambda pair: order.index(pair[0].name))
    bad = [pair for pair in results if pair[1].verdict != "good"]
    if shown := results if args.all else bad:
        print(table(shown) + "\n")
    print(by_kind(results) + "\n")
    counts = Counter(result.verdict for _, result in results)
    print(f"{len(results)} cases: {', '.join(f'{counts[v]} {v}' for v in VERDICTS if counts[v] or v == 'good')}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
