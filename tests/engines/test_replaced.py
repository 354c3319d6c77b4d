"""Parameters that an engine has replaced, as DeepSpeed's optimizers do it."""

import pytest
import torch
from torch import nn

from ema_optim import EMAOptimizer
from ema_optim._engines.replaced import kinds_of, refuse_replaced


def parameters(count=3):
    return [nn.Parameter(torch.randn(2, 3)) for _ in range(count)]


def master(*params):
    """As ZeRO makes one: ``flatten(...).clone().float().detach()``, which requires grad."""
    return torch.cat([p.detach().flatten() for p in params]).requires_grad_()


PARAMS = parameters()
REFUSED = {
    "flat partition of each group (stages 1 and 2)": [master(*PARAMS[:2]), master(PARAMS[2])],
    "one sub-group at a time (stage 3)": [master(*PARAMS)],
    "masters of each shape (stage 0, bf16)": [p.detach().clone() for p in PARAMS],
    "one of two groups": [*PARAMS[:2], master(PARAMS[2])],
}
ACCEPTED = {
    "nothing changed": PARAMS,
    "another parameter": [*PARAMS[:2], nn.Parameter(torch.zeros(4))],
    "every one another parameter": parameters(),
    "one group at a time": PARAMS[:1],
    "emptied": [],
    "a plain tensor added beside": [*PARAMS, torch.zeros(3, requires_grad=True)],
}


@pytest.mark.parametrize("row", REFUSED)
def test_masters_in_place_of_parameters_are_refused(row):
    with pytest.raises(RuntimeError, match=r"an engine .* has put a plain tensor"):
        refuse_replaced(kinds_of(PARAMS), REFUSED[row])


@pytest.mark.parametrize("row", ACCEPTED)
def test_parameters_that_change_otherwise_are_accepted(row):
    refuse_replaced(kinds_of(PARAMS), ACCEPTED[row])


def test_plain_tensors_that_give_way_to_plain_tensors_are_accepted():
    refuse_replaced(kinds_of([torch.zeros(3)]), [torch.zeros(3)])


# DeepSpeed's ZeRO replaces the params of every group when its engine is built, before any step.
@pytest.mark.parametrize("steps", [0, 2])
def test_a_step_over_an_engines_flat_tensor_raises_before_it_moves(steps):
    model = torch.nn.Linear(3, 2)
    optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.1), 0.5)
    for _ in range(steps):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
    flat = torch.cat([p.detach().flatten() for p in model.parameters()])
    flat.grad, before = torch.ones_like(flat), flat.clone()
    optimizer.param_groups[0]["params"] = [flat]
    with pytest.raises(RuntimeError, match="must hold the model's parameters"):
        optimizer.step()
    assert torch.equal(flat, before)
