"""``EMAEngine`` over real DeepSpeed engines: training, swap, export and import."""

import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed_engines import (
    DECAY,
    LR,
    NEEDS,
    ROWS,
    SHARDED,
    config_of,
    deepspeed,
    ema_engine,
    engine_of,
    equal,
    everywhere,
    forward,
    groups_of,
    masters,
    on_engines,
    plain_model,
    shown,
    train,
    whole_state,
)

from ema_optim import EMAOptimizer

pytestmark = NEEDS

GUIDE = Path(__file__).parents[2] / "examples" / "several_devices.md"


@on_engines(*ROWS)
def test_the_training_is_that_of_the_engine_alone(row):
    bare = train(engine_of(row), 5)
    engine, ema = ema_engine(row)
    train(engine, 3)
    with ema.swap_ema_weights():
        shown(engine)
    whole_state(ema)
    train(engine, 2)
    assert equal(masters(engine), masters(bare))
    assert torch.equal(shown(engine), shown(bare))


@on_engines(*ROWS)
def test_the_average_is_that_of_the_masters(row):
    engine, ema = ema_engine(row)
    hand = masters(engine)

    def average():
        for name, weights in masters(engine).items():
            hand[name].lerp_(weights, 1 - DECAY)

    train(engine, 4, average)
    assert equal(whole_state(ema), hand)
    assert ema.ema_metrics()["ema_updates"] == 4
    assert bool(ema.get_ema_state()) == (torch.distributed.get_rank() == 0)


@on_engines(*ROWS)
def test_a_swap_reaches_the_forward_and_is_undone(row):
    engine, ema = ema_engine(row)
    before = shown(train(engine, 3)), masters(engine)
    model = plain_model()
    model.load_state_dict(whole_state(ema))
    dtype = torch.bfloat16 if "bf16" in row else torch.float32
    with ema.swap_ema_weights():
        assert torch.equal(shown(engine), shown(model.to(dtype)))
        assert equal(whole_state(ema), masters(engine))
    assert torch.equal(shown(engine), before[0])
    assert equal(masters(engine), before[1])
    assert not torch.equal(shown(model), before[0])


@on_engines("0 bf16", "2 bf16", "3 bf16")
def test_a_step_or_a_load_inside_a_swap_is_refused(row, folder):
    engine, ema = ema_engine(row)
    before = masters(train(engine, 2))
    engine.save_checkpoint(folder)
    with pytest.raises(RuntimeError, match="leave the block"), ema.swap_ema_weights():
        engine.load_checkpoint(folder)
    with pytest.raises(RuntimeError, match="leave the block"), ema.swap_ema_weights():
        train(engine, 1)
    ema.eval()
    with pytest.raises(RuntimeError, match=r"call optimizer.train\(\)"):
        train(engine, 1)
    ema.train()
    assert equal(masters(engine), before)
    assert not ema.swapped


@on_engines("0 bf16", "1 bf16", "3 fp32")
def test_an_error_while_the_weights_are_published_leaves_the_training_weights(row):
    engine, ema = ema_engine(row)
    before = shown(train(engine, 2)), masters(engine)
    source, publish = ema._masters, ema._masters._publish
    source._publish = lambda: [publish(), source.__dict__.pop("_publish"), 1 / 0]
    with pytest.raises(ZeroDivisionError), ema.swap_ema_weights():
        pass
    assert torch.equal(shown(engine), before[0])
    assert equal(masters(engine), before[1])


@on_engines("0 fp32", "1 fp32", "2 bf16", "3 fp32", "3 bf16")
def test_an_average_is_loaded_by_name_without_touching_the_weights(row):
    engine, ema = ema_engine(row)
    before = shown(train(engine, 2)), masters(engine)
    wanted = {name: torch.randn(value.shape) for name, value in before[1].items()}
    ema.load_ema_state({f"module.{name}": value for name, value in wanted.items()})
    assert equal(whole_state(ema), wanted)
    assert torch.equal(shown(engine), before[0])
    assert equal(masters(engine), before[1])
    one = dict([wanted.popitem()])
    ema.load_ema_state({name: -value for name, value in one.items()}, strict=False)
    assert equal(whole_state(ema), {**wanted, **{name: -value for name, value in one.items()}})


@on_engines("1 fp32", "3 bf16")
def test_names_and_shapes_are_checked_before_a_load_by_name(row):
    _, ema = ema_engine(row)
    state = whole_state(ema)
    with pytest.raises(KeyError, match="missing"):
        ema.load_ema_state(dict(list(state.items())[1:]))
    with pytest.raises(ValueError, match=r"the EMA of 0\.bias must have shape"):
        ema.load_ema_state({**state, "0.bias": torch.zeros(8)})
    assert not ema._ema.slots


@on_engines("0 fp32", "2 fp32", "3 bf16")
def test_a_fresh_engine_goes_on_from_an_average_by_name(row):
    engine, ema = ema_engine(row)
    start, state = masters(engine), {k: v + 1 for k, v in whole_state(ema).items()}
    ema.load_ema_state(state)
    train(engine, 1)
    for name, weights in masters(engine).items():
        state[name].lerp_(weights, 1 - DECAY)
    assert equal(whole_state(ema), state)
    assert not equal(start, masters(engine))


@on_engines("0 bf16", "2 bf16", "3 fp32")
def test_applied_the_average_is_what_trains_on(row):
    engine, ema = ema_engine(row)
    train(engine, 3)
    wanted = whole_state(ema)
    with ema.swap_ema_weights():
        inside = shown(engine)
    ema.apply_ema()
    assert equal(masters(engine), wanted)
    assert torch.equal(shown(engine), inside)
    train(engine, 1)
    with ema.swap_ema_weights():
        ema.apply_ema()
    assert equal(masters(engine), whole_state(ema))


@on_engines("1 fp32", "2 bf16", "3 fp32", "0 bf16")
def test_the_distance_is_that_of_the_whole_weights(row):
    engine, ema = ema_engine(row)
    weights, averages = masters(train(engine, 3)), whole_state(ema)
    gap = sum((averages[n] - w).double().square().sum() for n, w in weights.items())
    size = sum(w.double().square().sum() for w in weights.values())
    assert ema.ema_metrics()["ema_distance"] == pytest.approx(float((gap / size).sqrt()), rel=1e-6)


@on_engines("2 bf16", "3 fp32")
def test_strides_formats_and_decays_of_groups_are_those_of_the_optimizer(row):
    from ema_optim.integrations.deepspeed import EMAEngine

    engine = engine_of(row, options={"ema_decay": 0.0})
    ema = EMAEngine(engine, 0.5, update_every=2, update_after_step=1, dtype="float24")
    train(engine, 1)
    hand = masters(engine)
    train(engine, 2)
    state, now = whole_state(ema), masters(engine)
    for name, weights in now.items():
        kept = 0.25 if name.endswith("weight") else 0.0
        wanted = torch.lerp(hand[name], weights, 1 - kept)
        torch.testing.assert_close(state[name], wanted, rtol=1e-4, atol=1e-6)


@on_engines("2 bf16", "3 bf16")
def test_a_skipped_step_is_no_step(row):
    engine, ema = ema_engine(row)
    before = whole_state(ema) if train(engine, 1) else None
    for _ in range(engine.gradient_accumulation_steps()):
        engine.backward((forward(engine) * float("inf")).sum())
        engine.step()
    assert engine.optimizer.overflow
    assert equal(whole_state(ema), before)
    assert ema.ema_metrics()["ema_updates"] == 1


@on_engines("1 fp32", "2 bf16")
def test_round_robin_gradients_allow_the_swap_and_refuse_names(row):
    from ema_optim.integrations.deepspeed import EMAEngine

    engine = engine_of(row, round_robin_gradients=True)
    ema, before = EMAEngine(engine, 0.0), shown(engine)
    with pytest.raises(RuntimeError, match="round_robin_gradients"):
        ema.get_ema_state()
    with pytest.raises(RuntimeError, match="round_robin_gradients"):
        ema.load_ema_state({})
    train(engine, 2)
    after = shown(engine)
    with ema.swap_ema_weights():
        assert torch.equal(shown(engine), after)  # a decay of 0
    assert not torch.equal(before, after)


@on_engines(*[row for row in SHARDED if ROWS[row][0] == 2], "0 bf16")
def test_as_client_optimizer_it_is_refused_by_name(row):
    with pytest.raises(RuntimeError, match="EMAEngine"):
        train(engine_of(row, lambda optimizer: EMAOptimizer(optimizer, 0.5)), 1)


@on_engines("0 fp32")
def test_as_client_optimizer_it_works_where_nothing_is_replaced(row):
    bare = train(engine_of(row), 3)
    engine = engine_of(row, lambda optimizer: EMAOptimizer(optimizer, 0.5))
    before = shown(train(engine, 3))
    assert torch.equal(before, shown(bare))
    with engine.optimizer.swap_ema_weights():
        assert not torch.equal(shown(engine), before)
    assert torch.equal(shown(engine), before)


@on_engines("2 fp32, one rank", "3 bf16, one rank")
def test_what_it_cannot_serve_is_refused_with_a_remedy(row):
    from deepspeed.runtime.pipe.engine import PipelineEngine

    from ema_optim.integrations.deepspeed import EMAEngine

    engine, _ = ema_engine(row)
    with pytest.raises(TypeError, match="got a PipelineEngine"):
        EMAEngine(PipelineEngine.__new__(PipelineEngine))
    with pytest.raises(RuntimeError, match="has an EMAEngine already"):
        EMAEngine(engine)
    with pytest.raises(TypeError, match=r"deepspeed.initialize has returned"):
        EMAEngine(engine.module)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\]"):
        EMAEngine(engine_of(row), 2.0)


CONFIGURED = [
    "zero_nvme_offload_optimizer",
    "zenflow",
    "super_offload",
    "bf16_master_weights_and_gradients",
    "fp16_master_weights_and_gradients",
    "zero_elastic_checkpoint",
]


@on_engines("2 fp32, one rank")
def test_masters_that_are_not_at_hand_are_refused_before_anything_is_attached(row):
    from ema_optim.integrations.deepspeed import EMAEngine

    for name in CONFIGURED:
        engine = engine_of(row)
        setattr(engine, name, lambda: True)
        with pytest.raises(ValueError, match="must have the fp32 masters at hand"):
            EMAEngine(engine)
        assert not hasattr(engine.optimizer.step, "ema_engine")


@on_engines("2 bf16", "3 fp32")
def test_accelerates_engine_is_served_as_any(row, folder):
    deepspeed()
    from accelerate import Accelerator, DeepSpeedPlugin
    from accelerate.state import AcceleratorState, PartialState

    from ema_optim.integrations.deepspeed import EMAEngine

    AcceleratorState._reset_state(reset_partial_state=True)
    PartialState._reset_state()
    accelerator = Accelerator(deepspeed_plugin=DeepSpeedPlugin(config_of(row)))
    model = plain_model()
    engine, _ = accelerator.prepare(model, torch.optim.AdamW(groups_of(model), lr=LR))
    ema = EMAEngine(engine, DECAY)
    before, wanted = shown(train(engine, 2)), whole_state(ema)
    accelerator.save_state(folder)
    train(engine, 1)
    accelerator.load_state(folder)
    assert torch.equal(shown(engine), before)
    assert equal(whole_state(ema), wanted)


# DeepSpeed makes this optimizer for its own FusedAdam alone, which no CPU has.
@on_engines("2 fp32, one rank")
def test_flat_masters_of_stage_0_are_found_by_name_and_reach_the_forward(row):
    from ema_optim.integrations._deepspeed import masters_of

    params = [torch.nn.Parameter(torch.randn(2, 3).bfloat16()), torch.nn.Parameter(torch.ones(4))]
    flat = torch.arange(10.0)
    zero = SimpleNamespace(fp32_groups_flat=[flat], fp16_groups=[params], overflow=False)
    source = masters_of(zero)
    source.publish()
    assert torch.equal(params[0], torch.arange(6.0).view(2, 3).bfloat16())
    source.write(params[1], torch.zeros(4))
    assert torch.equal(source.read(params[1]), torch.zeros(4))
    assert torch.equal(source.read(params[0]).flatten(), flat[:6])
    assert not flat[6:].any()


@on_engines("3 bf16")
def test_the_block_of_the_guide_runs(row, folder):
    deepspeed()
    os.chdir(everywhere(folder))
    (block,) = re.findall(r"```python\n(import deepspeed\n.*?)```", GUIDE.read_text(), re.DOTALL)
    loader = torch.randn(3, 2, 4).bfloat16()
    names = {"torch": torch, "model": plain_model(), "config": config_of(row), "loader": loader}
    exec(compile(block, GUIDE.name, "exec"), {**names, "evaluate": shown})
    assert (Path("checkpoints") / "latest").read_text() == "global_step3"
