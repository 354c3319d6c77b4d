"""``python -m ema_optim synthesize``: from a folder of snapshots to a file, or to a table."""

import subprocess
import sys

import pytest
import torch
from runs import Run
from safetensors import safe_open
from safetensors.torch import load_file

from ema_optim import EMAOptimizer, EMASnapshots, power_decay
from ema_optim.__main__ import main

pytestmark = pytest.mark.filterwarnings("ignore:the EMA still holds")  # short runs


@pytest.fixture
def folder(tmp_path):
    run, snapshots = Run(decay=0.8), EMASnapshots(tmp_path / "s")
    for step in range(5, 41, 5):
        snapshots.save(run.train(5, seed=step).optimizer, run.model)
    return tmp_path / "s"


TARGETS = [
    (["--decay", "0.9"], 0.9, None),
    (["--sigma-rel", "0.15"], power_decay(0.15), None),
    (["--decay", "0.8", "--step", "15", "--max-error", "0"], 0.8, 15),
]


@pytest.mark.parametrize(("options", "decay", "step"), TARGETS)
def test_the_file_is_what_synthesize_returns(options, decay, step, folder, tmp_path, capsys):
    output = tmp_path / "ema.safetensors"
    assert main(["synthesize", str(folder), *options, "-o", str(output)]) == 0
    wanted, made = EMASnapshots(folder).synthesize(decay, step), load_file(output)
    assert wanted.keys() == made.keys()
    assert all(torch.equal(wanted[name], made[name]) for name in made)
    with safe_open(output, framework="pt") as file:
        told = file.metadata()
    assert told["ema_step"] == str(step or 40)
    assert float(told["ema_told_error"]) == pytest.approx(
        EMASnapshots(folder).error(decay, step), rel=1e-2
    )
    assert f"ema_step {step or 40}" in capsys.readouterr().out


def test_without_a_target_it_is_a_table_of_what_is_there(folder, capsys):
    assert main(["synthesize", str(folder), "--step", "25"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[1].split() == ["ema-00000005.safetensors", "5", "0.8"]
    told = dict(line.split() for line in lines[lines.index("") + 2 :])
    errors = {width: EMASnapshots(folder).error(power_decay(float(width)), 25) for width in told}
    assert len(told) == 14
    assert {width: float(error) for width, error in told.items()} == pytest.approx(errors, rel=0.05)


WRONG = [
    (["--decay", "1.5"], "decay must be in [0, 1], got 1.5"),
    (["--sigma-rel", "0.3"], "sigma_rel must be in (0, 0.28"),
    (["--decay", "0.9", "--step", "7"], "step must be that of a snapshot, one of [5, 10,"),
    (["--step", "7"], "step must be that of a snapshot, one of [5, 10,"),
    (["--decay", "0.3"], "choose a longer window or one nearer to those kept, save snapshots more"),
    (["--decay", "0.9", "-o", "there"], "there must not be there yet: pass --force"),
    (["--decay", "0.9", "-o", "none/x"], "No such file or directory"),
]


@pytest.mark.parametrize(("options", "message"), WRONG)
def test_an_error_is_one_line(options, message, folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "there").touch()
    output = [] if "-o" in options else ["-o", "new"]
    assert main(["synthesize", str(folder), *options, *output]) == 2
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["none"], "none must be a folder with snapshots"),
        (["."], ". must hold snapshots, got none"),
        (["s", "--decay", "0.9"], "pass -o ema.safetensors"),
    ],
)
def test_what_is_missing_is_named(arguments, message, folder, monkeypatch, tmp_path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["synthesize", *arguments]) == 2
    assert message in capsys.readouterr().err


def test_force_replaces_the_output(folder, tmp_path):
    output = tmp_path / "there"
    output.touch()
    assert main(["synthesize", str(folder), "--decay", "0.9", "-o", str(output), "--force"]) == 0
    assert load_file(output)


SCRIPT = """
import sys, torch, safetensors, tqdm, ema_optim
from pathlib import Path
from ema_optim._tools.synthesize import synthesize
def anonymous():
    text = Path("/proc/self/smaps_rollup").read_text()
    return int(text.split("Anonymous:")[1].split()[0]) * 1024
most = [0]
original = torch.Tensor.add_
def watched(*args, **kwargs):
    result = original(*args, **kwargs)
    most[0] = max(most[0], anonymous())
    return result
torch.Tensor.add_ = watched
before = anonymous()
synthesize(Path(sys.argv[1]), Path(sys.argv[2]), 0.9, max_error=9)
print(most[0] - before)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_one_tensor_is_in_memory_at_a_time(tmp_path):
    model = torch.nn.ParameterList([torch.zeros(2**20) for _ in range(16)])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ema, size = EMAOptimizer(optimizer, 0.5), 4 * 2**20
    for _ in range(2):
        for param in model:
            param.grad = torch.ones_like(param)
        ema.step()
        EMASnapshots(tmp_path / "s").save(ema, model)
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "s"), str(tmp_path / "out")]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 8 * size  # of 16, from 2 files
