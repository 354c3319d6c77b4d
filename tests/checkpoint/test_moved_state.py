"""State that moves: entries handed to new parameters, taken keys, reading without writing."""

import pytest
import torch
from reference import same
from steps import param, train
from torch.optim import SGD, Adam, Optimizer

from ema_optim import EMAOptimizer

# How 3D Gaussian splatting and gsplat densify and prune: the old entry is taken, changed, and given
# to the new parameter.


def by_get_and_delete(optimizer, group, new, resize):
    entry = optimizer.state.get(group["params"][0], None)
    resize(entry)
    del optimizer.state[group["params"][0]]
    group["params"][0] = new
    optimizer.state[group["params"][0]] = entry


def by_pop(optimizer, group, new, resize):
    entry = optimizer.state.pop(group["params"][0])
    resize(entry)
    group["params"] = [new]
    optimizer.state[new] = entry


def by_copy(optimizer, group, new, resize):
    entry = dict(optimizer.state[group["params"][0]])
    resize(entry)
    optimizer.state.pop(group["params"][0], None)
    group["params"] = [new]
    optimizer.state[new] = entry


def by_every_key(optimizer, group, new, resize):  # as gsplat's ops
    entry = optimizer.state[group["params"][0]]
    del optimizer.state[group["params"][0]]
    for key in entry.keys():  # noqa: SIM118
        if key != "step":
            entry[key] = torch.cat([entry[key], torch.zeros(2, 3)])
    optimizer.state[new] = entry
    group["params"][0] = new


MOVES = [by_get_and_delete, by_pop, by_copy, by_every_key]
MOMENTS = ["exp_avg", "exp_avg_sq"]


def grow(keys):
    def resize(entry):
        for key in keys:
            entry[key] = torch.cat([entry[key], torch.zeros(2, 3)])

    return resize


@pytest.mark.filterwarnings("ignore:a parameter has got another shape")
@pytest.mark.parametrize("move", MOVES, ids=lambda move: move.__name__)
def test_moving_state_by_hand_moves_the_inners_entries_exactly(move):
    weights = []
    for wrap in (lambda inner: inner, lambda inner: EMAOptimizer(inner, 0.5)):
        torch.manual_seed(3)
        optimizer = wrap(Adam([{"params": [param(4, 3)]}, {"params": [param(2)]}], lr=0.1))
        train(optimizer, 5)
        group = optimizer.param_groups[0]
        new = torch.nn.Parameter(torch.cat([group["params"][0].detach(), torch.ones(2, 3)]))
        move(optimizer, group, new, grow(MOMENTS))
        train(optimizer, 5)
        weights.append(new.detach())
        assert optimizer.state[new]["step"] == 10
    assert torch.equal(*weights)


@pytest.mark.parametrize("move", MOVES[1:], ids=lambda move: move.__name__)
def test_an_ema_of_the_new_shape_moves_along(move):
    optimizer = EMAOptimizer(Adam([param(4, 3)], lr=0.1), 0.5)
    train(optimizer, 5)
    group = optimizer.param_groups[0]
    ema = optimizer.state[group["params"][0]]["ema"].clone()
    new = torch.nn.Parameter(torch.cat([group["params"][0].detach(), torch.ones(2, 3)]))
    move(optimizer, group, new, grow([*MOMENTS, "ema"]))
    moved = torch.cat([ema, torch.zeros(2, 3)])
    assert torch.equal(optimizer.state[new]["ema"], moved)
    train(optimizer)
    assert torch.equal(optimizer.state[new]["ema"], torch.lerp(moved, new.detach(), 0.5))
    assert optimizer.state[new]["ema_step"] == 6


def test_an_ema_of_another_shape_begins_anew_and_is_told_once():
    optimizer = EMAOptimizer(Adam([{"params": [param(4, 3)]}, {"params": [param(4, 3)]}]), 0.5)
    train(optimizer, 5)
    for group, expected in zip(optimizer.param_groups, ["another shape", None], strict=True):
        new = param(6, 3)
        if expected:
            with pytest.warns(UserWarning, match=expected):
                by_pop(optimizer, group, new, grow(MOMENTS))
        else:
            by_pop(optimizer, group, new, grow(MOMENTS))
        seed = new.detach().clone()
        train(optimizer)
        assert torch.equal(optimizer.state[new]["ema"], torch.lerp(seed, new.detach(), 0.5))
        assert optimizer.state[new]["ema_step"] == 1


def test_an_ema_of_another_shape_is_refused_where_it_would_stay():
    p = param(3)
    optimizer = EMAOptimizer(Adam([p]), 0.5)
    train(optimizer, 2)
    with pytest.raises(ValueError, match=r"optimizer.state.pop\(param\)"):
        optimizer.state[p]["ema"] = torch.zeros(5)


def test_what_a_deleted_entry_showed_it_keeps():
    p = param(3)
    optimizer = EMAOptimizer(Adam([p]), 0.5)
    train(optimizer, 2)
    entry, expected = optimizer.state[p], dict(optimizer.state[p])
    del optimizer.state[p]
    assert same({key: entry[key] for key in expected}, expected)
    assert [key for key in entry if key not in expected] == []
    entry["exp_avg"] = torch.ones(3)
    del entry["step"]
    assert torch.equal(entry["exp_avg"], torch.ones(3))
    assert "step" not in entry
    assert p not in optimizer.state


def test_reading_the_state_never_writes():
    p = param(3)
    optimizer = EMAOptimizer(SGD([p], lr=0.1), 0.5, update_after_step=3)
    train(optimizer, 2)
    (lane,) = optimizer._ema._lanes
    assert optimizer.state[p]["ema"] is optimizer.state[p]["ema"]
    assert optimizer.state is optimizer.state
    repr(optimizer.state)
    assert list(optimizer._ema._lanes) == [lane]


def test_a_placeholder_is_shown_as_last_seeded_and_saved_as_the_weights():
    p = param(3)
    optimizer = EMAOptimizer(SGD([p], lr=0.1), 0.5, update_after_step=3)
    train(optimizer, 2)
    shown = optimizer.state[p]["ema"]
    saved = optimizer.state_dict()["state"][0]["ema"]
    assert torch.equal(saved, p)
    assert saved is not shown
    assert saved is optimizer.state[p]["ema"]
    assert torch.equal(optimizer.get_ema_state(torch.nn.ParameterList([p]))["0"], p)
    assert optimizer.ema_metrics()["ema_distance"] == 0.0


class Own(Optimizer):
    """Keeps an average of its own under our key, from a given step on."""

    def __init__(self, params, begin):
        super().__init__(params, {"lr": 0.1})
        self.begin, self.steps = begin, 0
        if begin == 0:
            self.keep()

    def keep(self):
        for p in self.param_groups[0]["params"]:
            self.state[p]["ema"] = torch.full((3,), 7.0)

    def step(self, closure=None):
        self.steps += 1
        for p in self.param_groups[0]["params"]:
            p.detach().add_(1.0)
            self.state[p]["count"] = self.steps
            if self.steps == self.begin:
                self.keep()


def test_a_taken_key_is_refused_at_construction():
    with pytest.raises(TypeError, match="must not use the state keys"):
        EMAOptimizer(Own([param(3)], 0))


@pytest.mark.parametrize("begin", [1, 2, 5])
def test_a_taken_key_is_refused_at_the_end_of_the_step_that_takes_it(begin):
    p = param(3)
    optimizer, before = EMAOptimizer(Own([p], begin), 0.5), p.detach().clone()
    for _ in range(begin - 1):
        optimizer.step()
    with pytest.raises(TypeError, match=r"got \['ema'\] in the state of Own: use EMAModel"):
        optimizer.step()
    assert torch.equal(p, before + begin)  # that inner step is complete
    with pytest.raises(TypeError, match="must not use"):
        optimizer.step()
    assert torch.equal(p, before + begin)  # no later one moves
    assert torch.equal(optimizer.inner.state[p]["ema"], torch.full((3,), 7.0))


def test_a_state_dict_never_overwrites_a_taken_key():
    p = param(3)
    optimizer = EMAOptimizer(Own([p], 99), 0.5)
    optimizer.step()
    optimizer.inner.state[p]["ema"] = torch.zeros(3)
    with pytest.raises(TypeError, match="must not use the state keys"):
        optimizer.state_dict()
