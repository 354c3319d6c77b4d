"""``EMAOptimizer.state``: a live mapping that engines read from and write to."""

import copy

import pytest
import torch
from reference import same

from ema_optim import EMAOptimizer, warmup_decay

KEYS = {"step", "exp_avg", "exp_avg_sq", "ema", "ema_step"}
each_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)


class Run:
    """Two params under AdamW; the second never has a gradient."""

    def __init__(self, steps=0, weights=torch.float32, decay=0.1, **options):
        torch.manual_seed(0)
        self.params = [torch.nn.Parameter(torch.randn(3, 2).to(weights)) for _ in range(2)]
        self.inner = torch.optim.AdamW(self.params, lr=0.1)
        self.optimizer = EMAOptimizer(self.inner, decay=decay, **options)
        self.train(steps)

    def train(self, steps):
        for _ in range(steps):
            self.params[0].grad = self.params[0].detach().sin()
            self.optimizer.step()

    @property
    def state(self):
        return self.optimizer.state

    def copied_state(self):
        return {p: {k: v.clone() for k, v in entry.items()} for p, entry in self.state.items()}

    def everything(self):
        checkpoint = copy.deepcopy(self.optimizer.state_dict())
        return [p.detach().clone() for p in self.params], checkpoint, self.optimizer.ema_metrics()


def rewrite_as_lightning(state):
    for _, entry in state.items():
        for key, value in entry.items():
            entry[key] = value.clone()


def rewrite_by_param(state):
    for param in state:
        state[param] = {key: value.clone() for key, value in state[param].items()}


REWRITES = pytest.mark.parametrize("rewrite", [rewrite_as_lightning, rewrite_by_param])


@each_dtype
def test_state_holds_what_the_checkpoint_holds(dtype):
    run = Run(steps=3, weights=dtype)
    saved = run.optimizer.state_dict()["state"]
    assert {i: dict(run.state[p]) for i, p in enumerate(run.params)}.keys() == saved.keys()
    assert all(same(dict(run.state[p]), saved[i]) for i, p in enumerate(run.params))
    with run.optimizer.swap_ema_weights():
        saved = run.optimizer.state_dict()["state"]
        assert all(same(dict(run.state[p]), saved[i]) for i, p in enumerate(run.params))


def test_state_is_empty_before_the_first_step_and_complete_after_it():
    run = Run()
    state, entry = run.state, run.state[run.params[0]]
    assert not state
    assert len(state) == len(entry) == 0
    run.train(1)
    assert set(state) == set(run.params)
    assert set(entry) == KEYS
    assert set(state[run.params[1]]) == {"ema", "ema_step"}
    assert (len(state), len(entry)) == (2, 5)


@each_dtype
def test_tensors_read_from_the_state_are_the_live_ones(dtype):
    run = Run(steps=2, weights=dtype)
    param = run.params[0]
    run.state[param]["ema"].fill_(5.0)
    run.state[param]["exp_avg"].zero_()
    assert bool((run.optimizer.get_ema_state(torch.nn.ParameterList([param]))["0"] == 5.0).all())
    assert bool((run.inner.state[param]["exp_avg"] == 0).all())


@pytest.mark.parametrize(
    "read",
    [
        lambda state, p: state[p],
        lambda state, p: dict(state[p]),
        lambda state, p: state.get(p),
        lambda state, p: state[p].get("exp_avg"),
        lambda state, p: "ema" in state[p],
        lambda state, p: p in state,
        lambda state, p: state == {},
        lambda state, p: (
            len(state),
            list(state),
            list(state.items()),
            repr(state),
            repr(state[p]),
        ),
        lambda state, p: state.setdefault(p, {}),
    ],
)
def test_reading_adds_nothing_to_the_state_of_the_inner_optimizer(read):
    run = Run()
    read(run.state, run.params[0])
    assert dict(run.inner.state) == {}
    run.train(1)  # AdamW takes a param with an entry for initialised
    read(run.state, run.params[1])
    assert set(run.inner.state) == {run.params[0]}


def test_tensors_without_state_are_not_in_it():
    run, stranger = Run(steps=1), torch.ones(2)
    assert stranger not in run.state
    assert run.state.get(stranger) is None
    assert run.state.get(stranger, 7) == 7
    assert dict(run.state[stranger]) == {}
    for key in ("ema", "ema_step", "exp_avg"):
        with pytest.raises(KeyError, match=key):
            run.state[stranger][key]


@REWRITES
@each_dtype
@pytest.mark.parametrize("options", [{}, {"decay": warmup_decay(0.2)}, {"update_after_step": 5}])
def test_rewriting_every_entry_changes_nothing(rewrite, dtype, options):
    touched, other = (Run(steps=3, weights=dtype, **options) for _ in range(2))
    rewrite(touched.state)
    assert same(touched.everything(), other.everything())
    touched.train(4)
    other.train(4)
    assert same(touched.everything(), other.everything())


@REWRITES
@each_dtype
@pytest.mark.parametrize("enter", ["block", "eval"])
def test_rewriting_every_entry_while_swapped_changes_nothing(rewrite, dtype, enter):
    touched, other = (Run(steps=3, weights=dtype) for _ in range(2))
    before = touched.everything()
    if enter == "block":
        with touched.optimizer.swap_ema_weights():
            rewrite(touched.state)
    else:
        touched.optimizer.eval()
        rewrite(touched.state)
        touched.optimizer.train()
    assert same(touched.everything(), before)
    touched.train(3)
    other.train(3)
    assert same(touched.everything(), other.everything())


@pytest.mark.parametrize("value", [torch.bfloat16, torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(
    ("weights", "wanted", "stored"),
    [
        (torch.bfloat16, None, torch.float32),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.float64, torch.float64),
    ],
)
def test_a_written_ema_is_a_copy_in_the_dtype_of_the_ema(value, weights, wanted, stored):
    run = Run(steps=1, weights=weights, dtype=wanted)
    written = torch.full((3, 2), 0.3, dtype=value).requires_grad_()
    run.state[run.params[0]]["ema"] = written
    ema = run.state[run.params[0]]["ema"]
    assert ema.dtype == stored
    assert torch.equal(ema, written.detach().to(stored))
    assert ema.data_ptr() != written.data_ptr()
    assert not ema.requires_grad


def test_a_written_ema_is_what_is_averaged_next():
    run = Run(steps=2, decay=0.5)
    param = run.params[0]
    run.state[param]["ema"] = torch.full((3, 2), 8.0)
    run.train(1)
    assert torch.equal(run.state[param]["ema"], torch.lerp(torch.full((3, 2), 8.0), param, 0.5))


def test_a_written_ema_has_the_strides_of_its_param():
    # EMA and weights are updated in one pass over memory where they have the same strides.
    param = torch.nn.Parameter(torch.randn(4, 3).t())
    optimizer = EMAOptimizer(torch.optim.SGD([param], lr=0.1), decay=0.1)
    optimizer.step()
    optimizer.state[param]["ema"] = torch.randn(3, 4)
    assert optimizer.state[param]["ema"].stride() == param.stride()


@pytest.mark.parametrize("shape", [(), (1,), (2,), (2, 3), (6,)])
def test_an_ema_of_another_shape_is_refused(shape):
    run = Run(steps=1)
    before = run.everything()
    with pytest.raises((ValueError, RuntimeError)):
        run.state[run.params[0]]["ema"] = torch.ones(shape)
    assert same(run.everything(), before)


@pytest.mark.parametrize("count", [torch.tensor(7), 7])
def test_a_written_counter_is_a_0_dim_int64_tensor_and_moves_the_schedule(count):
    run = Run(steps=2, decay=lambda update: 0.1 * min(update, 9))
    param = run.params[0]
    run.state[param]["ema_step"] = count
    step, ema = run.state[param]["ema_step"], run.state[param]["ema"].clone()
    assert step.dtype == torch.int64
    assert (step.dim(), int(step)) == (0, 7)
    run.train(1)
    assert torch.equal(run.state[param]["ema"], torch.lerp(ema, param.detach(), 1 - 0.1 * 8))
    assert int(run.state[param]["ema_step"]) == 8


def test_entries_of_the_inner_optimizer_are_written_to_it():
    run = Run(steps=1)
    param, value = run.params[0], torch.ones(3, 2)
    run.state[param]["exp_avg"] = value
    run.state[param]["note"] = 3
    assert run.inner.state[param]["exp_avg"] is value
    assert run.inner.state[param].pop("note") == 3
    assert "note" not in run.state[param]


def test_entries_written_by_the_inner_optimizer_are_seen():
    run = Run(steps=1)
    run.inner.state[run.params[0]]["exp_avg"] = value = torch.ones(3, 2)
    run.inner.state["shared"] = {"count": 1}
    assert run.state[run.params[0]]["exp_avg"] is value
    assert run.state["shared"] == {"count": 1}
    assert "shared" in run.state
    run.state["shared"] = {"count": 2}
    assert run.inner.state["shared"] == {"count": 2}
    del run.state["shared"]
    assert "shared" not in run.inner.state


def test_deleting_a_param_deletes_its_state_and_its_ema():
    run = Run(steps=2)
    for param in run.params:
        del run.state[param]
        assert param not in run.state
        assert param not in run.inner.state
        with pytest.raises(KeyError):
            del run.state[param]
    assert len(run.state) == 0
    run.train(1)
    assert int(run.state[run.params[1]]["ema_step"]) == 1


def test_deleting_an_entry_deletes_that_entry():
    run = Run(steps=2)
    entry = run.state[run.params[0]]
    del entry["exp_avg"]
    assert set(entry) == KEYS - {"exp_avg"}
    assert "exp_avg" not in run.inner.state[run.params[0]]
    entry.pop("ema")
    assert not {"ema", "exp_avg"} & set(entry)
    assert set(run.state[run.params[1]]) == {"ema", "ema_step"}


@pytest.mark.parametrize("key", ["ema", "ema_step", "exp_avg"])
def test_deleting_what_is_not_there_is_a_key_error(key):
    run = Run(steps=1)
    entry = run.state[run.params[1]]
    entry.clear()
    with pytest.raises(KeyError, match=key):
        del entry[key]
    assert run.params[1] not in run.inner.state


def test_an_ema_that_was_deleted_begins_anew_at_the_weights():
    run = Run(steps=5, decay=0.5)
    param = run.params[0]
    del run.state[param]["ema"]
    before = param.detach().clone()
    run.train(1)
    assert torch.equal(run.state[param]["ema"], torch.lerp(before, param.detach(), 0.5))
    assert int(run.state[param]["ema_step"]) == 1
    assert int(run.state[run.params[1]]["ema_step"]) == 6


def test_deleting_the_ema_while_swapped_still_gives_the_weights_back():
    run = Run(steps=3)
    before = run.params[0].detach().clone()
    with run.optimizer.swap_ema_weights():
        del run.state[run.params[0]]["ema"]
    assert torch.equal(run.params[0], before)


def test_setdefault_returns_a_live_entry():
    run = Run()
    entry = run.state.setdefault(run.params[0], {})
    entry["note"] = 1
    assert run.inner.state[run.params[0]] == {"note": 1}
    assert run.state.setdefault(run.params[0], {"note": 2})["note"] == 1
    assert dict(run.state.setdefault(run.params[1], {"note": 3})) in ({}, {"note": 3})


@pytest.mark.parametrize("steps", [0, 3])
def test_an_empty_entry_is_that_of_a_new_optimizer(steps):
    run, fresh = Run(steps=steps), Run()
    for param in run.params:
        run.state[param] = {}
        assert dict(run.state[param]) == {}
        assert run.inner.state[param] == {}
    for param, weights in zip(fresh.params, run.params, strict=True):
        param.data.copy_(weights.detach())
    run.train(2)
    fresh.train(2)
    assert same([*run.params], [*fresh.params])
    assert all(
        torch.equal(run.state[p]["ema"], fresh.state[q]["ema"])
        for p, q in zip(run.params, fresh.params, strict=True)
    )


@each_dtype
def test_the_state_may_be_replaced_by_a_copy_of_itself(dtype):
    touched, other = (Run(steps=3, weights=dtype) for _ in range(2))
    touched.optimizer.state = touched.copied_state()
    assert same(touched.everything(), other.everything())
    touched.train(3)
    other.train(3)
    assert same(touched.everything(), other.everything())


def test_the_state_may_be_replaced_by_itself():
    touched, other = (Run(steps=3) for _ in range(2))
    touched.optimizer.state = touched.state
    assert same(touched.everything(), other.everything())


@each_dtype
@pytest.mark.parametrize("enter", ["block", "eval"])
def test_the_state_may_be_replaced_while_swapped(dtype, enter):
    touched, other = (Run(steps=3, weights=dtype) for _ in range(2))
    if enter == "block":
        with touched.optimizer.swap_ema_weights():
            touched.optimizer.state = touched.copied_state()
    else:
        touched.optimizer.eval()
        touched.optimizer.state = touched.copied_state()
        touched.optimizer.train()
    assert same(touched.everything(), other.everything())


def test_a_replaced_state_puts_back_what_was_saved():
    run = Run(steps=2)
    saved, weights = run.copied_state(), [p.detach().clone() for p in run.params]
    run.train(1)
    expected = run.copied_state()
    run.train(3)
    run.optimizer.state = saved
    for param, value in zip(run.params, weights, strict=True):
        param.data.copy_(value)
    run.train(1)
    got = run.copied_state()
    assert all(same(got[p][k], expected[p][k]) for p in run.params for k in expected[p])


@pytest.mark.parametrize("copied", [False, True])
def test_the_state_of_another_optimizer_over_the_same_params_may_be_assigned(copied):
    run = Run(steps=3)
    other = EMAOptimizer(torch.optim.AdamW(run.params, lr=0.1), decay=0.1)
    other.state = run.copied_state() if copied else run.state
    assert set(other.inner.state) == {run.params[0]}
    assert all(same(dict(other.state[p]), dict(run.state[p])) for p in run.params)
    share = other.ema_metrics()["ema_initial_share"]
    assert share == pytest.approx(run.optimizer.ema_metrics()["ema_initial_share"])


def test_an_empty_state_is_that_of_a_new_optimizer():
    run = Run(steps=3)
    run.optimizer.state = {}
    assert not run.state
    run.train(1)
    assert set(run.state[run.params[0]]) == KEYS
    assert float(run.state[run.params[0]]["step"]) == 1


def test_a_written_ema_reaches_the_params_of_a_swap():
    run = Run(steps=1)
    written = torch.full((3, 2), 3.0)
    run.state[run.params[0]]["ema"] = written
    with run.optimizer.swap_ema_weights():
        assert torch.equal(run.params[0], written)


@pytest.mark.parametrize(
    ("weights", "key"), [(torch.float32, "ema"), (torch.bfloat16, "ema_weights")]
)
def test_training_weights_written_while_swapped_come_back_after_it(weights, key):
    run = Run(steps=2, weights=weights)
    param, written = run.params[0], torch.full((3, 2), 3.0)
    with run.optimizer.swap_ema_weights():
        swapped_in = param.detach().clone()
        run.state[param][key] = written
        written.zero_()
        assert torch.equal(param, swapped_in)
    assert same(param.detach(), torch.full((3, 2), 3.0, dtype=weights))
    assert torch.equal(run.state[param]["ema"].to(weights), swapped_in)


def test_training_weights_of_narrow_params_are_the_params_while_not_swapped():
    run = Run(steps=2, weights=torch.bfloat16)
    param = run.params[0]
    assert torch.equal(run.state[param]["ema_weights"], param)
    before = param.detach().clone()
    run.state[param]["ema_weights"] = torch.zeros(3, 2)
    assert torch.equal(param, before)
