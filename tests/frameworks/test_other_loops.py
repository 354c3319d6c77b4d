"""ignite, fastai, skorch and mmengine, each with its own loop, evaluation and checkpoints."""

import pytest
from other_loops import LOOPS, EMAAdamW, needs, quiet
from reference import same
from torch.optim import AdamW
from trainers import close, weights

loops = pytest.mark.parametrize("name", LOOPS)


@pytest.fixture(autouse=True)
def _their_own_warnings():
    with quiet():
        yield


def loop(name, *args, **kwargs):
    needs(LOOPS[name].name)
    return LOOPS[name](*args, **kwargs)


@loops
def test_training_is_bit_equal_to_the_bare_optimizer(name, tmp_path):
    runs = [loop(name, tmp_path, kind) for kind in (AdamW, EMAAdamW)]
    [run.train(2) for run in runs]
    assert same(*[weights(run.model) for run in runs])
    assert not same(weights(runs[0].model), weights(loop(name, tmp_path).model))


@loops
def test_ema_is_the_average_and_every_evaluation_sees_it(name, tmp_path):
    run = loop(name, tmp_path)
    reference, seen = run.watch(), run.seen
    run.train(1)
    assert reference.step == run.optimizer.ema_metrics()["ema_updates"] == 6
    assert close(run.optimizer.get_ema_state(run.model).values(), reference.emas)
    assert len(seen) == 6
    assert all(close(one, reference.emas) for one in seen)


@loops
def test_resume_from_its_own_checkpoint_equals_uninterrupted(name, tmp_path):
    whole, first, again = (loop(name, tmp_path / str(n), seed=n) for n in (0, 0, 9))
    whole.train(2)
    first.train(1)
    again.load(first)
    again.train(2)
    for read in (lambda run: weights(run.model), lambda run: run.optimizer.state_dict()):
        assert same(read(whole), read(again))
