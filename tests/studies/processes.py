"""Command lines of the project as processes of their own, for tests, and for studies that need hundreds of them.

`start` forks: the child is a process with its own folder, output and exit code and runs the file as `python FILE …` would, but
torch, transformers and datasets are imported already, which is 4 of the 4.5 seconds. It computes with one thread, since a fork
has none of its parent's. `fresh=True` starts a new interpreter. `run` waits for the end and returns what was said.
"""

import contextlib
import io
import json
import os
import runpy
import signal
import sys
import tempfile
import threading
import time
import traceback
from pathlib import Path
from typing import NamedTuple

REPOSITORY = Path(__file__).parents[2]
sys.path[:0] = [str(REPOSITORY), str(REPOSITORY / "tests"), str(REPOSITORY / "tests" / "tools")]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "MPLBACKEND": "agg"}

SMALL = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, pad_token_id=3)
TRAIN = (
    "train.py --model model --dataset pairs.jsonl --out out --lr 1e-3 --batch-size 8 --eval-size 8 --max-steps 1 --samples 1 "
    "--sample-tokens 4 --cache cache --dtype fp32"
)


class Done(NamedTuple):
    """A process that has ended."""

    code: int | None  # below 0 the signal that ended it, None if it took too long and was killed
    out: str
    err: str


def preload() -> None:
    """Import all that the command lines import, for one thread and without a network."""
    os.environ |= ENVIRONMENT
    import data, distributed  # noqa: E401, F401, I001
    import transformers.models.llama.modeling_llama  # noqa: F401
    from tqdm import tqdm

    tqdm.set_lock(threading.RLock())  # its own is shared with children: one that is killed may hold it for ever
    tqdm.monitor_interval = 0  # no thread of its own
    with contextlib.suppress(ImportError):
        import matplotlib.pyplot  # noqa: F401


def run(command: list[str] | str, folder: Path, seconds: float = 120) -> Done:
    """`start`, and wait so many seconds for the end."""
    with tempfile.TemporaryDirectory() as place:
        output = Path(place) / "said"
        code = wait(start(command, folder, output), seconds)
        out, err = (output.with_suffix(end).read_bytes().decode(errors="replace") for end in (".out", ".err"))
    return Done(code, out, err)


def start(command: list[str] | str, folder: Path, output: Path, fresh: bool = False) -> int:
    """Run a file of the repository with its arguments, or a line for bash, in `folder`; returns the process's number.

    What it says goes to `output`.out and .err.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    if (child := os.fork()) != 0:
        return child
    try:
        os.setsid()  # a signal to its group reaches what it starts, and a Ctrl-C here does not reach it
        os.chdir(folder)
        for number, name in enumerate((os.devnull, f"{output}.out", f"{output}.err")):
            os.dup2(os.open(name, os.O_RDWR if number == 0 else os.O_CREAT | os.O_WRONLY | os.O_APPEND), number)
        if isinstance(command, str):
            os.execvp("bash", ["bash", "-o", "pipefail", "-c", command])
        argv = [str(REPOSITORY / command[0]), *command[1:]]
        if fresh:
            os.execv(sys.executable, [sys.executable, *argv])
        _run(argv)
    finally:
        os._exit(70)


def _run(argv: list[str]) -> None:
    """What the interpreter does with a script, up to its exit code."""
    if "torch" in sys.modules:
        sys.modules["torch"].set_num_threads(1)
    sys.argv, sys.stdin = argv, open(0)
    sys.path.insert(0, str(Path(argv[0]).parent))
    sys.stdout = io.TextIOWrapper(open(1, "wb", closefd=False), encoding="utf-8")
    sys.stderr = io.TextIOWrapper(open(2, "wb", 0, closefd=False), "utf-8", "backslashreplace", write_through=True)
    code = 0
    try:
        runpy.run_path(argv[0], run_name="__main__")
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(error.code is not None)
        if isinstance(error.code, str):
            print(error.code, file=sys.stderr)
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    sys.stdout.flush()
    os._exit(code)


def wait(process: int, seconds: float) -> int | None:
    """Its exit code, below 0 the signal that ended it; None, and it is killed with all it started, after so many seconds."""
    end = time.monotonic() + seconds
    try:
        while time.monotonic() < end:
            done, status = os.waitpid(process, os.WNOHANG)
            if done:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
    except BaseException:
        kill(process)
        raise
    kill(process)
    os.waitpid(process, 0)
    return None


def kill(process: int, number: int = signal.SIGKILL) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process, number)


def small_world(folder: Path, pairs: int = 40) -> None:
    """A folder as a user has it: `model` (an untrained Llama), pairs.jsonl, and the same as rows.jsonl with labels."""
    import torch
    import toy
    from transformers import LlamaConfig, LlamaForCausalLM
    from worlds import world_pairs

    tokenizer, rows = toy.word_tokenizer(), world_pairs(0, 0, pairs)
    torch.manual_seed(0)
    more = dict(tie_word_embeddings=True, bos_token_id=None, eos_token_id=3, max_position_embeddings=256)
    LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **SMALL, **more)).save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    paired = [{"prompt": p.prompt, "chosen": p.responses[0]["content"], "rejected": p.responses[1]["content"]} for p in rows]
    single = [
        {"prompt": p.prompt, "completion": p.responses[i % 2]["content"], "label": i % 2 == 0} for i, p in enumerate(rows)
    ]
    for name, lines in (("pairs", paired), ("rows", single)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
