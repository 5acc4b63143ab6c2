"""Kill a small training run at random moments for hours, and see that what it learns is what it would have learnt.

    python scripts/soak.py --minutes 60 --out /tmp/soak

Prints the number of kills, what was left half-written and cleared, and whether the end is that of a run in one go, to
the bit; exits with 1 where it is not. It runs on one core.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import load_file

from ditcli.runs import RunDir, state_file
from ditcli.training.metrics import read_metrics

SETTINGS = """--data fashion-mnist --pixels --image-size 28 --model DiT-S/4 --width 32 --depth 2 --num-heads 2
    --batch-size 16 --lr 1e-3 --log-every 7 --checkpoint-every 10 --keep-checkpoints 2 --sample-every 50 --sample-num 1
    --sample-steps 2 --ema-snapshot-every 100 --precision fp32 --device cpu"""


def train(out: Path, steps: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "ditcli", "train", *SETTINGS.split(), f"--steps={steps}", f"--out={out}"]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)


def end_of(run: RunDir) -> tuple[dict[str, torch.Tensor], list[tuple[float, ...]]]:
    """Weights and training state, and the curve."""
    newest = run.newest_checkpoint()
    tensors = load_file(newest) | {f"state.{name}": value for name, value in load_file(state_file(newest)).items()}
    tensors.pop("state.seconds")
    return tensors, [(row.step, row.loss, row.grad_norm) for row in read_metrics(run.metrics_file)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--out", type=Path, default=Path("soak"))
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    shutil.rmtree(options.out, ignore_errors=True)
    rng, run = random.Random(options.seed), RunDir(options.out / "killed")
    kills, partial, until = 0, 0, time.monotonic() + 60 * options.minutes
    while time.monotonic() < until:
        process, reached = train(run.path, 10**9), run.saved_steps()
        if rng.random() < 0.2:
            time.sleep(rng.uniform(0.0, 5.0))  # while it starts
        else:
            while process.poll() is None and run.saved_steps() == reached:
                time.sleep(0.01)
            time.sleep(rng.uniform(0.0, 1.0))
        process.send_signal(signal.SIGKILL)
        process.wait()
        kills += 1
        partial += sum("partial" in path.name or path.name.startswith(".tmp") for path in run.path.rglob(".*"))
        print(f"kill {kills}: at step {(run.saved_steps() or [0])[-1]:,}", file=sys.stderr, flush=True)
    steps = 10 * ((run.saved_steps() or [0])[-1] // 10 + 1)
    whole = RunDir(options.out / "whole")
    for path in (run.path, whole.path):
        if train(path, steps).wait():
            sys.exit(f"the run in {path} failed.")
    ends = [end_of(each) for each in (whole, run)]
    different = [name for name, value in ends[0][0].items() if not torch.equal(value, ends[1][0].get(name, value + 1))]
    left = [str(path) for path in run.path.rglob(".*")]
    print(f"{kills} kills in {steps:,} steps; {partial} half-written files found after them, {len(left)} at the end")
    same = ends[0][1] == ends[1][1]
    print(f"{len(different)} of {len(ends[0][0])} tensors differ; the curve is {'the same' if same else 'another'}")
    sys.exit(bool(different or left or not same))


if __name__ == "__main__":
    main()
