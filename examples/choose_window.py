"""Train once, choose the window afterwards: one ordinary EMA, and a snapshot of it per window.

    python choose_window.py             # trains the models of quickstart.py and fsdp2.py, draws

A run keeps an EMA over a twentieth of its steps and writes it to a folder twenty times. From these
files comes the average over any longer window, with its error told before a tensor is read. Here
the true averages were kept as well, to compare: the points. They cost ten EMAs; the line did not.

The digits are learned at a good constant learning rate, where every window is as good: choosing
gains nothing. The transformer has only begun to learn: there the window matters. The held-out data
that is drawn is not that of any choice: nothing is chosen here.
"""

import argparse
import copy
import math
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from fsdp2 import BATCH, CONTEXT, Transformer, loss_of, mean_loss, read_text
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from quickstart import BATCH_SIZE, INPUT_NOISE, build_model
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ema_optim import EMAModel, EMAOptimizer, EMASnapshots, power_decay

SNAPSHOTS = 20  # in the whole run, one per window of the kept EMA
TRUE = (0.02, 0.03, 0.04, 0.05, 0.06, 0.08, 0.11, 0.15, 0.2, 0.25)  # kept to compare
LIMIT = 0.05  # what synthesize() accepts by default

Weights = dict[str, Tensor]


class Task(NamedTuple):
    """What is trained."""

    model: nn.Module
    inner: torch.optim.Optimizer
    loss: Callable[[int], Tensor]  # of the batch of a step
    score: Callable[[nn.Module], float]  # on held-out data


class Run(NamedTuple):
    training: float  # score of the training weights
    kept: float  # of the kept EMA
    true: list[float]  # of the true averages
    made: list[float]  # of the synthesized ones
    measured: list[float]  # |synthesized - true| / |training weights - true|
    line: dict[float, float]  # scores of more synthesized averages, by width
    told: dict[float, float]  # errors by width, told in advance: the same for every seed


def digits(seed: int) -> Task:
    pixels, targets = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(targets)
    generator = torch.Generator().manual_seed(seed)
    training, held_out = torch.randperm(len(images), generator=generator).split([900, 897])
    model = build_model(generator)

    def loss(step: int) -> Tensor:
        batch = training[torch.randint(len(training), (BATCH_SIZE,), generator=generator)]
        noise = INPUT_NOISE * torch.randn(BATCH_SIZE, 64, generator=generator)
        return cross_entropy(model(images[batch] + noise), labels[batch])

    def score(model: nn.Module) -> float:
        with torch.no_grad():
            right = model(images[held_out]).argmax(1) == labels[held_out]
        return 100 * right.double().mean().item()

    return Task(model, torch.optim.SGD(model.parameters(), lr=0.03, momentum=0.9), loss, score)


def text(seed: int) -> Task:
    torch.manual_seed(seed)
    characters, windows = read_text(torch.device("cpu"))
    model = Transformer()

    def loss(step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1000 * seed + step)
        starts = torch.randint(len(characters) - CONTEXT, (BATCH, 1), generator=generator)
        return loss_of(model, characters[starts + torch.arange(CONTEXT + 1)])

    def score(model: nn.Module) -> float:
        return mean_loss(model, windows).item()

    return Task(model, torch.optim.AdamW(model.parameters(), lr=3e-3), loss, score)


def train(
    task: Task, steps: int, folder: Path, others: tuple[Any, ...] = ()
) -> tuple[EMAOptimizer, dict[float, EMAModel]]:
    every = steps // SNAPSHOTS
    optimizer = EMAOptimizer(task.inner, decay=1 - 1 / every)  # all else is ordinary training
    true = {width: EMAModel(task.model, power_decay(width)) for width in TRUE}
    snapshots = EMASnapshots(folder)
    for step in tqdm(range(1, steps + 1), desc=folder.name, unit="step", leave=False):
        loss = task.loss(step)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        for other in (*true.values(), *others):
            other.update()
        if step % every == 0:
            snapshots.save(optimizer, task.model)
    return optimizer, true


def measure(
    task: Task, optimizer: EMAOptimizer, true: dict[float, EMAModel], folder: Path, points: int
) -> Run:
    snapshots, model = EMASnapshots(folder), copy.deepcopy(task.model)
    line = [float(width) for width in np.geomspace(TRUE[0], TRUE[-1], points)]
    weights = {name: param.detach() for name, param in task.model.named_parameters()}

    def score(state: Weights) -> float:
        model.load_state_dict(state)
        return task.score(model)

    def synthesize(width: float) -> Weights:
        return snapshots.synthesize(power_decay(width), max_error=math.inf)

    truth = [true[width].get_ema_state() for width in TRUE]
    made = [synthesize(width) for width in TRUE]
    return Run(
        task.score(task.model),
        score(optimizer.get_ema_state(task.model)),
        [score(state) for state in truth],
        [score(state) for state in made],
        [error(*states, weights) for states in zip(made, truth, strict=True)],
        {width: score(synthesize(width)) for width in tqdm(line, unit="window", leave=False)},
        {width: snapshots.error(power_decay(width)) for width in (*TRUE, *line)},
    )


def error(made: Weights, true: Weights, weights: Weights) -> float:
    return distance(made, true) / distance(weights, true)


def distance(left: Weights, right: Weights) -> float:
    return math.sqrt(sum((left[name] - right[name]).square().sum().item() for name in right))


def mean(runs: list[Run], name: str) -> Any:
    return np.mean([getattr(run, name) for run in runs], axis=0)


def print_table(title: str, runs: list[Run], form: str) -> None:
    print(f"\n{title}: mean of {len(runs)} seeds")
    print("sigma_rel   true EMA   synthesized   measured error   told error")
    columns = (mean(runs, name) for name in ("true", "made", "measured"))
    for width, true, made, measured in zip(TRUE, *columns, strict=True):
        values = f"{true:<11{form}}{made:<14{form}}{measured:<17.3f}"
        print(f"{width:<12}{values}{runs[0].told[width]:.3f}")
    print(f"training weights {mean(runs, 'training'):{form}}, kept EMA {mean(runs, 'kept'):{form}}")


def draw_score(axes: Axes, runs: list[Run], label: str) -> None:
    line = np.mean([list(run.line.values()) for run in runs], axis=0)
    axes.plot(list(runs[0].line), line, color="#1d4ed8", linewidth=2, label="synthesized")
    axes.plot(TRUE, mean(runs, "true"), "o", color="#c2410c", markersize=5, label="true EMA")
    training = mean(runs, "training")
    axes.axhline(training, color="#6b7280", linewidth=1, linestyle="--", label="training weights")
    axes.set(ylabel=label)


def draw_error(axes: Axes, told: np.ndarray, runs: list[Run]) -> None:
    line = list(runs[0].line)
    axes.fill_between(line, told / 2, told * 2, color="#1d4ed8", alpha=0.15, linewidth=0)
    axes.plot(line, told, color="#1d4ed8", linewidth=2, label="told (band: a factor of two)")
    axes.plot(TRUE, mean(runs, "measured"), "o", color="#c2410c", markersize=5, label="measured")
    axes.axhline(
        LIMIT, color="#6b7280", linewidth=1, linestyle=":", label="max_error=0.05, refused above"
    )
    axes.set(ylabel="error / |weights - EMA|", xlabel="window: sigma_rel", yscale="log")


def refused(run: Run) -> tuple[float, float]:
    """The short windows that synthesize() refuses by default."""
    return TRUE[0], min(width for width in run.line if run.told[width] <= LIMIT)


def draw(results: dict[str, tuple[list[Run], str]], output: str) -> None:
    figure = Figure(figsize=(9, 6), dpi=150, layout="constrained")
    grid = figure.subplots(2, len(results), sharex=True, squeeze=False, height_ratios=(3, 2))
    for (title, (runs, label)), (top, bottom) in zip(results.items(), grid.T, strict=True):
        told = np.array([runs[0].told[width] for width in runs[0].line])
        draw_score(top, runs, label)
        draw_error(bottom, told, runs)
        for axes in (top, bottom):
            axes.axvspan(*refused(runs[0]), color="#6b7280", alpha=0.15)
            axes.grid(alpha=0.3)
        top.set_title(title, fontsize=11)
    for axes in (grid[0, -1], grid[1, 0]):
        axes.legend(labelcolor="linecolor", fontsize=8)
    figure.savefig(output, pil_kwargs={"optimize": True})


def runs_of(build: Callable[[int], Task], args: argparse.Namespace, folder: Path) -> Iterator[Run]:
    for seed in range(args.seeds):
        task, own = build(seed), folder / f"{build.__name__}-{seed}"
        yield measure(task, *train(task, args.steps, own), own, args.points)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=600, help=f"a multiple of {SNAPSHOTS}")
    parser.add_argument("--points", type=int, default=30, help="windows on the line")
    parser.add_argument("--output", default="choose_window.png", help="path of the figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    every = args.steps // SNAPSHOTS
    print(f"{args.steps} steps, decay {1 - 1 / every:.4f}, a snapshot every {every} steps")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for title, build, label, form in (
            ("Digits, a good constant rate", digits, "held-out accuracy (%)", ".2f"),
            ("Transformer, an unfinished run", text, "held-out loss (nats)", ".4f"),
        ):
            results[title] = list(runs_of(build, args, Path(folder))), label
            print_table(title, results[title][0], form)
    draw(results, args.output)
    print(f"\ncurves: {args.output}")


if __name__ == "__main__":
    main()
