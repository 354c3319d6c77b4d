"""``python -m ema_optim``: from files that the real engines have written to weights and facts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import transformers
from exports import (
    FORMATS,
    exported,
    llama,
    net,
    no_names,
    run,
    same,
    saved,
    trained,
    trainer_run,
    unnamed,
)
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from sharded import equal
from torch import nn
from torch.optim import SGD, AdamW

import ema_optim
from ema_optim import EMACallback, EMAModel, EMAOptimizer, export_ema, power_decay
from ema_optim.__main__ import main
from ema_optim._tools.info import info

pytestmark = [
    # What torch says where a distributed checkpoint is saved by one process.
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled"),
    pytest.mark.filterwarnings("ignore:an EMA in bfloat16"),  # said of every such EMA
    pytest.mark.filterwarnings("ignore:the EMA still holds"),  # short runs
    # Lightning 2.6 asks torch 2.13's pytrees by a deprecated name.
    pytest.mark.filterwarnings("ignore:`isinstance.treespec, LeafSpec.` is deprecated"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("dtype", FORMATS, ids=str)
def test_export_equals_get_ema_state(dtype, weights, swapped, tmp_path):
    model, optimizer = trained(weights=weights, dtype=dtype)
    if swapped:
        optimizer.eval()
    file = saved(tmp_path, model=model.state_dict(), optimizer=optimizer.state_dict())
    assert same(exported(file, tmp_path), optimizer.get_ema_state(model))


def test_optimizers_state_dict_alone_is_a_source(tmp_path):
    model, optimizer = trained()
    torch.save(optimizer.state_dict(), tmp_path / "optimizer.pt")
    expected = optimizer.get_ema_state(model)
    assert same(exported(tmp_path / "optimizer.pt", tmp_path), expected)
    assert same(exported(tmp_path, tmp_path), expected)  # the folder that it is in


def test_file_of_an_old_torch_is_a_source(tmp_path):
    model, optimizer = trained()
    file = tmp_path / "old.pt"
    torch.save(optimizer.state_dict(), file, _use_new_zipfile_serialization=False)
    assert same(exported(file, tmp_path), optimizer.get_ema_state(model))


def test_nested_checkpoint_is_a_source(tmp_path):
    model, optimizer = trained()
    nested = {"inner": b"its own form", "ema": optimizer.state_dict()}
    file = saved(tmp_path, optimizer=nested, epoch=3)
    assert same(exported(file, tmp_path), optimizer.get_ema_state(model))


@pytest.mark.parametrize("use_buffers", [False, True])
def test_emamodel_state_is_a_source_by_name(use_buffers, tmp_path):
    model = nn.Sequential(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Linear(8, 2))
    ema, sgd = EMAModel(model, decay=0.5, use_buffers=use_buffers), SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        run(model, sgd, steps=1)
        ema.update()
    file = saved(tmp_path, ema=ema.state_dict(), optimizer=sgd.state_dict())
    assert same(exported(file, tmp_path), ema.get_ema_state())


def test_frozen_and_disabled_parameters_are_left_out(tmp_path):
    model = net()
    model[1].requires_grad_(False)
    params = list(model.named_parameters())
    groups = [{"params": params[:2]}, {"params": params[2:]}]
    optimizer = EMAOptimizer(AdamW(groups, lr=0.1), decay=0.5)
    run(model, optimizer)
    optimizer.param_groups[0]["ema_enabled"] = False
    got = exported(saved(tmp_path, optimizer=optimizer.state_dict()), tmp_path)
    assert same(got, optimizer.get_ema_state(model))
    assert set(got) == {"2.weight", "2.bias", "3.weight", "3.bias"}


def test_average_that_has_not_begun_is_the_weights(tmp_path):
    model, optimizer = trained(update_after_step=10)
    got = exported(saved(tmp_path, optimizer=optimizer.state_dict()), tmp_path)
    assert equal(got, dict(model.named_parameters()))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64], ids=str)
def test_dtype_rounds_to_nearest(dtype, tmp_path):
    model, optimizer = trained(weights=torch.bfloat16)
    got = exported(saved(tmp_path, o=optimizer.state_dict()), tmp_path, dtype=dtype)
    expected = {n: t.to(dtype) for n, t in optimizer.get_ema_state(model).items()}
    assert same(got, expected)


def test_compensated_ema_has_more_digits_in_fp64(tmp_path):
    _, optimizer = trained(dtype="float32_compensated")
    state = optimizer.state_dict()
    got = exported(saved(tmp_path, o=state), tmp_path, dtype=torch.float64)
    entry = state["state"][0]
    assert torch.equal(got["0.weight"], entry["ema"].double() + entry["ema_low"].double())
    assert not torch.equal(got["0.weight"], entry["ema"].double())


# Names from a model's file.


def order_of(kind):
    """An optimizer without names: in the model's order, or weight decay apart and unsorted."""

    def build(model):
        if kind == "one group":
            return unnamed(model)
        params = dict(model.named_parameters())
        plain = [params[n] for n in ("1.bias", "3.bias", "2.bias", "1.weight", "0.bias")]
        decayed = [params[n] for n in ("2.weight", "0.weight", "3.weight")]
        return AdamW([{"params": decayed}, {"params": plain, "weight_decay": 0.0}], lr=0.05)

    return build


@pytest.mark.parametrize("kind", ["one group", "weight decay apart"])
@pytest.mark.parametrize("file", ["model.pt", "model.safetensors"])
def test_model_file_gives_the_names(kind, file, tmp_path):
    model, optimizer = trained(order_of(kind))
    save = torch.save if file.endswith(".pt") else save_file
    save(model.state_dict(), tmp_path / file)
    source = saved(tmp_path, optimizer=optimizer.state_dict())
    got = exported(source, tmp_path, model=tmp_path / file)
    assert same(got, optimizer.get_ema_state(model))


def test_tied_weights_have_their_first_name(tmp_path):
    model = net()
    model[2].weight = nn.Parameter(model[2].weight.detach().clone())
    model.append(nn.Linear(8, 8)), model[4].register_parameter("weight", model[2].weight)
    optimizer = EMAOptimizer(unnamed(model[:4]), decay=0.5)
    run(model[:4], optimizer)
    torch.save(model.state_dict(), tmp_path / "model.pt")
    source = saved(tmp_path, optimizer=optimizer.state_dict())
    got = exported(source, tmp_path, model=tmp_path / "model.pt")
    assert same(got, optimizer.get_ema_state(model))


# The written file.


def test_header_says_what_these_weights_are(tmp_path):
    _, optimizer = trained()
    optimizer.param_groups[0]["ema_decay"] = 0.6
    file = saved(tmp_path, optimizer=optimizer.state_dict())
    told = export_ema(file, tmp_path / "ema.safetensors")
    with safe_open(tmp_path / "ema.safetensors", "pt") as written:
        assert written.metadata() == told
    versions = {"ema_optim": ema_optim.__version__, "format": "pt"}
    facts = {"ema_source": "checkpoint file", "ema_step": "4", "ema_decay": "0.6"}
    assert told == versions | facts


DECAYS = [
    ({"decay": {"short": 0.3, "long": 0.5}}, {}, "short 0.3, long 0.5"),
    ({"decay": 0.3}, {}, "0.3"),
    ({"decay": 0.3}, {"ema_decay": 0.6}, "0.3, 0.6 (by param group)"),
]


@pytest.mark.parametrize(("options", "own", "decay"), DECAYS, ids=str)
def test_header_and_info_say_every_decay(options, own, decay, tmp_path):
    pairs = [("a", nn.Parameter(torch.ones(2))), ("b", nn.Parameter(torch.ones(3)))]
    groups = [{"params": [pairs[0]]}, {"params": [pairs[1]], **own}]
    optimizer = EMAOptimizer(SGD(groups, lr=0.1), **options)
    for _, param in pairs:
        param.grad = torch.ones_like(param)
    optimizer.step()
    file = saved(tmp_path, optimizer=optimizer.state_dict())
    assert export_ema(file, tmp_path / "ema.safetensors")["ema_decay"] == decay
    assert f"decay     {decay}" in info(file)
    first = optimizer.state[pairs[0][1]]["ema"]
    assert torch.equal(load_file(tmp_path / "ema.safetensors")["a"], first)


def test_tensors_of_every_shape_and_layout_are_written(tmp_path):
    shapes = {"a scalar": (), "empty": (0, 3), "odd": (3,), "image": (2, 3, 4, 5)}
    tensors = {name: torch.randn(shape) for name, shape in shapes.items()}
    tensors["image"] = tensors["image"].contiguous(memory_format=torch.channels_last)
    params = [(name, nn.Parameter(tensor)) for name, tensor in tensors.items()]
    params += [("double", nn.Parameter(torch.randn(2).double()))]
    params += [("complex", nn.Parameter(torch.randn(2, dtype=torch.complex64)))]
    optimizer = EMAOptimizer(SGD(params, lr=0.1), decay=0.5)
    for _, param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    got = exported(saved(tmp_path, o=optimizer.state_dict()), tmp_path)
    assert all(torch.equal(got[name], optimizer.state[param]["ema"]) for name, param in params)
    text = (tmp_path / "ema.safetensors").read_bytes()
    header = json.loads(text[8 : 8 + int.from_bytes(text[:8], "little")])
    starts = {name: entry["data_offsets"][0] for name, entry in header.items() if name in got}
    assert all(starts[name] % got[name].itemsize == 0 for name in got)


def test_output_is_replaced_only_when_asked_and_only_when_whole(tmp_path, monkeypatch):
    file, output = saved(tmp_path, o=trained()[1].state_dict()), tmp_path / "ema.safetensors"
    output.write_text("mine")
    with pytest.raises(FileExistsError, match="--force"):
        export_ema(file, output)
    monkeypatch.setattr("os.replace", lambda *names: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        export_ema(file, output, force=True)
    assert output.read_text() == "mine"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["checkpoint.pt", "ema.safetensors"]


def test_ema_that_is_not_finite_is_told(tmp_path):
    model, optimizer = trained()
    with torch.no_grad():
        optimizer.state[model[0].weight]["ema"].fill_(1e6)
    file = saved(tmp_path, o=optimizer.state_dict())
    with pytest.warns(UserWarning, match=r"0\.weight is not finite: torch.float16 is too narrow"):
        exported(file, tmp_path, dtype=torch.float16)


MEMORY = """
import resource, sys, torch
from ema_optim import export_ema
import safetensors, tqdm
torch.zeros(2, 2) + 1
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
before = peak()
export_ema(sys.argv[1], sys.argv[2])
print((peak() - before) // 1024)
"""


def test_memory_is_that_of_a_few_tensors(tmp_path):
    # bf16 is decoded to fp32: no mapped page of the file can stand in for the values.
    params = [(f"w{i}", nn.Parameter(torch.ones(2**20))) for i in range(64)]
    optimizer = EMAOptimizer(SGD(params, lr=0.1), decay=0.5, dtype=torch.bfloat16)
    for _, param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    state = optimizer.state_dict()
    for entry in state["state"].values():
        entry.pop("ema_weights")
    file = saved(tmp_path, o=state)
    command = [sys.executable, "-c", MEMORY, str(file), str(tmp_path / "ema.safetensors")]
    used = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert int(used) < 200  # the mapped file has 128 MB, the output 256


# The command line.


def test_command_line_exports(tmp_path, capsys):
    model, optimizer = trained(unnamed)
    file = saved(tmp_path, model=model.state_dict(), optimizer=optimizer.state_dict())
    output = tmp_path / "ema.safetensors"
    command = ["export", str(file), "-o", str(output), "--model", str(file), "--dtype", "bfloat16"]
    assert main(command) == 0
    assert "by values" in capsys.readouterr().out
    assert load_file(output)["0.weight"].dtype == torch.bfloat16


def test_what_the_user_can_mend_is_told_in_one_line(tmp_path):
    source, _ = no_names(tmp_path)
    command = [sys.executable, "-m", "ema_optim", "export", str(source), "-o", "ema.safetensors"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment())
    assert (done.returncode, done.stdout) == (2, "")
    assert "--model" in done.stderr
    assert done.stderr.count("\n") == 1


def environment():
    return os.environ | {"PYTHONPATH": str(Path(ema_optim.__file__).parent.parent)}


INFO = {
    "steps": "4 optimizer steps",
    "updates": "each parameter's EMA has counted 4 steps",
    "decay": "short 0.5, long power_decay(0.2)",
    "format": "float24 (bfloat16 + int8)",
    "swapped": "no",
    "tensors": "8, 146 values",
    "names": "yes",
}


def test_info_says_what_is_in_a_file(tmp_path, capsys):
    windows = {"short": 0.5, "long": power_decay(0.2)}
    state = trained(dtype="float24", decay=windows)[1].state_dict()
    file = saved(tmp_path, optimizer=state)
    assert main(["info", str(file)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == f"file      {file} (checkpoint file)"
    assert dict(line.split(None, 1) for line in lines[1:]) == INFO


def test_info_says_what_export_will_need(tmp_path, capsys):
    _, optimizer = trained(unnamed)
    optimizer.eval()
    main(["info", str(saved(tmp_path, optimizer=optimizer.state_dict()))])
    told = capsys.readouterr().out
    assert "yes: the EMA weights are in the model's file" in told
    assert "no: export needs --model" in told


def test_info_of_a_trainer_checkpoint_knows_the_trainers_step(tmp_path, capsys):
    trainer_run(tmp_path, llama(), [EMACallback(decay=0.5)])
    main(["info", str(tmp_path / "checkpoint-4")])
    assert "Trainer checkpoint, optimizer.pt" in (told := capsys.readouterr().out)
    assert "saved at the trainer's step 4" in told


def test_without_a_command_versions_are_told(capsys):
    assert main([]) == 0
    told = capsys.readouterr().out
    assert f"ema_optim          {ema_optim.__version__}" in told
    assert torch.__version__ in told
    assert transformers.__version__ in told


# Curves.


HISTORY = [
    {"step": 10, "loss": 3.0, "ema_decay": 0.5, "ema_distance": 0.1, "learning_rate": 0.1},
    {"step": 10, "eval_loss": 2.0, "eval_runtime": 1.0},
    {"step": 10, "eval_training_loss": 2.5, "eval_training_runtime": 1.0},
    {"step": 20, "loss": 2.0, "ema_decay": 0.6, "ema_distance": 0.2, "learning_rate": 0.1},
    {"step": 20, "eval_loss": 1.0, "eval_accuracy": 0.5, "eval_runtime": 1.0},
    {"step": 20, "eval_training_loss": 1.5, "eval_training_accuracy": 0.4},
]
PANELS = ["eval_loss", "eval_accuracy", "ema_distance", "ema_decay"]


def test_plot_draws_every_metric_twice(tmp_path, capsys):
    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    output = tmp_path / "curves.png"
    assert main(["plot", str(tmp_path / "trainer_state.json"), "-o", str(output)]) == 0
    assert capsys.readouterr().out == f"{output}: {', '.join(PANELS)}\n"
    assert output.read_bytes().startswith(b"\x89PNG")


def test_curves_of_one_metric_are_told_apart(tmp_path):
    from ema_optim._tools.plot import panels_of, read

    (tmp_path / "trainer_state.json").write_text(json.dumps({"log_history": HISTORY}))
    curves = read(tmp_path)  # the folder will do
    assert curves["eval_training_loss"] == {10: 2.5, 20: 1.5}
    labels = {name: label for name, label, _ in panels_of(curves)["eval_loss"]}
    assert labels == {
        "loss": "loss of the steps",
        "eval_training_loss": "training weights",
        "eval_loss": "EMA weights",
    }
    alone = {"eval_loss": curves["eval_loss"]}  # of which weights, the log does not say
    assert panels_of(alone)["eval_loss"][0][1] == "eval_loss"


def test_tensorboard_gives_the_trainers_curves(tmp_path):
    pytest.importorskip("tensorboard")
    from torch.utils.tensorboard import SummaryWriter

    from ema_optim._tools.plot import read

    with SummaryWriter(tmp_path / "runs" / "one") as writer:
        for entry in HISTORY:
            for name, value in entry.items():
                tag = name.replace("eval_", "eval/") if "eval_" in name else f"train/{name}"
                writer.add_scalar(tag, value, entry["step"])
    curves = read(tmp_path)
    assert curves["eval_training_loss"] == {10: 2.5, 20: 1.5}
    assert curves["loss"] == {10: 3.0, 20: 2.0}


NO_LOGS = [
    ("nothing.json", None, "got nothing there"),
    ("trainer_state.json", "{}", "no log_history"),
    ("trainer_state.json", "text", "no log_history"),
    ("trainer_state.json", '{"log_history": [{"step": 1, "epoch": 1}]}', "must hold losses"),
]


@pytest.mark.parametrize(("name", "text", "words"), NO_LOGS)
def test_what_is_no_log_is_told(name, text, words, tmp_path, capsys):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert main(["plot", str(tmp_path / name), "-o", str(tmp_path / "curves.png")]) == 2
    assert words in capsys.readouterr().err
    assert main(["plot", str(Path(__file__).parent), "-o", "curves.png"]) == 2
    assert "no event files" in capsys.readouterr().err
