"""What all tables share: the options, groups of rows that fit in memory, one way to race them."""

import gc
import random
from contextlib import contextmanager
from dataclasses import dataclass, field

from averages import BASE, UPDATES, check_updates, scale_
from live_bytes import peak_bytes
from shapes import make_model, shapes_of
from timing import Row, race
from tqdm import tqdm

DECAY = 0.99  # far enough from 1 that one missing update shows in fp32
GIB = 2**30
ROUNDS = {"small": 40, "resnet50": 40, "gpt2": 9, "huge": 9}


@dataclass
class Bench:
    models: list
    rounds: int | None = None
    quick: bool = False
    device: str = "cpu"
    seed: int = 0
    memory: float = 8.0  # GiB for the weights and EMAs of one group of rows
    warmup: int = 3
    notes: dict = field(default_factory=dict)  # as an ordered set

    def __post_init__(self):
        self.random = random.Random(self.seed)
        self.progress = tqdm(bar_format="{desc} {n_fmt} runs, {elapsed}", mininterval=1.0)

    def note(self, text):
        self.notes[text] = None

    def tick(self):
        self.progress.update()

    def rounds_of(self, name):
        return self.rounds or (3 if self.quick else ROUNDS[name])

    def calls(self, name):
        """How often a row runs in a race: every warm-up round counts."""
        return self.warmup + self.rounds_of(name)

    def model(self, name, **options):
        return make_model(shapes_of(name, self.quick), self.device, self.seed, **options)

    def peak(self, run):
        return peak_bytes(run, self.device)

    def groups(self, factories, size, held=2):
        """Cut a dict of factories into groups that fit in memory, each with the base.

        An EMA takes ``size`` bytes; beside it there are ``held`` times that (weights, temporaries).
        """
        base = {name: factories[name] for name in factories if name == BASE}
        others = {name: factories[name] for name in factories if name != BASE}
        fit = max(1, int(self.memory * GIB / size) - len(base) - held)
        while others:
            group = {name: others.pop(name) for name in list(others)[:fit]}
            yield base | group

    def build(self, factories, *args):
        """Call the factories; a peer that is not installed is left out, with a note."""
        built = {}
        for name, factory in factories.items():
            try:
                built[name] = factory(*args)
            except ImportError as error:
                self.note(f"{name}: left out, {error}")
        return built


def fp32_bytes(model):
    return sum(4 * param.numel() for param in model)


@contextmanager
def primed(bench, factories, model, decay):
    """Averages that hold the weights, beside weights that are twice that; undone at the end."""
    averages = bench.build(factories, model, decay)
    for average in averages.values():
        average.update()  # the first call of some peers is a copy
    for params in (model, *(a.params for a in averages.values() if a.params is not None)):
        scale_(params, 2.0)
    try:
        yield averages
    finally:
        averages.clear()
        scale_(model, 0.5)
        gc.collect()


def update_row(name, average):
    return Row(name, average.update)


def race_updates(
    bench,
    name,
    model,
    factories=UPDATES,
    row=update_row,
    extra=(),
    decay=DECAY,
    calls=1,
    held=2,
):
    """Race averages on one model and check that every timed call has averaged.

    Args:
        bench: The options.
        name: The model's name.
        model: Its parameters.
        factories: Averages by name.
        row: Makes the row that is timed from a name and an average.
        extra: Rows without an average, in every group.
        decay: The decay.
        calls: Updates that one timed row stands for.
        held: Copies of the weights that are in memory beside the EMAs.

    Returns:
        The times of each group of rows.
    """
    results = []
    for group in bench.groups(factories, fp32_bytes(model), held):
        with primed(bench, group, model, decay) as averages:
            rows = [*extra, *(row(title, average) for title, average in averages.items())]
            results.append(race(bench, name, rows))
            for title, average in averages.items():
                check_updates(title, average, model, calls * bench.calls(name), decay)
            del rows, average
    return results


def update_memory(bench, model, factories):
    """Peak extra bytes of one update, by contender; one of them at a time."""
    peaks = {}
    for name, factory in factories.items():
        with primed(bench, {name: factory}, model, DECAY) as averages:
            for average in averages.values():
                peaks[name] = bench.peak(average.update)
                average = None
    return peaks
