"""Accelerate's and the Trainer's FSDP2 on CPU ranks, for the sharded models."""

import logging

import pytest
import torch
from sharded import DECAY, batch, plain_model
from torch.distributed.tensor import DTensor

from ema_optim import EMAOptimizer

STATES = ["FULL_STATE_DICT", "SHARDED_STATE_DICT"]
ADAM = {"lr": 0.1, "foreach": False}


def shard_on_cpu():
    """Have Accelerate take CPU ranks for devices that it shards on."""
    from accelerate.state import AcceleratorState, PartialState
    from accelerate.utils import DistributedType

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState(cpu=True, backend="gloo")
    PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU


def accelerated(states):
    from accelerate import Accelerator, FullyShardedDataParallelPlugin

    shard_on_cpu()
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2,
        auto_wrap_policy="size_based_wrap",
        min_num_params=20,
        state_dict_type=states,
    )
    accelerator = Accelerator(cpu=True, fsdp_plugin=plugin)
    model = plain_model()
    own = EMAOptimizer(torch.optim.AdamW(model.parameters(), **ADAM), DECAY)
    return accelerator, *accelerator.prepare(model, own), own


def steps(accelerator, model, optimizer, numbers):
    for number in numbers:
        optimizer.zero_grad()
        accelerator.backward(model(batch(number)).square().mean())
        optimizer.step()


def sharded_fit(model, folder, *callbacks, states="FULL_STATE_DICT", resume=None, **options):
    """A Trainer's run whose layers are sharded by FSDP2."""
    from trainers import make
    from transformers import TrainingArguments

    logging.disable(logging.WARNING)
    config = {
        "version": 2,
        "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"],
        "state_dict_type": states,
    }
    make_arguments = TrainingArguments.__post_init__
    with pytest.MonkeyPatch.context() as patch:

        def sharding(self):
            make_arguments(self)
            shard_on_cpu()

        patch.setattr(TrainingArguments, "__post_init__", sharding)
        options = {"ddp_backend": "gloo", "fsdp": True, "fsdp_config": config, **options}
        trainer = make(model, folder, *callbacks, **options)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    assert any(isinstance(param, DTensor) for param in trainer.model.parameters())
    return trainer


def class_of(wraps):
    made = EMAOptimizer.for_class(torch.optim.AdamW, decay=DECAY) if wraps else torch.optim.AdamW
    return {"optimizer_cls_and_kwargs": (made, {"lr": 1e-2})}
