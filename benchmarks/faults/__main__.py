"""What a run survives, and how long training stands still for a save.

    python -m benchmarks.faults [--kills N] [--seed S]

A run of two ranks under `bash launch/train.sh retries=...` is killed at random moments: one rank, or both, at least a
quarter of the times while a checkpoint is being written. It is compared with a run that nothing happened to. Then the
state of an adapter of 100 M parameters on two ranks is saved: the time that training waits for is set against the time
to the end of the save.
"""

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors.torch import load_file

from tests.support.ranks import run_ranks
from tests.support.workplace import REPOSITORY, Workplace, make_workplace
from trainer.checkpoint import storage

STEPS, SAVE_EVERY = 2400, 20
WORLD = 2
AT_MOST = 4.0  # seconds of training before a kill
EVERY_DURING_A_SAVE = 3  # of this many kills, one waits for a save
RESUMED = "resume          "


@dataclass
class Found:
    """What the kills came to. redone: steps done again, by kill."""

    kills: int = 0
    during_a_save: int = 0
    resumed: int = 0
    lost_checkpoints: int = 0
    redone: list[int] = field(default_factory=list)


def command(run: str, *more: str) -> list[str]:
    script = str(REPOSITORY / "launch" / "train.sh")
    zero3 = f"deepspeed.config={REPOSITORY / 'ds_configs' / 'zero3.json'}"
    length = [f"train.steps={STEPS}", "train.eval_every=0", f"checkpoint.save_every={SAVE_EVERY}"]
    size = ["adapter.expert_rank=64"]
    return ["bash", script, f"num_gpus={WORLD}", "recipe.yaml", f"run.name={run}", zero3, *length, *size, *more]


def kill_again_and_again(place: Workplace, kills: int, seed: int) -> tuple[Found, str]:
    """Starts the run, kills it `kills` times and lets it come to its end; what was found, and all that it said."""
    chance, found = random.Random(seed), Found()
    log = place.folder / "killed.log"
    run = place.folder / "runs" / "killed"
    with (
        log.open("w") as output,
        subprocess.Popen(
            command("killed", f"retries={2 * kills}"),
            cwd=place.folder,
            env=place.environment(),
            stdout=output,
            stderr=output,
        ) as launch,
    ):
        starts = 0
        while found.kills < kills:
            ranks = wait_for_ranks(launch)
            kill_once(chance, found, ranks, run)
            while any(psutil.pid_exists(pid) for pid in ranks):
                time.sleep(0.05)
            published = max(storage.steps_in(run / "checkpoints"), default=0)
            done = last_step(run)
            starts = wait_for_start(launch, log, starts)
            began = resumed_at(log)
            found.resumed += 1
            found.lost_checkpoints += began < published
            found.redone.append(done - began)
            print(f"kill {found.kills:2}: done {done:4}, saved {published:4}, gone on from {began:4}", flush=True)
        if launch.wait(600):
            raise RuntimeError(f"the run did not come to its end:\n{log.read_text()[-3000:]}")
    return found, log.read_text()


def kill_once(chance: random.Random, found: Found, ranks: list[int], run: Path) -> None:
    """SIGKILL to one rank or all: at a random moment, or when the next save has begun."""
    chosen = chance.choice([ranks, [ranks[0]], [ranks[1]]])
    if found.kills % EVERY_DURING_A_SAVE == 0:
        wait_for_a_save(run / "checkpoints", ranks)
        time.sleep(chance.uniform(0, 0.01))
    else:
        moment = chance.uniform(-6.0, AT_MOST)  # some while it is still loading
        begun = time.monotonic()
        size = metrics_size(run)
        while moment > 0 and metrics_size(run) <= size and time.monotonic() < begun + 60 and alive(ranks):
            time.sleep(0.01)
        time.sleep(moment + 6.0 if moment < 0 else moment)
    saving = any((run / "checkpoints").glob(".step-*.partial"))
    for pid in chosen:
        os.kill(pid, signal.SIGKILL)
    found.kills += 1
    found.during_a_save += saving


def wait_for_a_save(checkpoints: Path, ranks: list[int]) -> None:
    while alive(ranks):
        if checkpoints.is_dir() and any(name.endswith(".partial") for name in os.listdir(checkpoints)):
            return


def alive(ranks: list[int]) -> bool:
    return all(psutil.pid_exists(pid) for pid in ranks)


def metrics_size(run: Path) -> int:
    path = run / "metrics.jsonl"
    return path.stat().st_size if path.exists() else 0


def last_step(run: Path) -> int:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


def wait_for_ranks(launch: subprocess.Popen) -> list[int]:
    """The processes of all ranks, in their order."""
    while launch.poll() is None:
        ranks = {}
        for process in psutil.Process(launch.pid).children(recursive=True):
            try:
                if "RANK" in process.environ():
                    ranks[int(process.environ()["RANK"])] = process.pid
            except psutil.Error:
                continue
        if len(ranks) == WORLD:
            return [ranks[rank] for rank in range(WORLD)]
        time.sleep(0.02)
    raise RuntimeError(f"the launch ended with {launch.returncode}")


def wait_for_start(launch: subprocess.Popen, log: Path, starts: int) -> int:
    """Waits until one more start has said from where it goes on, and returns how many have."""
    while launch.poll() is None:
        said = log.read_text().count(RESUMED)
        if said > starts:
            return said
        time.sleep(0.02)
    raise RuntimeError(f"the launch ended with {launch.returncode}:\n{log.read_text()[-3000:]}")


def resumed_at(log: Path) -> int:
    """The step of the last start's checkpoint; 0 where there was none."""
    line = next(line for line in reversed(log.read_text().splitlines()) if line.startswith(RESUMED))
    return int(line.rpartition(" ")[2]) if line.rpartition(" ")[2].isdecimal() else 0


def equal_runs(place: Workplace) -> bool:
    """Whether the killed run's numbers and adapter are, bit for bit, those of the unbroken one."""
    keys = ("step", "loss", "grad_norm", "learning_rate", "router_weight")
    numbers = [[[r[key] for key in keys] for r in place.records(run)] for run in ("killed", "unbroken")]
    adapters = [
        load_file(place.folder / "runs" / run / "adapter" / "adapter_model.safetensors")
        for run in ("killed", "unbroken")
    ]
    return numbers[0] == numbers[1] and all(torch.equal(adapters[0][n], tensor) for n, tensor in adapters[1].items())


def stall(folder: Path) -> dict[str, Any]:
    """Seconds that training waits for a save, and that the save takes, of an adapter of 100 M parameters."""
    output = folder / "stall.json"
    run_ranks(WORLD, ["-m", "benchmarks.faults.rank", str(folder / "checkpoints"), str(output)])
    return json.loads(output.read_text())


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0, help="of the moments and of who is killed")
    options = parser.parse_args(arguments)
    os.environ["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        timed = stall(folder)
        place = make_workplace(folder / "place")
        if (prepared := place.teamlora("prepare", "recipe.yaml")).returncode:
            raise RuntimeError(prepared.stderr)
        unbroken = place.run(*command("unbroken"))
        if unbroken.returncode:
            raise RuntimeError(unbroken.stdout + unbroken.stderr)
        found, _ = kill_again_and_again(place, options.kills, options.seed)
        equal = equal_runs(place)
    print(f"\n{found.kills} kills, {found.during_a_save} during a save; {found.resumed} starts went on, ", end="")
    print(f"{found.lost_checkpoints} of them from behind a whole checkpoint; equal to the unbroken run: {equal}")
    waits, saves = timed["stall"], timed["blocking"]
    print(f"saves of {timed['parameters'] / 1e6:.0f} M parameters, seconds: training waits ", end="")
    print(f"{statistics.median(waits):.2f} (the first time {waits[0]:.2f}) of {statistics.median(saves):.2f}")
    numbers = {
        "kills": found.kills,
        "kills_during_a_save": found.during_a_save,
        "resumed": found.resumed,
        "lost_checkpoints": found.lost_checkpoints,
        "max_redone_steps": max(found.redone),
        "save_every": SAVE_EVERY,
        "equal_to_unbroken": int(equal),
        "stall_over_blocking": round(statistics.median(waits) / statistics.median(saves), 3),
        "first_stall_over_blocking": round(waits[0] / saves[0], 3),
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
    }
    print(json.dumps(numbers))


if __name__ == "__main__":
    main()
