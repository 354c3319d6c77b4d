"""Checkpoints of the version before, which lack what later ones say of themselves.

``tests/data`` holds flattened distributed checkpoints of three steps of the model in ``sharded``,
saved on two ranks by the first version, in training ("plain") and while swapped.
"""

import tarfile
from pathlib import Path

import pytest
import torch
from ranks import run_on
from saved_shards import fresh, load, uninterrupted
from sharded import equal, train, whole_ema, whole_weights

ARCHIVE = Path(__file__).parents[1] / "data" / "version_0.tar.xz"


def goes_on(world, folder):
    model, optimizer = fresh(world, "default" if world > 1 else None, torch.float32)
    load(model, optimizer, folder, "flattened")
    train(model, optimizer, range(3, 6))
    weights, emas = uninterrupted(6)
    assert equal(whole_weights(model), weights)
    assert equal(whole_ema(optimizer, model), emas)


@pytest.mark.parametrize("world", [1, 4])
@pytest.mark.parametrize("written", ["plain", "swapped"])
def test_old_flattened_checkpoint_goes_on_with_the_default_planner(tmp_path, written, world):
    # The default planner raises for a key that the template has and the file lacks.
    with tarfile.open(ARCHIVE) as archive:
        archive.extractall(tmp_path, filter="data")
    run_on(world, goes_on, folder=tmp_path / written)
