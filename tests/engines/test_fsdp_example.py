"""The example of sharded training: it resumes on other ranks and exports one plain file."""

import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLE = str(Path(__file__).parents[2] / "examples" / "fsdp2.py")


def launch(folder, ranks, *arguments):
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    options = ["--folder", str(folder / "run"), "--output", str(folder / "run.png"), *arguments]
    command = [sys.executable, *torchrun, EXAMPLE, *options]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "Warning" not in done.stderr
    return done.stdout


def losses_of(printed):
    lines = re.findall(r"^validation loss, .*", printed, re.MULTILINE)
    return [float(line.split()[-1]) for line in lines]


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Four steps on two ranks, a save that was never completed, then six steps on one rank."""
    folder = tmp_path_factory.mktemp("fsdp2")
    first = launch(folder, 2, "--steps", "4", "--every", "2")
    (folder / "run" / "step-000005").mkdir()
    return folder, first, launch(folder, 1, "--steps", "6")


def test_it_resumes_on_other_ranks_from_the_newest_complete_checkpoint(run):
    _, first, second = run
    assert "resumed" not in first
    assert "resumed at step 4 (ranks: then 2, now 1)" in second
    table = [line.split() for line in second.splitlines() if line[:1].isdigit()]
    assert [row[:2] for row in table if len(row) == 5] == [["2", "2"], ["4", "2"], ["6", "1"]]


def test_the_exported_ema_validates_as_the_sharded_model_did(run):
    for printed in run[1:]:
        sharded, plain = losses_of(printed)
        assert plain == pytest.approx(sharded, rel=1e-5)


def test_the_exported_file_loads_into_a_plain_model(run):
    state = torch.load(run[0] / "run" / "ema.pt", weights_only=True)
    assert {type(tensor) for tensor in state.values()} == {torch.Tensor}
    runpy.run_path(EXAMPLE)["Transformer"]().load_state_dict(state)  # strict
    assert (run[0] / "run.png").read_bytes().startswith(b"\x89PNG")
