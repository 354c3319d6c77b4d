"""The same windows from ema-pytorch's PostHocEMA: ``python tests/benchmarks/post_hoc.py``.

One run of the transformer of ``examples/choose_window.py``, all averages beside each other: two
tracks of PostHocEMA (widths .05 and .10) saved eight times, with its default ``update_every`` and
with 1; the same two tracks of ours, saved at the same steps in the same fp16; and one ordinary EMA
saved once per window. A figure is |synthesized - true EMA| / |training weights - true EMA|.
"""

import argparse
import sys
import tempfile
from pathlib import Path

import torch
from ema_pytorch import PostHocEMA

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
from choose_window import TRUE, digits, error, text, train

from ema_optim import EMAModel, EMASnapshots, power_decay
from ema_optim._arithmetic.synthesis import Average, Solver

KEPT, SAVES = (0.05, 0.10), 8


class Tracks:
    """Two averages of ours, saved as PostHocEMA saves its own."""

    def __init__(self, model, every):
        self.emas = [EMAModel(model, power_decay(width)) for width in KEPT]
        self.every, self.step, self.saved = every, 0, {}

    def update(self):
        self.step += 1
        for width, ema in zip(KEPT, self.emas, strict=True):
            ema.update()
            if self.step % self.every == 0:
                state = ema.get_ema_state()
                half = {name: value.half() for name, value in state.items()}
                self.saved[Average(power_decay(width), self.step)] = half

    def synthesize(self, width):
        found, told = Solver(list(self.saved)).solve(Average(power_decay(width), self.step))
        states = list(zip(found, self.saved.values(), strict=True))
        return {n: sum(x * state[n].float() for x, state in states) for n in states[0][1]}, told


def peer(model, folder, every, **options):
    options = {"checkpoint_every_num_steps": every, **options}
    return PostHocEMA(model, sigma_rels=KEPT, checkpoint_folder=folder, **options)


def made_by(made, width):
    synthesized = made.synthesize_ema_model(sigma_rel=width).ema_model
    return {name: param.detach() for name, param in synthesized.named_parameters()}


def table(build, steps, folder):
    task, every = build(0), steps // SAVES
    peers = [peer(task.model, folder / "a", every, update_every=1)]
    peers += [peer(task.model, folder / "b", every)]
    tracks = Tracks(task.model, every)
    _, true = train(task, steps, folder / build.__name__, (*peers, tracks))
    weights = {name: param.detach() for name, param in task.model.named_parameters()}
    print(f"\n{build.__name__}, {steps} steps, training weights {task.score(task.model):.4f}")
    print("sigma_rel   PostHocEMA   update_every=1   ours, same tracks (told)   one EMA (told)")
    snapshots = EMASnapshots(folder / build.__name__)
    for width in TRUE:
        ours, told = tracks.synthesize(width)
        one = snapshots.synthesize(power_decay(width), max_error=9)
        states = [made_by(peers[1], width), made_by(peers[0], width), ours, one]
        theirs, single, same, kept = (
            error(s, true[width].get_ema_state(), weights) for s in states
        )
        second = f"{same:.4f} ({told:.4f})"
        third = f"{kept:.4f} ({snapshots.error(power_decay(width)):.4f})"
        print(f"{width:<12}{theirs:<13.4f}{single:<17.4f}{second:<27}{third}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600)
    steps = parser.parse_args().steps
    torch.set_num_threads(1)
    print(f"torch {torch.__version__}; distance of the synthesized EMA from the true one")
    for build in (digits, text):
        with tempfile.TemporaryDirectory() as folder:
            table(build, steps, Path(folder))


if __name__ == "__main__":
    main()
