"""Distributed checkpoints of the sharded models."""

import torch
import torch.distributed.checkpoint as dcp
from sharded import (
    DECAY,
    optimizer_of,
    plain_model,
    sharded_model,
    train,
    whole_ema,
    whole_weights,
)
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

OPTIONS = {
    "nested": StateDictOptions(),
    "flattened": StateDictOptions(flatten_optimizer_state_dict=True),
}


def fresh(world, way, dtype, decay=DECAY):
    model = plain_model(dtype) if way is None else sharded_model(world, way, dtype)
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(0.5)  # what is not loaded is seen
    return model, optimizer_of(model, decay)


def state_of(model, optimizer, layout):
    weights, state = get_state_dict(model, optimizer, options=OPTIONS[layout])
    return {"model": weights, "optimizer": state}


def load(model, optimizer, folder, layout, planner=None):
    state = state_of(model, optimizer, layout)
    dcp.load(state, checkpoint_id=folder, planner=planner)
    weights, loaded = state["model"], state["optimizer"]
    options = OPTIONS[layout]
    set_state_dict(
        model, optimizer, model_state_dict=weights, optim_state_dict=loaded, options=options
    )
    optimizer.train()


def uninterrupted(steps, dtype=torch.float32, decay=DECAY):
    model = plain_model(dtype)
    optimizer = optimizer_of(model, decay)
    train(model, optimizer, range(steps))
    return whole_weights(model), whole_ema(optimizer, model)
