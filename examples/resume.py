"""Kill a training run at a random moment, resume it, and compare it bit for bit.

    python resume.py

A second process trains and saves every few steps; it is killed, started again to go on from its
last checkpoint, and compared with an uninterrupted run. The EMA needs no line of its own: it is in
the optimizer's state dict. The exit code is 0 if all weights are bit-equal.
"""

import argparse
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from ema_optim import EMAOptimizer, compute_optimal_decay

SAVE_EVERY = 5  # steps


def train(path: Path, steps: int) -> dict[str, dict[str, Tensor]]:
    torch.set_num_threads(1)  # the model is too small to share
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, 512), nn.ReLU(), nn.Dropout(0.1), nn.Linear(512, 10))
    adamw = torch.optim.AdamW(model.parameters(), lr=1e-3)
    optimizer = EMAOptimizer(adamw, decay=compute_optimal_decay(steps))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=steps)
    parts = {"model": model, "optimizer": optimizer, "scheduler": scheduler}
    done = load(path, parts) if path.exists() else 0
    for step in range(done + 1, steps + 1):
        inputs = torch.randn(256, 64)
        loss = cross_entropy(model(inputs), inputs[:, :10].argmax(dim=1))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        if step % SAVE_EVERY == 0 or step == steps:
            save(path, parts, step)
        print(step, flush=True)
    return {"training weights": model.state_dict(), "EMA weights": optimizer.get_ema_state(model)}


def save(path: Path, parts: dict, step: int) -> None:
    checkpoint = {name: part.state_dict() for name, part in parts.items()}
    checkpoint |= {"step": step, "rng": torch.get_rng_state()}  # rng: the data and the dropout
    torch.save(checkpoint, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)  # atomic: path is a whole checkpoint at any time


def load(path: Path, parts: dict) -> int:
    checkpoint = torch.load(path, weights_only=True)
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    torch.set_rng_state(checkpoint["rng"])
    return checkpoint["step"]


def train_in_a_process(path: Path, steps: int, kill_at: int | None = None) -> int:
    command = [sys.executable, __file__, "--steps", str(steps), "--train", str(path)]
    reported = []
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout:
            reported.append(int(line))
            if reported[-1] == kill_at:
                process.kill()  # SIGKILL: it can neither finish nor clean up
    print(f"{path.name}: steps {reported[0]} to {reported[-1]}, exit code {process.returncode}")
    return process.returncode


def kill_and_resume(folder: Path, steps: int) -> bool:
    killed, whole = folder / "killed.pt", folder / "uninterrupted.pt"
    killed.unlink(missing_ok=True)
    whole.unlink(missing_ok=True)
    while train_in_a_process(killed, steps, random.randint(SAVE_EVERY, steps // 2)) == 0:
        killed.unlink()  # it was done before the signal came: once more
    if train_in_a_process(killed, steps) or train_in_a_process(whole, steps):
        return False
    resumed, expected = train(killed, steps), train(whole, steps)  # no steps left: they only load
    equal = True
    for kind, state in resumed.items():
        for name, tensor in state.items():
            same = torch.equal(tensor, expected[kind][name])
            print(f"{kind:<18}{name:<10}{'bit-equal' if same else 'DIFFERENT'}")
            equal &= same
    return equal


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=400, help="at least 20")
    parser.add_argument("--folder", type=Path, help="of the checkpoints (default: temporary)")
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)  # the process to be killed
    args = parser.parse_args()
    if args.train:
        sys.exit(not train(args.train, args.steps))
    with tempfile.TemporaryDirectory() as temporary:
        sys.exit(not kill_and_resume(args.folder or Path(temporary), args.steps))
