"""A process killed at any moment of a loop that saves atomically resumes bit for bit."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from reference import same

SCRIPT = """
import os, sys, torch
from ema_optim import EMAOptimizer
from offloads import Threaded, on_host

folder, steps, where = sys.argv[1], int(sys.argv[2]), sys.argv[3]
build = EMAOptimizer
if where == "on the host":  # a worker averages
    def build(*args, **options):
        return on_host(EMAOptimizer, *args, accelerator=Threaded, update_every=2, **options)
path = os.path.join(folder, "checkpoint.pt")
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(6, 32), torch.nn.Tanh(), torch.nn.Linear(32, 2))
optimizer = build(torch.optim.AdamW(model.parameters(), lr=0.01), decay=0.9)
start = 0
if os.path.exists(path):
    saved = torch.load(path, weights_only=True)
    model.load_state_dict(saved["model"])
    optimizer.load_state_dict(saved["optimizer"])
    start = saved["step"]
for step in range(start, steps):
    optimizer.train()
    batch = torch.randn(8, 6, generator=torch.Generator().manual_seed(step))
    optimizer.zero_grad()
    model(batch).square().sum().backward()
    optimizer.step()
    if step % 3 == 0 and step > 30:
        optimizer.eval()  # some checkpoints are written while swapped
    state = {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "step": step + 1}
    torch.save(state, path + ".tmp")
    os.replace(path + ".tmp", path)
    print(step, flush=True)
"""


def start(folder, where, steps):
    arguments = [sys.executable, "-c", SCRIPT, str(folder), str(steps), where]
    support = str(Path(__file__).parent.parent)
    environment = {**os.environ, "PYTHONPATH": f"{support}:{os.environ.get('PYTHONPATH', '')}"}
    return subprocess.Popen(arguments, stdout=subprocess.PIPE, text=True, env=environment)


def kill(process, random):
    """In the middle of a step or of a save."""
    for _ in range(random.randrange(5, 40)):
        process.stdout.readline()
    time.sleep(random.random() * 0.01)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


ROWS = [("beside the weights", 150, 3), ("on the host", 50, 1)]


@pytest.mark.parametrize(("where", "steps", "times"), ROWS)
def test_killed_runs_resume_bit_for_bit(tmp_path, where, steps, times):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    uninterrupted = start(whole, where, steps)
    moments = random.Random(0)
    for _ in range(times):
        kill(start(killed, where, steps), moments)
    for process in (uninterrupted, start(killed, where, steps)):
        process.communicate(timeout=120)
        assert process.returncode == 0
    saved = [torch.load(Path(f) / "checkpoint.pt", weights_only=True) for f in (whole, killed)]
    assert saved[0]["step"] == steps
    assert same(*saved)
