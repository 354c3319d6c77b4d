"""Accelerate's and the Hugging Face Trainer's FSDP2, on CPU ranks."""

import warnings
from importlib.metadata import version

import pytest
import torch
import torch.distributed as dist
from ranks import on_ranks
from reference import same
from sharded import DECAY, equal, plain_model, train, whole_ema, whole_weights
from sharded import optimizer_of as plain_optimizer
from sharded_trainers import STATES, accelerated, class_of, sharded_fit, steps
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor

from ema_optim import EMACallback, EMASnapshots

# Accelerate 1.10 does not bring back the sharded state of a bare optimizer either.
pytest.importorskip("accelerate", "1.15", reason="the version with which this was run")
of_transformers_5 = pytest.mark.skipif(
    version("transformers") < "5", reason="the Trainer of transformers 4 has no argument for FSDP2"
)


@pytest.mark.parametrize("states", STATES)
@on_ranks(2)
def test_accelerate_shards_saves_and_resumes_bit_for_bit(world, states, tmp_path):
    accelerator, model, optimizer, own = accelerated(states)
    steps(accelerator, model, optimizer, range(3))
    assert isinstance(own.state[own.param_groups[0]["params"][0]]["ema"], DTensor)
    accelerator.save_state(tmp_path)
    accelerator, model, optimizer, own = accelerated(states)
    accelerator.load_state(tmp_path)
    steps(accelerator, model, optimizer, range(3, 6))
    plain = plain_model()
    alone = plain_optimizer(plain)
    train(plain, alone, range(6))
    assert equal(whole_weights(model), whole_weights(plain))
    assert equal(whole_ema(own, model), whole_ema(alone, plain))


@of_transformers_5
@pytest.mark.parametrize("states", STATES)
@on_ranks(2)
def test_a_sharded_trainer_trains_as_without_the_callback_and_resumes(world, states, tmp_path):
    from trainers import llama, saves

    options = {"states": states, **saves(4, evaluate=2)}
    bare = sharded_fit(llama(), tmp_path / "bare", **class_of(False), **options)
    runs = []
    for seed, resume in ((0, None), (5, tmp_path / "0/checkpoint-4")):
        callback, folder = EMACallback(), tmp_path / str(seed)
        options = {**options, **class_of(True)}
        made = sharded_fit(llama(seed), folder, callback, resume=resume, **options)
        assert equal(whole_weights(made.model), whole_weights(bare.model))
        runs.append([callback.get_ema_state(), made.evaluate()["eval_loss"]])
    assert same(*runs)
    assert bool(runs[0][0]) == (dist.get_rank() == 0)


def loss_of(model):
    """The Trainer's evaluation of a whole model."""
    from trainers import EVAL

    rows = [[row[key] for row in EVAL] for key in ("input_ids", "labels")]
    halves = zip(*(torch.stack(column).split(4) for column in rows), strict=True)
    with torch.no_grad():
        return float(sum(model(input_ids=i, labels=t).loss for i, t in halves) / 2)


@of_transformers_5
@pytest.mark.parametrize("states", STATES)
@on_ranks(2)
def test_the_ema_of_a_sharded_trainer_is_evaluated_and_deployed(world, states, tmp_path):
    from trainers import llama, saves
    from transformers import LlamaForCausalLM

    callback, options = EMACallback(), {"states": states, **saves(4), **class_of(True)}
    trainer = sharded_fit(llama(), tmp_path, callback, **options)
    weights, ema = whole_weights(trainer.model), callback.get_ema_state()
    loss = trainer.evaluate()["eval_loss"]
    assert equal(whole_weights(trainer.model), weights)
    dist.barrier()
    deployed = LlamaForCausalLM.from_pretrained(tmp_path / "checkpoint-8/ema")
    assert loss == pytest.approx(loss_of(deployed), rel=1e-5)
    assert dist.get_rank() or equal(dict(deployed.named_parameters()), ema)
    callback.apply_ema(trainer.model)
    assert trainer.evaluate()["eval_loss"] == loss
    assert equal(whole_weights(trainer.model), dict(deployed.named_parameters()))
    callback.restore_original(trainer.model)
    assert equal(whole_weights(trainer.model), weights)


@of_transformers_5
# With sharded state dicts transformers looks for the best checkpoint before its folder is made.
@on_ranks(2)
def test_a_sharded_trainer_ends_with_the_ema_weights_of_the_best_checkpoint(world, tmp_path):
    from trainers import llama, saves
    from transformers import LlamaForCausalLM

    options = {**saves(2, evaluate=2), **class_of(True)}
    options |= {"load_best_model_at_end": True, "metric_for_best_model": "loss"}
    callback = EMACallback(snapshots=tmp_path / "s")
    trainer = sharded_fit(llama(), tmp_path, callback, **options)
    best = LlamaForCausalLM.from_pretrained(trainer.state.best_model_checkpoint + "/ema")
    assert equal(whole_weights(trainer.model), dict(best.named_parameters()))
    assert trainer.evaluate()["eval_loss"] == pytest.approx(trainer.state.best_metric, abs=1e-4)
    ema = callback.get_ema_state()
    made = EMASnapshots(tmp_path / "s").synthesize(callback.optimizer.decay, 8)
    assert dist.get_rank() or equal(made, ema)


@of_transformers_5
@on_ranks(2)
def test_a_callback_alone_is_refused_under_fsdp_with_the_remedy(world, tmp_path):
    from trainers import llama

    with pytest.raises(RuntimeError, match="optimizer_cls_and_kwargs"):
        sharded_fit(llama(), tmp_path, EMACallback(DECAY))


@pytest.mark.parametrize("wraps", [True, False])
@on_ranks(2)
def test_averaged_buffers_are_refused_under_fsdp2_with_the_remedy(world, wraps, tmp_path):
    from trainers import llama

    callback = EMACallback(use_buffers=True)
    with pytest.raises(ValueError, match=r"got use_buffers=True and sharded weights .*update_bn"):
        sharded_fit(llama(), tmp_path, callback, **class_of(wraps))


@on_ranks(2)
def test_fsdp1_is_refused_with_the_remedy(world):
    from ema_optim.integrations._trainer_optimizer import refuse_engines

    _, _, optimizer, _ = accelerated("FULL_STATE_DICT")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of FSDP1
        flat = FullyShardedDataParallel(plain_model(), device_id=torch.device("cpu"))
    optimizer.optimizer = torch.optim.SGD(flat.parameters(), 0.1)
    with pytest.raises(RuntimeError, match="FSDP2"):
        refuse_engines(optimizer)
