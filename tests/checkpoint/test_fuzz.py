"""Damaged checkpoints: every single damage is refused by name, or does no harm."""

import copy
import re

import pytest
import torch
from reference import same
from runs import Run, swapped_save

from ema_optim import warmup_decay
from ema_optim._checkpoint.carry import carry
from ema_optim._checkpoint.layout import GROUP_MARKS, GROUP_OPTIONS, STATE_KEYS
from ema_optim._checkpoint.nested import nest
from ema_optim.schedules import initial_share

MISSING = object()
DAMAGES = {
    "missing": MISSING,
    "None": None,
    "negative": -1,
    "huge": 2**62,
    "too large": 2**80,
    "fraction": 1.5,
    "text": "text",
    "notes": "default; without=x",
    "bytes": b"text",
    "empty dict": {},
    "dict": {"a": 1},
    "dict of a group": {"params": [0, 1, 2, 3]},
    "list": [1],
    "nested list": [[{}]],
    "float tensor": torch.zeros(3),
    "int tensor": torch.zeros(5, dtype=torch.int64),
    "number": torch.tensor(3),
    "complex": torch.zeros(5, dtype=torch.complex64),
    "meta": torch.zeros(5, device="meta"),
    "meta number": torch.zeros((), dtype=torch.int64, device="meta"),
    "sparse": torch.zeros(5, 4).to_sparse(),
    "bool": True,
}
OURS = {*STATE_KEYS, *GROUP_MARKS, *GROUP_OPTIONS, "ema_entries", "marks", "params"}


def nested_save(run):
    inner = {"theirs": run.optimizer.inner.state_dict()}
    return nest(inner, run.optimizer._ema)


RUNS = {
    "plain": (torch.float32, None, lambda run: run.save()["o"]),
    "carried": (torch.float32, None, lambda run: carry(run.save()["o"])),
    "swapped": (torch.float32, None, lambda run: swapped_save(run)["o"]),
    "parked": (torch.bfloat16, None, lambda run: swapped_save(run)["o"]),
    "float24": (torch.float32, "float24", lambda run: run.save()["o"]),
    "nested": (torch.float32, None, nested_save),
}


def nodes(value, path=()):
    """Paths to everything in a checkpoint but the inner optimizer's own leaves."""
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in items:
        own = key in OURS or isinstance(entry, (dict, list)) or "ema_entries" in path
        if own and key != "inner" and key not in ("betas",):
            yield (*path, key)
            if isinstance(entry, (dict, list)):
                yield from nodes(entry, (*path, key))


def damaged(saved, path, damage):
    state = made = copy.deepcopy(saved)
    for key in path[:-1]:
        state = state[key]
    if damage is MISSING:
        del state[path[-1]]
    else:
        state[path[-1]] = damage
    return made


NAMED = re.compile(r"param_groups|state of parameter|state_dict must have|must have 1 param groups")


def check(run, state):
    """Whether a load refuses by name and changes nothing, or leaves what can be saved."""
    before, groups = run.facts(), run.optimizer.param_groups
    try:
        run.optimizer.load_state_dict(state)
    except (ValueError, TypeError) as refused:
        named = NAMED.search(str(refused))
        assert named
        assert same(run.facts(), before)
        assert run.optimizer.param_groups is groups
    else:
        run.optimizer.state_dict()


@pytest.mark.filterwarnings("ignore:the checkpoint holds no EMA")
@pytest.mark.parametrize("damage", DAMAGES)
@pytest.mark.parametrize("kind", RUNS)
def test_a_damage_is_refused_by_name_or_does_no_harm(kind, damage):
    weights, ema_dtype, save = RUNS[kind]
    options = {"ema_dtype": ema_dtype, "decay": warmup_decay(0.999999)}
    saved = save(Run(weights, **options).train(2))
    for path in nodes(saved):
        run = Run(weights, seed=9, **options)
        if kind == "nested":
            run.optimizer.inner.load_state_dict = lambda state: None
        try:
            check(run, damaged(saved, path, DAMAGES[damage]))
        except BaseException as error:
            raise AssertionError(f"at {path}: {error!r}") from error


@pytest.mark.parametrize("updates", [10**5, 10**8, 2**62])
def test_initial_share_of_absurd_counters_ends_and_is_right(updates):
    # It multiplied out one update at a time: a damaged counter was a load without an end.
    assert initial_share(lambda u: 1 - 1 / (u + 1) ** 2, updates) == pytest.approx(0.5, rel=1e-4)
    assert initial_share(lambda u: 1 - 1 / (u + 1) ** 0.5, updates) == 0.0


def test_initial_share_is_exact_until_a_million_updates():
    exact = initial_share(lambda u: u / (u + 1), 10**6 - 1)
    assert exact == pytest.approx(1e-6, rel=1e-9)
    coarse = initial_share(lambda u: u / (u + 1), 10**8)
    assert coarse == pytest.approx(1e-8, rel=1e-4)
