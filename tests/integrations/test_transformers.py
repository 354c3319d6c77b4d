"""``EMACallback`` in the real ``Trainer``, on tiny models built from a config."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from reference import same
from torch.optim import AdamW
from trainers import (
    CHECKPOINTING,
    DECAY,
    DOORS,
    EVAL,
    FP16,
    STEPS,
    V4,
    Witness,
    bert,
    bf16,
    close,
    fit,
    gpt2,
    llama,
    lora,
    make,
    numbers,
    parameters,
    plain,
    run_python,
    saves,
    untied,
    unused,
    weights,
)
from transformers import (
    LlamaForCausalLM,
    TrainerCallback,
)

from ema_optim import (
    EMACallback,
    compute_optimal_decay,
    warmup_decay,
)

pytestmark = [
    # PEFT asks transformers for a name that transformers has renamed.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
]


RUNS = {
    "plain": (llama, {}),
    "untied": (untied, {}),
    "dropout": (gpt2, {}),
    "bert": (bert, {}),
    "accumulation": (llama, {"gradient_accumulation_steps": 4, "max_steps": 4}),
    "bf16": (llama, {"bf16": True}),
    "pure bf16": (bf16, {}),
    "fp16 with overflows": (llama, {**FP16, "optim": "adamw_torch"}),
    "fp16 with overflows, fused": (llama, {**FP16, "optim": "adamw_torch_fused"}),
    "fp16 with accumulation": (
        llama,
        {**FP16, "gradient_accumulation_steps": 2, "optim": "adamw_torch"},
    ),
    "checkpointing": (llama, CHECKPOINTING),
    "adafactor": (llama, {"optim": "adafactor"}),
    "sgd": (llama, {"optim": "sgd", "learning_rate": 1.0}),
    "warm-up": (llama, {"warmup_steps": 3}),
    "lora": (lora, {}),
    "lora with checkpointing": (lora, CHECKPOINTING),
    "plain module": (plain, {}),
    "never a gradient": (unused, {}),
}


@pytest.mark.parametrize("row", RUNS)
def test_training_is_bit_equal_to_the_one_without_the_callback(tmp_path, row):
    build, options = RUNS[row]
    runs = []
    for callbacks in ([], [EMACallback(DECAY)]):
        evaluates = {"eval_strategy": "steps", "eval_steps": 3}
        trainer = fit(build(), tmp_path, *callbacks, **evaluates, **options)
        runs.append([weights(trainer.model), numbers(trainer)])
    assert same(*runs)


@pytest.mark.parametrize("row", RUNS)
def test_ema_is_the_average_of_the_optimizer_steps(tmp_path, row):
    build, options = RUNS[row]
    model, callback = build(), EMACallback(DECAY)
    witness = Witness(model)
    fit(model, tmp_path, callback, witness, **options)
    state = callback.get_ema_state()
    assert list(state) == [n for n, p in model.named_parameters() if p.requires_grad]
    assert close(state.values(), witness.reference.emas)
    steps = options.get("max_steps", STEPS) - 2 * ("scaler" in options) - (row == "warm-up")
    assert callback.optimizer.ema_metrics()["ema_updates"] == witness.reference.step == steps


@pytest.mark.parametrize("door", DOORS)
@pytest.mark.parametrize("row", ["plain", "accumulation", "pure bf16", "fp16 with accumulation"])
def test_the_users_own_ema_optimizer_is_found_and_not_wrapped_again(tmp_path, door, row):
    build, options = RUNS[row]
    model, callback = build(), EMACallback()
    witness = Witness(model)
    options = {k: v for k, v in options.items() if k != "optim"}
    trainer = fit(model, tmp_path, callback, witness, **options, **DOORS[door](model))
    assert trainer.optimizer.optimizer is callback.optimizer
    assert type(callback.optimizer.inner) is AdamW
    assert close(callback.get_ema_state().values(), witness.reference.emas)
    assert callback.optimizer.ema_metrics()["ema_updates"] == witness.reference.step


@pytest.mark.parametrize("row", ["plain", "bert", "bf16", "pure bf16", "lora", "plain module"])
def test_every_evaluation_batch_sees_the_ema_weights_and_every_other_the_training_ones(
    tmp_path, row
):
    build, options = RUNS[row]
    model = build()
    witness = Witness(model, rtol=2**-7 if row == "pure bf16" else 1e-5)
    saving = saves(4, evaluate=2)
    fit(model, tmp_path, EMACallback(DECAY), witness, **options, **saving, eval_on_start=True)
    assert witness.batches == ["ema+training"] * 2 + ["ema"] * 8
    assert witness.wrong == []
    assert witness.holds(witness.training)


@pytest.mark.parametrize("door", DOORS)
def test_the_users_own_ema_optimizer_evaluates_on_the_ema_weights(tmp_path, door):
    model = llama()
    witness = Witness(model)
    trainer = make(model, tmp_path, EMACallback(), witness, **DOORS[door](model))
    trainer.evaluate()
    trainer.train()
    trainer.evaluate()
    assert witness.batches == ["ema+training"] * 2 + ["ema"] * 2
    assert witness.wrong == []
    assert witness.holds(witness.training)


def test_evaluate_with_training_uses_the_training_weights(tmp_path):
    model = llama()
    witness = Witness(model)
    callback = EMACallback(DECAY, evaluate_with="training")
    trainer = fit(model, tmp_path, callback, witness, **saves(4, evaluate=2))
    trainer.predict(EVAL)
    assert witness.batches == ["training"] * 10
    assert close(callback.get_ema_state().values(), witness.reference.emas)


@pytest.mark.parametrize("call", ["evaluate", "predict"])
def test_evaluation_before_between_and_after_training(tmp_path, call):
    model = llama()
    witness = Witness(model)
    trainer = make(model, tmp_path, EMACallback(DECAY), witness)
    for _ in range(3):
        before = weights(model)
        getattr(trainer, call)(EVAL)
        assert same(weights(model), before)
        trainer.train()
    assert witness.batches == ["ema+training"] * 2 + ["ema"] * 4
    assert witness.wrong == []


@pytest.mark.parametrize("row", ["plain", "fp16 with overflows, fused", "fp16 with overflows"])
def test_a_later_training_goes_on_averaging(tmp_path, row):
    build, options = RUNS[row]
    model, callback = build(), EMACallback(DECAY)
    witness = Witness(model)
    trainer = make(model, tmp_path, callback, witness, **options)
    for _ in range(3):
        trainer.train()
    assert close(callback.get_ema_state().values(), witness.reference.emas)
    assert callback.optimizer.ema_metrics()["ema_updates"] == witness.reference.step


@pytest.mark.parametrize(
    ("decay", "wanted"),
    # The default and "auto" warm up: (1 + 8) / (10 + 8) is above compute_optimal_decay(8).
    [(None, 0.4217), ("auto", compute_optimal_decay(STEPS)), (0.25, 0.25), (lambda u: 0.5, 0.5)],
)
def test_decay_in_force(tmp_path, decay, wanted):
    trainer = fit(llama(), tmp_path, EMACallback(decay))
    assert trainer.state.log_history[-2]["ema_decay"] == pytest.approx(wanted, rel=1e-4)


def test_auto_decay_takes_the_steps_that_the_trainer_has_worked_out(tmp_path):
    trainer = fit(llama(), tmp_path, EMACallback("auto"), max_steps=-1, num_train_epochs=2)
    wanted = warmup_decay(compute_optimal_decay(16))
    assert trainer.state.log_history[-2]["ema_decay"] == wanted(16)


@pytest.mark.parametrize(("decay", "found"), [(None, None), (DECAY, None), (0.2, DECAY)])
@pytest.mark.parametrize("door", DOORS)
def test_decay_must_be_that_of_the_users_own_ema_optimizer(tmp_path, door, decay, found):
    model = llama()
    trainer = make(model, tmp_path, EMACallback(decay), **DOORS[door](model))
    if found is None:
        trainer.train()
        assert trainer.state.log_history[0]["ema_decay"] == DECAY
        return
    before = weights(model)
    with pytest.raises(
        ValueError, match=r"decay must be that of the EMAOptimizer .*\(0.1\), got 0.2"
    ):
        trainer.train()
    assert same(weights(model), before)


@pytest.mark.parametrize("door", [None, *DOORS])
def test_two_callbacks_are_a_value_error(tmp_path, door):
    model = llama()
    options = DOORS[door](model) if door else {}
    decay = None if door else DECAY
    with pytest.raises(ValueError, match="must have one EMACallback"):
        fit(model, tmp_path, EMACallback(decay), EMACallback(decay), **options)


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"decay": 1.5}, ValueError, "1.5"),
        ({"decay": "fast"}, TypeError, "fast"),
        ({"update_every": 0}, ValueError, "update_every must be at least 1"),
        ({"update_after_step": -1}, ValueError, "update_after_step must be at least 0"),
        ({"dtype": torch.float16}, ValueError, "dtype must be"),
        ({"evaluate_with": "all"}, ValueError, "evaluate_with must be 'ema', 'training' or"),
    ],
)
def test_wrong_argument_is_refused_at_construction(options, error, message):
    with pytest.raises(error, match=message):
        EMACallback(**options)


class Logs(TrainerCallback):
    def __init__(self):
        self.seen = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.seen.append(dict(logs))


@pytest.mark.parametrize("build", [llama, bf16])
def test_metrics_are_in_the_log_history_and_in_the_logs_of_later_callbacks(tmp_path, build):
    model, later = build(), Logs()
    witness = Witness(model)
    trainer = fit(model, tmp_path, EMACallback(DECAY), witness, later, **saves(8, evaluate=2))
    pairs = zip(witness.history[STEPS], witness.training, strict=True)
    gap = sum((e - w).square().sum() for e, w in pairs).sqrt()
    distance = float(gap / sum(w.square().sum() for w in witness.training).sqrt())
    for entries in (trainer.state.log_history, later.seen):
        training = [entry for entry in entries if "loss" in entry]
        assert all(entry["ema_decay"] == DECAY for entry in training)
        assert training[-1]["ema_distance"] == pytest.approx(distance, rel=1e-4)
        assert not any("ema_decay" in entry for entry in entries if "eval_loss" in entry)


def test_metrics_survive_in_the_trainer_state_file(tmp_path):
    fit(llama(), tmp_path, EMACallback(DECAY), **saves(4))
    state = json.loads((tmp_path / "checkpoint-4/trainer_state.json").read_text())
    assert all(entry["ema_decay"] == DECAY for entry in state["log_history"] if "loss" in entry)


def test_no_metrics_before_there_is_an_average(tmp_path):
    trainer = make(llama(), tmp_path, EMACallback(DECAY, update_after_step=6))
    assert "ema_decay" not in trainer.evaluate()
    trainer.train()
    found = ["ema_decay" in entry for entry in trainer.state.log_history[:STEPS]]
    assert found == [False] * 6 + [True] * 2


RANKS = """
import os, sys
sys.path[:0] = sys.argv[1:2]
import torch
torch.set_num_threads(1)
from trainers import DECAY, fit, llama, saves
from ema_optim import EMACallback

folder, rank = sys.argv[2], os.environ["RANK"]
options = {"ddp_backend": "gloo", "ddp_find_unused_parameters": False, **saves(4, evaluate=2)}
found = []
for name, seed, resume in (("bare", 0, None), ("ema", 0, None), ("again", 5, "ema/checkpoint-4")):
    callback = EMACallback(DECAY)
    callbacks = [] if name == "bare" else [callback]
    resume = resume and os.path.join(folder, resume)
    trainer = fit(llama(seed), os.path.join(folder, name), *callbacks, resume=resume, **options)
    assert type(trainer.model_wrapped).__name__ == "DistributedDataParallel"
    loss = trainer.evaluate()["eval_loss"]
    found.append([trainer.model.state_dict(), loss])
    if callbacks:
        found[-1] += [callback.get_ema_state(), trainer.optimizer.state_dict()]
torch.save(found, os.path.join(folder, f"rank{rank}.pt"))
torch.distributed.destroy_process_group()
"""


# It asks torch.load for the device "cpu:0".
@pytest.mark.skipif(V4, reason="transformers 4 does not resume on several CPU ranks")
def test_two_processes_train_average_evaluate_and_resume_alike(tmp_path):
    (tmp_path / "ranks.py").write_text(RANKS)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    arguments = ["--nproc-per-node=2", tmp_path / "ranks.py", Path(__file__).parents[1], tmp_path]
    run = subprocess.run(
        [*command, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert run.returncode == 0, run.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank{r}.pt", weights_only=True) for r in (0, 1)]
    assert same(*ranks)
    bare, averaged, resumed = ranks[0]
    assert same(bare[0], averaged[0])
    assert same(resumed, averaged)
    assert bare[1] != averaged[1]  # the loss of the EMA weights
    loaded = LlamaForCausalLM.from_pretrained(tmp_path / "ema/checkpoint-8/ema")
    assert same(parameters(loaded), averaged[2])


def test_importing_the_package_imports_no_trainer():
    code = "import ema_optim, sys; print([m for m in sys.argv[1:] if m in sys.modules])"
    found = run_python(code, "transformers", "accelerate", "peft", "safetensors").stdout
    assert found.strip() == "[]"


@pytest.mark.parametrize(
    ("missing", "entrance"),
    [
        ("transformers", "from ema_optim import EMACallback"),
        ("accelerate", "import ema_optim.integrations.transformers"),
    ],
)
def test_missing_package_is_an_import_error_with_the_pip_command(missing, entrance):
    code = f"import sys; sys.modules[{missing!r}] = None; import ema_optim; {entrance}"
    run = run_python(code)
    assert "ImportError" in run.stderr.splitlines()[-1]
    assert 'pip install "ema_optim[transformers]"' in run.stderr


@pytest.mark.parametrize("evaluate", [None, 2, 4])
def test_schedule_free_training_ends_and_is_saved_as_without_the_callback(tmp_path, evaluate):
    options = {"optim": "schedule_free_adamw", "lr_scheduler_type": "constant"}
    models = []
    for name, callbacks in (("a", []), ("b", [EMACallback(DECAY)])):
        trainer = fit(llama(), tmp_path / name, *callbacks, **options, **saves(4, evaluate))
        models.append(weights(trainer.model))
    assert same(*models)
    one, other = (tmp_path / name / "checkpoint-4/model.safetensors" for name in "ab")
    assert one.read_bytes() == other.read_bytes()
