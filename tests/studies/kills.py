"""Kill a run at a random moment, go on with --resume, and compare its end with an unbroken run's, over and over.

    python tests/studies/kills.py                                   # 40 runs
    python tests/studies/kills.py --runs 200 --seed 1 --out runs/kills --picture kills.png

The run: 12 steps on 40 pairs of the toy task, a checkpoint every second step, reference log-probs cached. Half of the
moments are drawn uniformly over the time that an unbroken run takes (the shortest of three, which must be equal), half are up
to 0.1 s after a step that is drawn. Half of the kills are SIGKILL, the others ask the run to stop: SIGTERM, once or, as a
batch system does, twice within a second, SIGHUP, or Ctrl-C. A run that goes on may be killed again (probability ½). Of every
third run something is damaged after each kill: a file of the newest whole checkpoint or the reference log-probs, a bit flipped
or cut; or run.json, beside a whole checkpoint, is emptied or gone. The end is weights, metrics (speeds left out) and samples,
byte for byte.

    equal       as the unbroken run's
    different   not
    lost        a whole checkpoint was there, and the run began again all the same
    error       a command ended with another exit code than 0, or, when asked to stop, 128 + the signal's number

Exit code 1 if any is not equal.
"""

import argparse
import hashlib
import json
import os
import random
import shlex
import shutil
import signal
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

sys.path.insert(0, str(Path(__file__).parent))

import processes  # noqa: E402
from processes import TRAIN  # noqa: E402

STEPS = 12
COMMAND = f"{TRAIN} --max-steps {STEPS} --epochs 3 --save-every 2 --eval-every 4 --objective dpo --weight-decay 0.1"
SECONDS = 60.0  # a command that takes longer is an error
SPEEDS = ("seconds", "tokens_per_second", "peak_memory_gib")
PLACES = (
    "before the first step",
    "between checkpoints",
    "while a checkpoint is written",
    "after the last step",
    "after the end",
)
TERM, TWICE, HUP, INT, KILL = "SIGTERM", "SIGTERM twice", "SIGHUP", "SIGINT", "SIGKILL"
VERDICTS = ("equal", "different", "lost", "error")


class Kill(NamedTuple):
    moment: float  # seconds after the start
    signal: str
    place: str
    damage: str | None  # what was done to what was left


class Life(NamedTuple):
    """A run from its first start to its end."""

    kills: list[Kill]
    verdict: str
    why: str


def end_of(out: Path) -> dict:
    """What must be equal at the end of a run."""
    lines = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k not in SPEEDS} for line in lines]
    weights = hashlib.sha256((out / "model" / "model.safetensors").read_bytes()).hexdigest()
    return {"weights": weights, "metrics": metrics, "samples": (out / "samples.jsonl").read_text()}


def last_step(out: Path) -> int:
    file = out / "metrics.jsonl"
    lines = file.read_text().split("\n")[:-1] if file.exists() else []
    return max((json.loads(line)["step"] for line in lines), default=0)


def place_of(out: Path) -> str:
    """How far a run had come, by what it left."""
    step = last_step(out)
    if step == 0:
        return "before the first step"
    if (out / "summary.json").exists():
        return "after the end"
    for folder in (out / "checkpoints").glob("step-*"):
        if folder.suffix == ".part" or not (folder / "complete").exists():
            return "while a checkpoint is written"
    return "after the last step" if step == STEPS else "between checkpoints"


def whole_checkpoints(out: Path) -> list[Path]:
    """Those whose files are what their marker says, read again here."""
    whole = []
    for marker in sorted((out / "checkpoints").glob("step-*/complete")):
        files = {path.name: path.read_bytes() for path in marker.parent.iterdir() if path != marker}
        if {name: [len(content), zlib.crc32(content)] for name, content in files.items()} == json.loads(marker.read_text()):
            whole.append(marker.parent)
    return whole


def damage(out: Path, draw: random.Random) -> str | None:
    """Damage a file of the newest whole checkpoint, run.json beside one, or the reference log-probs; returns what was done.

    run.json is left where it is damaged already or no checkpoint is whole, and then the last checkpoint is: else a run is lost.
    """
    run, whole = out / "run.json", whole_checkpoints(out)
    kind = draw.choice(("checkpoint", "checkpoint", "run", "reference"))
    if kind == "reference":
        kept = sorted((out.parent / "cache").glob("reference-*.safetensors"))
        return broken(draw.choice(kept), draw) if kept else None
    if not whole or not run.exists() or run.stat().st_size == 0:
        return None
    if kind == "checkpoint":
        return broken(draw.choice(sorted(path for path in whole[-1].iterdir() if path.name != "complete")), draw)
    run.unlink()
    if draw.random() < 0.5:
        return "run.json removed"
    run.touch()
    return "run.json emptied"


def broken(file: Path, draw: random.Random) -> str:
    """Flip a bit of a file, or cut it."""
    content = bytearray(file.read_bytes())
    if not content:
        return f"{file.name} cut before"
    at = draw.randrange(len(content))
    if draw.random() < 0.5:
        content[at] ^= 1 << draw.randrange(8)
        file.write_bytes(content)
        return f"{file.name} flipped at {at}"
    file.write_bytes(content[:at])
    return f"{file.name} cut at {at}"


def start(folder: Path, more: str = "") -> int:
    return processes.start(shlex.split(f"{COMMAND} {more}"), folder, folder / "log")


def said(folder: Path) -> str:
    """The last line on standard error."""
    return (folder / "log.err").read_text().strip().rpartition("\n")[2][:300]


def wait_for_moment(out: Path, duration: float, draw: random.Random) -> None:
    """Until a random moment of a run that has just been started: of its time, or after one of the steps that it has to do."""
    begun = time.monotonic()
    done = last_step(out)
    if draw.random() < 0.5 or done == STEPS:
        return time.sleep(draw.uniform(0, duration))
    step = draw.randint(done + 1, STEPS)
    pause = draw.uniform(0, 0.1)
    while last_step(out) < step and time.monotonic() < begun + SECONDS:
        time.sleep(0.002)
    time.sleep(pause)


def killed(folder: Path, process: int, duration: float, name: str, draw: random.Random, harm: bool) -> Kill:
    """Kill a run at a moment of its own, and perhaps damage what it left."""
    out = folder / "out"
    tick = time.monotonic()
    wait_for_moment(out, duration, draw)
    number = signal.Signals[name.split()[0]]
    for _ in range(1 + (name == TWICE)):
        processes.kill(process, number)
        time.sleep(0.05)
    moment = time.monotonic() - tick
    code = processes.wait(process, SECONDS)
    if code not in (-number, 128 + number, 0):  # before it listens; asked to stop; the end came first
        raise RuntimeError(f"exit code {code} after {name}: {said(folder)}")
    if code == 0 and not (out / "model" / "config.json").exists():
        raise RuntimeError(f"exit code 0 after {name}, and no model: {said(folder)}")
    place = place_of(out)
    return Kill(moment, name, place, damage(out, draw) if harm else None)


def go_on(folder: Path, draw: random.Random) -> int:
    """Start with --resume, which refuses where there is no run; where none has come to its first step, with it or without."""
    out = folder / "out"
    if not (out / ".lock").exists():
        code = processes.wait(start(folder, "--resume"), SECONDS)
        if code != 2:
            raise RuntimeError(f"--resume without a run ended with {code}: {said(folder)}")
        return start(folder)
    blank = {path.name for path in out.iterdir()} <= {".lock", "run.json", "run.part"}
    return start(folder, "" if blank and draw.random() < 0.5 else "--resume")


def life(folder: Path, index: int, duration: float, expected: dict, draw: random.Random) -> Life:
    """One run, killed once or more often, to its end."""
    kills = []
    out = folder / "out"
    try:
        process = start(folder)
        again = True
        while again:
            name = draw.choice((KILL, KILL, KILL, KILL, TERM, TWICE, HUP, INT))
            kill = killed(folder, process, duration, name, draw, index % 3 == 2)
            kills.append(kill)
            whole = len(whole_checkpoints(out))
            (folder / "log.err").write_text("")
            process = go_on(folder, draw)
            again = len(kills) < 6 and draw.random() < 0.5
        finished = kill.place == "after the end"  # there --resume may say so and leave it at that
        code = processes.wait(process, SECONDS)
        if code != 0 and not (finished and code == 2):
            return Life(kills, "error", f"exit code {code}: {said(folder)}")
        if whole > 0 and not finished and "resumed after step" not in (folder / "log.err").read_text():
            return Life(kills, "lost", f"{whole} whole checkpoints, but: {said(folder)}")
        found = end_of(out)
    except (RuntimeError, OSError, ValueError) as error:
        return Life(kills, "error", str(error))
    differs = [name for name in expected if expected[name] != found[name]]
    return Life(kills, "different" if differs else "equal", ", ".join(differs))


def lives(place: Path, runs: int, seed: int) -> Iterator[tuple[float, Life]]:
    """(duration of the unbroken run, a run that was killed), one after the other."""
    given = place / "given"
    given.mkdir(parents=True)
    processes.small_world(given)
    durations = []
    ends = []
    for again in range(min(3, runs)):
        unbroken = place / f"unbroken-{again}"
        shutil.copytree(given, unbroken)
        tick = time.monotonic()
        code = processes.wait(start(unbroken), SECONDS)
        if code != 0:
            sys.exit(f"the unbroken run ended with {code}: {said(unbroken)}")
        durations.append(time.monotonic() - tick)
        ends.append(end_of(unbroken / "out"))
    if any(end != ends[0] for end in ends):
        sys.exit("unbroken runs differ among themselves: there is nothing to compare with")
    duration = min(durations)
    for index in range(runs):
        folder = place / f"run-{index:03d}"
        shutil.copytree(given, folder)
        found = life(folder, index, duration, ends[0], random.Random(f"{seed} {index}"))
        yield duration, found
        if found.verdict == "equal":
            shutil.rmtree(folder)


def table(found: list[Life]) -> str:
    """By where a kill struck, and whether something was damaged after it: how the runs ended."""
    lines = ["| killed | damaged | kills | " + " | ".join(VERDICTS) + " |", "|---" * 7 + "|"]
    for place in PLACES:
        for harmed in (False, True):
            same = [x.verdict for x in found for k in x.kills if k.place == place and harmed == (k.damage is not None)]
            cells = [place, "yes" if harmed else "–", len(same), *map(same.count, VERDICTS)]
            lines += [f"| {' | '.join(map(str, cells))} |"] if same else []
    return "\n".join(lines)


def story(kill: Kill) -> str:
    harm = f", {kill.damage}" if kill.damage else ""
    return f"{kill.signal} {kill.place}{harm}"


def picture(found: list[Life], path: str) -> None:
    """How often a kill struck at each moment, by what it interrupted."""
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8, 3), layout="constrained")
    kills = [kill for x in found for kill in x.kills]
    moments = [[kill.moment for kill in kills if kill.place == place] for place in PLACES]
    axis.hist(moments, bins=24, stacked=True, label=PLACES)
    axis.set(xlabel="seconds after the start", ylabel="kills")
    axis.legend(fontsize=8, frameon=False)
    figure.savefig(path, dpi=100)
    plt.close(figure)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=int, default=40, help="runs to kill (40)")
    parser.add_argument("--seed", type=int, default=0, help="of the moments (0)")
    parser.add_argument("--out", type=Path, help="a new folder that keeps what did not end equal")
    parser.add_argument("--picture", help="a histogram of the moments, which needs matplotlib")
    args = parser.parse_args(argv)
    processes.preload()
    signal.signal(signal.SIGINT, signal.default_int_handler)  # which a shell's background lacks, and a Ctrl-C needs
    import data

    with tempfile.TemporaryDirectory() as scratch:
        place = args.out or Path(scratch) / "kills"
        os.environ["PLAINPO_CACHE"] = str(place / "tokens")
        timed = list(data.progress(lives(place, args.runs, args.seed), "kills", "runs", args.runs))
    duration = timed[0][0]
    found = [life for _, life in timed]
    print(table(found) + "\n")
    for index, x in enumerate(found):
        if x.verdict != "equal":
            print(f"run-{index:03d} {x.verdict}: {x.why} ({'; '.join(map(story, x.kills))})")
    kills = [kill for x in found for kill in x.kills]
    counts = Counter(x.verdict for x in found)
    signals = Counter(kill.signal for kill in kills)
    by_signal = ", ".join(f"{n} {name}" for name, n in sorted(signals.items()))
    ends = ", ".join(f"{counts[v]} {v}" for v in VERDICTS)
    told = f"{len(found)} runs, {len(kills)} kills ({by_signal}): {ends}"
    print(f"{told}; an unbroken run takes {duration:.1f} s, seed {args.seed}")
    if args.picture:
        picture(found, args.picture)
    return 0 if counts["equal"] == len(found) else 1


if __name__ == "__main__":
    sys.exit(main())
