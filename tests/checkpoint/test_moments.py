"""Model and optimizer files of two moments: what the checkpoint says of the model decides."""

import copy

import pytest
import torch
from reference import same, through_file
from runs import Run, swapped_save
from torch.optim import SGD

from ema_optim import EMAOptimizer, debiased_decay, equal_average, power_decay
from ema_optim._arithmetic.fingerprint import fingerprint
from ema_optim._checkpoint.notes import Notes, parse

CALLS = {
    "train": lambda o: o.train(),
    "eval": lambda o: o.eval(),
    "swap": lambda o: o.swap_ema_weights().__enter__(),
    "apply_ema": lambda o: o.apply_ema(),
    "step": lambda o: o.step(),
    "get_ema_state": lambda o: o.get_ema_state(None),
    "step with closure": lambda o: o.step(lambda: None),
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("call", CALLS)
def test_swapped_checkpoint_waits_for_its_model(dtype, call):
    # "Before or after the model" is documented: the exchange was made with the initial weights.
    run = Run(dtype).train(4)
    saved, facts = swapped_save(run), run.facts()
    again = Run(dtype, seed=9)
    again.optimizer.load_state_dict(saved["o"])
    again.optimizer.zero_grad()
    with pytest.raises(RuntimeError, match="load the model's state dict of the same moment"):
        CALLS[call](again.optimizer)
    again.model.load_state_dict(saved["model"])
    again.optimizer.train()
    assert same(again.facts(), facts)


def test_zero_grad_leaves_an_exchange_pending_where_the_checkpoint_tells():
    again = Run(seed=9).load(swapped_save(Run().train(4)))
    again.optimizer.zero_grad()
    assert again.optimizer.swapped


def without_notes(saved):
    """The checkpoint as the version before wrote it."""
    for group in saved["o"]["param_groups"]:
        group["ema_swapped"] = bool(group["ema_swapped"])
        group["ema_format"] = group["ema_format"].partition(";")[0]
    return saved


def test_zero_grad_makes_the_exchange_of_an_old_checkpoint():
    run = Run().train(4)
    again = Run(seed=9).load(without_notes(swapped_save(run)))
    again.train(2, seed=1)
    assert same(again.facts(), run.train(2, seed=1).facts())


def test_old_checkpoint_of_two_modes_is_still_told_by_equality():
    run = Run().train(4)
    saved = {"model": run.save()["model"], "o": without_notes(swapped_save(run))["o"]}
    with pytest.raises(RuntimeError, match="the EMA is in neither"):
        Run(seed=9).load(saved).optimizer.train()


@pytest.mark.parametrize("dtype", [None, "float24"])
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_model_file_of_inside_the_block_with_an_optimizer_file_of_outside_is_refused(
    weights, dtype
):
    # The run went on from the EMA weights without a word.
    run = Run(weights, ema_dtype=dtype).train(4)
    saved = {"model": swapped_save(run)["model"], "o": run.save()["o"]}
    again = Run(weights, seed=9, ema_dtype=dtype).load(saved)
    again.model(torch.ones(1, 4, dtype=weights)).sum().backward()
    facts = again.facts()
    with pytest.raises(RuntimeError, match=r"got its EMA weights.*apply_ema\(\)"):
        again.optimizer.step()
    assert same(again.facts(), facts)
    again.optimizer.apply_ema()  # the other remedy
    again.train(1)


def test_every_way_into_the_weights_rounds_an_ema_in_float24_alike():
    # At ties a swap and apply_ema() did not, and the refusal above did not know the EMA weights.
    options = {"decay": equal_average(), "ema_dtype": "float24"}  # a mean of two has many ties
    run = Run(torch.bfloat16, **options).train(2)
    saved = {"model": swapped_save(run)["model"], "o": run.save()["o"]}
    with pytest.raises(RuntimeError, match="got its EMA weights"):
        Run(torch.bfloat16, seed=9, **options).load(saved).train(1)
    run.optimizer.apply_ema()
    assert same(run.weights(), dict(saved["model"]))


@pytest.mark.parametrize("change", ["other weights", "apply_ema", "decay 0", "nothing averaged"])
def test_first_step_after_a_load_is_refused_for_the_ema_weights_alone(change):
    options = {"decay 0": {"decay": 0.0}, "nothing averaged": {"update_after_step": 9}}
    options = options.get(change, {})
    again = Run(seed=9, **options).load(Run(**options).train(4).save())
    if change == "other weights":
        again.model[0].weight.data.add_(1)
    if change == "apply_ema":
        again.optimizer.apply_ema()
    again.train(1)


def test_ema_that_was_applied_and_then_swapped_is_no_lost_one():
    run = Run().train(4)
    run.optimizer.apply_ema()
    again = Run(seed=9).load(swapped_save(run))
    again.optimizer.train()
    assert same(again.facts(), run.facts())


SCHEDULES = [power_decay(0.1), debiased_decay(0.9), equal_average()]


@pytest.mark.parametrize("decay", SCHEDULES, ids=repr)
def test_first_update_of_a_stride_saved_while_swapped_resumes(decay):
    # It forgets all that was before: EMA and weights are equal, and rightly.
    run = Run(decay=decay, update_every=2).train(2)
    again = Run(seed=9, decay=decay, update_every=2).load(swapped_save(run))
    again.optimizer.train()
    assert same(again.facts(), run.facts())


def late(seed=0):
    run = Run(seed=seed)
    still = torch.nn.Parameter(torch.ones(3))
    run.optimizer.add_param_group({"params": [still], "lr": 0.01})
    return run, still


def test_parameter_trained_without_ema_then_frozen_under_one_resumes():
    # "The checkpoint is damaged", it said, of one that is not.
    inner = SGD([w := torch.nn.Parameter(torch.ones(3)), v := torch.nn.Parameter(torch.ones(2))])
    inner.param_groups[0].update(lr=0.1, momentum=0.9)
    w.grad, v.grad = torch.ones(3), torch.ones(2)
    inner.step()
    w.requires_grad_(False).grad = None
    optimizer = EMAOptimizer(inner, 0.5)
    optimizer.step()
    saved = through_file(optimizer.state_dict())
    assert "without=0;" in saved["param_groups"][0]["ema_format"]
    again = EMAOptimizer(SGD([torch.ones(3, requires_grad=True), v], lr=0.1, momentum=0.9), 0.5)
    again.load_state_dict(saved)
    assert "ema" in again.state[v]


def test_group_enabled_and_saved_before_the_next_step_resumes():
    run, still = late()
    run.optimizer.param_groups[1]["ema_enabled"] = False
    still.grad = torch.ones(3)
    run.train(2)
    run.optimizer.param_groups[1]["ema_enabled"] = True
    again, other = late(seed=9)
    again.load(run.save())
    assert "ema" in again.optimizer.state[again.model[0].weight]
    assert "ema" not in again.optimizer.state[other]


def test_lost_entry_beside_one_that_never_was_is_damage():
    run, still = late()
    run.optimizer.param_groups[1]["ema_enabled"] = False
    still.grad = torch.ones(3)
    saved = run.train(2).save()
    for key in ("ema", "ema_step"):
        del saved["o"]["state"][0][key]
    again, _ = late(seed=9)
    with pytest.raises(ValueError, match=r"ema of param_groups\[0\]\['params'\]\[0\] must be in"):
        again.optimizer.load_state_dict(saved["o"])


@pytest.mark.filterwarnings("ignore:an EMA in bfloat16")
@pytest.mark.parametrize("dtype", [None, torch.float64, "float24", torch.bfloat16], ids=str)
@pytest.mark.parametrize("saved_as", [None, "float24", "float32_compensated"], ids=str)
@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_swapped_checkpoint_loads_in_any_storage_format(weights, saved_as, dtype):
    run = Run(weights, ema_dtype=saved_as).train(4)
    saved, ema = swapped_save(run), run.optimizer.get_ema_state(run.model)
    again = Run(weights, seed=9, ema_dtype=dtype)
    again.optimizer.load_state_dict(saved["o"])
    again.load({"model": saved["model"], "o": through_file(again.optimizer.state_dict())})
    again.optimizer.train()
    assert same(again.model.state_dict(), run.model.state_dict())
    for name, value in again.optimizer.get_ema_state(again.model).items():
        torch.testing.assert_close(value, ema[name].to(value.dtype), rtol=2**-7, atol=0)
    through_file(again.train(1).save())


@pytest.mark.parametrize("weights", [torch.float32, torch.bfloat16], ids=str)
def test_marks_of_a_checkpoint_are_texts_and_their_keys_never_change(weights):
    run = Run(weights).train(4)
    plain, swapped = run.save()["o"], swapped_save(run)["o"]
    groups = plain["param_groups"][0], swapped["param_groups"][0]
    assert [sorted(k for k in g if "ema" in k) for g in groups] == [
        ["ema_format", "ema_step", "ema_swapped"]
    ] * 2
    assert groups[0]["ema_swapped"] is False
    assert groups[1]["ema_swapped"] not in (True, "")
    assert groups[0]["ema_format"] != groups[1]["ema_format"]


FORMS = {
    "non-contiguous": lambda t: t.t().contiguous().t(),
    "strided": lambda t: torch.stack([t, t + 1], -1)[..., 0],
    "copy": torch.clone,
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float64, torch.complex64, torch.complex128]
)
def test_fingerprint_is_of_the_values_whatever_their_strides_and_order(dtype, form):
    tensors = [torch.randn(3, 4, dtype=dtype), torch.randn(5, dtype=dtype), torch.empty(0)]
    other = [*reversed(tensors[1:]), FORMS[form](tensors[0])]
    assert fingerprint(tensors) == fingerprint(other)
    tensors[0][1, 2] += 1
    assert fingerprint(tensors) != fingerprint(other)


def test_fingerprint_tells_tensors_that_have_changed_values():
    one, two = torch.ones(3), torch.zeros(3)
    assert fingerprint([one]) != fingerprint([two])
    assert fingerprint([torch.tensor([1.0, 2.0]), torch.tensor([3.0, 4.0])]) != fingerprint(
        [torch.tensor([1.0, 3.0]), torch.tensor([2.0, 4.0])]
    )


@pytest.mark.parametrize(
    "notes",
    [
        Notes("default"),
        Notes("float24", frozenset(), "float32*2:0123456789abcdef"),
        Notes("default", frozenset([0, 3, 4, 5, 9])),
        Notes("default", law='{"windows": {"ema": 0.999}, "update_every": 1}'),
    ],
)
def test_notes_go_through_their_text(notes):
    assert parse(notes.text(), "group") == notes
    assert parse(notes.text() + "; later=ema(0.999)", "group") == notes  # a part of a later version


def calls_of_a_load(count):
    class Counting(list):
        looks = 0

        def __iter__(self):
            for item in super().__iter__():
                Counting.looks += 1
                yield item

    params = [torch.nn.Parameter(torch.ones(1)) for _ in range(count)]
    optimizer = EMAOptimizer(SGD(params, lr=0.1))
    for param in params:
        param.grad = torch.ones(1)
    optimizer.step()
    saved = optimizer.state_dict()
    optimizer.param_groups[0]["params"] = Counting(params)
    optimizer.load_state_dict(saved)
    return Counting.looks


def test_load_is_linear_in_the_number_of_tensors():
    assert calls_of_a_load(400) <= 4.5 * calls_of_a_load(100)


def test_load_of_parameters_whose_order_has_changed_is_no_damage():
    # A distributed load goes by name: positions of another order are not those of the file.
    run = Run()
    run.model[2].bias.requires_grad_(False)
    run.model[2].bias.grad = None
    saved = run.train(2).save()["o"]
    assert saved["param_groups"][0]["ema_format"].startswith("default; without=3; ")
    saved["state"][3] = {"step": torch.tensor(2.0)}
    order = [3, 0, 1, 2]
    model = Run(seed=9).model
    params = [list(model.parameters())[i] for i in order]
    again = EMAOptimizer(SGD(params, lr=0.1), 0.5)
    saved["param_groups"][0]["params"] = order
    again.load_state_dict(saved)
    assert again._ema.held is not None


GIVEN = {"ema_enabled": (True, False), "ema_decay": (0.125, 0.75), "ema_dtype": ("float24", None)}


def with_option(key, value, added):
    torch.manual_seed(0)
    first, second = (torch.nn.Parameter(torch.randn(3)) for _ in range(2))
    groups = [{"params": [first]}, {"params": [second], key: value}]
    if value is None:
        del groups[1][key]
    optimizer = EMAOptimizer(SGD(groups[: 2 - added], lr=0.1, momentum=0.9), 0.5)
    if added:
        optimizer.add_param_group(groups[1])
    for _ in range(2):
        first.grad, second.grad = torch.ones(3), torch.ones(3)
        optimizer.step()
    return optimizer


@pytest.mark.parametrize("added", [False, True])
@pytest.mark.parametrize("key", GIVEN)
def test_option_that_a_group_was_given_wins_over_a_load(key, added):
    # A group's own option lost to the checkpoint's in silence, against what README says.
    given, saved = GIVEN[key]
    optimizer, other = with_option(key, given, added), with_option(key, saved, added)
    if saved is None:
        other.param_groups[1][key] = torch.float64
    copy_of = copy.deepcopy(optimizer)
    for each in (optimizer, copy_of):
        each.load_state_dict(through_file(other.state_dict()))
        assert each.param_groups[1][key] == given
        each.step()


def test_option_set_on_a_live_group_is_loaded_where_none_was_given():
    optimizer, other = with_option("ema_decay", None, False), with_option("ema_decay", None, False)
    other.param_groups[1]["ema_decay"] = 0.75
    optimizer.load_state_dict(through_file(other.state_dict()))
    assert optimizer.param_groups[1]["ema_decay"] == 0.75
