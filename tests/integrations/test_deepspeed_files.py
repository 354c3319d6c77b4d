"""``EMAEngine`` in DeepSpeed's checkpoints: saved, loaded, converted, killed, left behind."""

import os
import warnings
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from deepspeed_engines import (
    DECAY,
    NEEDS,
    ROWS,
    SHARDED,
    ema_engine,
    engine_of,
    equal,
    everywhere,
    masters,
    on_engines,
    shown,
    train,
    whole_state,
)

from ema_optim._warnings import EMAWarning

pytestmark = NEEDS


def save(engine, ema, folder, inside, tag="saved"):
    with ema.swap_ema_weights(inside):
        engine.save_checkpoint(folder, tag)


@pytest.mark.parametrize("inside", [False, True])
@on_engines(*ROWS)
def test_a_fresh_engine_resumes_bit_for_bit(row, inside, folder):
    engine, ema = ema_engine(row)
    save(train(engine, 3), ema, folder, inside)
    other, loaded = ema_engine(row)
    other.load_checkpoint(folder)
    assert torch.equal(shown(other), shown(engine))
    assert equal(whole_state(loaded), whole_state(ema))
    train(engine, 2), train(other, 2)
    assert equal(masters(other), masters(engine))
    assert equal(whole_state(loaded), whole_state(ema))
    assert loaded.ema_metrics()["ema_updates"] == 5
    assert torch.equal(shown(other), shown(engine))


@on_engines("0 fp32", "0 bf16", "1 bf16", "2 fp32", "3 bf16")
def test_an_engine_alone_resumes_from_it(row, folder):
    engine, ema = ema_engine(row)
    save(train(engine, 3), ema, folder, False)
    bare = engine_of(row)
    bare.load_checkpoint(folder)
    assert equal(masters(train(bare, 2)), masters(train(engine, 2)))


@pytest.mark.parametrize(
    ("dtype", "inside"),
    [(None, False), (None, True), ("float24", False), (torch.bfloat16, True)],
)
@on_engines("2 bf16", "3 fp32")
def test_an_average_that_was_loaded_before_it_was_attached_is_taken_over(
    row, inside, dtype, folder
):
    from ema_optim.integrations.deepspeed import EMAEngine

    warnings.filterwarnings("ignore", "an EMA in bfloat16", category=EMAWarning)
    engine, ema = ema_engine(row, dtype=dtype)
    save(train(engine, 2), ema, folder, inside)
    late = engine_of(row)
    late.load_checkpoint(folder)
    loaded = EMAEngine(late, DECAY, dtype=dtype)
    train(engine, 2), train(late, 2)
    assert equal(whole_state(loaded), whole_state(ema))
    assert equal(masters(late), masters(engine))
    assert not any(key.startswith("ema") for g in loaded._masters.base.param_groups for key in g)


@on_engines("0 bf16", "1 fp32", "3 bf16")
def test_an_average_that_an_engine_alone_has_carried_along_is_not_taken(row, folder):
    engine, ema = ema_engine(row)
    save(train(engine, 2), ema, folder, False, "one")
    bare = engine_of(row)
    bare.load_checkpoint(folder, "one")
    train(bare, 1).save_checkpoint(folder, "two")
    other, fresh = ema_engine(row)
    told = "is of step 2, and the checkpoint of step 3" if torch.distributed.get_rank() == 0 else ""
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", EMAWarning)
        other.load_checkpoint(folder, "two")
    assert any(told in str(w.message) for w in seen) or not told
    assert equal(masters(other), masters(bare))
    assert fresh.ema_metrics()["ema_updates"] == 0


@on_engines("0 fp32", "2 bf16", "3 fp32")
def test_a_checkpoint_without_an_average_begins_one(row, folder):
    bare = train(engine_of(row), 2)
    bare.save_checkpoint(folder, "bare")
    engine, ema = ema_engine(row)
    train(engine, 1)
    first = torch.distributed.get_rank() == 0
    if first:
        with pytest.warns(EMAWarning, match="holds no EMA"):
            engine.load_checkpoint(folder)
    else:
        engine.load_checkpoint(folder)
    hand = masters(engine)
    for name, weights in masters(train(engine, 1)).items():
        hand[name].lerp_(weights, 1 - DECAY)
    assert equal(whole_state(ema), hand)


@on_engines("2 bf16", "3 bf16")
def test_a_load_of_an_earlier_tag_forgets_what_came_after(row, folder):
    engine, ema = ema_engine(row)
    save(train(engine, 2), ema, folder, False, "two")
    wanted = whole_state(ema)
    other, later = ema_engine(row)
    train(other, 3)
    other.load_checkpoint(folder, "two")
    assert equal(whole_state(later), wanted)
    assert later.ema_metrics()["ema_updates"] == 2


@on_engines(*[row for row in SHARDED if not row.startswith("1 bf16")])
def test_zero_to_fp32_of_a_tag_saved_inside_a_swap_is_the_average(row, folder):
    from deepspeed.utils.zero_to_fp32 import get_fp32_state_dict_from_zero_checkpoint

    engine, ema = ema_engine(row)
    train(engine, 2)
    for inside, wanted in ((False, masters(engine)), (True, whole_state(ema))):
        save(engine, ema, folder, inside, f"inside {inside}")
        everywhere(folder)
        found = get_fp32_state_dict_from_zero_checkpoint(folder, f"inside {inside}")
        assert equal({k: v.float() for k, v in found.items()}, wanted)


@on_engines("2 bf16", "3 bf16")
def test_a_universal_checkpoint_converts_and_its_loss_is_told(row, folder):
    engine, ema = ema_engine(row)
    save(train(engine, 2), ema, folder, False, "global_step2")
    saved, state = masters(engine), whole_state(ema)
    if torch.distributed.get_rank() == 0:
        convert(folder)
    everywhere(folder)
    universal = {"checkpoint": {"load_universal": True}}
    other = engine_of(row, config=universal)
    from ema_optim.integrations.deepspeed import EMAEngine

    loaded = EMAEngine(other, DECAY)
    warnings.filterwarnings("ignore", "a universal checkpoint holds no EMA", category=EMAWarning)
    other.load_checkpoint(folder, "global_step2_universal")
    assert equal(masters(other), saved)
    loaded.load_ema_state(state)
    assert equal(whole_state(loaded), state)


def convert(folder):
    """What DeepSpeed's ``ds_to_universal`` does."""
    from deepspeed.checkpoint import ds_to_universal

    tag = f"{folder}/global_step2"
    folders = {"input_folder": tag, "output_folder": f"{tag}_universal", "keep_temp_folder": True}
    workers = {"num_extract_workers": 1, "num_merge_workers": 1}
    options = {"strict": True, "inject_missing_state": True}
    ds_to_universal.main(SimpleNamespace(**folders, **workers, **options))


@on_engines("2 fp32, one rank", "3 bf16, one rank")
def test_a_killed_save_leaves_the_tag_before_loadable(row, folder):
    engine, ema = ema_engine(row)
    save(train(engine, 2), ema, folder, False, "whole")
    wanted = masters(engine), whole_state(ema)
    train(engine, 1)
    engine.checkpoint_engine.save = cut
    with pytest.raises(SystemExit):
        engine.save_checkpoint(folder, "cut")
    assert any(os.scandir(Path(folder, "cut")))
    other, loaded = ema_engine(row)
    other.load_checkpoint(folder)
    assert equal(masters(other), wanted[0])
    assert equal(whole_state(loaded), wanted[1])


def cut(state_dict, path, *args, **kwargs):
    """As a process that dies in the middle of a file."""
    Path(path).write_bytes(b"PK half a file")
    raise SystemExit
