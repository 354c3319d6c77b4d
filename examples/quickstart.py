"""EMA weights against training weights on real images: less than a minute on a CPU, no download.

A small network learns scikit-learn's digits from 600 images under fresh input noise. At a constant
learning rate the training weights keep jumping around a good solution; their average does not.
The EMA is taken twice, with and without a warm-up of its decay, which costs nothing at the end and
makes it useful from the first steps on.

    python quickstart.py                      # prints a table, draws quickstart.png
    python quickstart.py --schedule cosine    # learning rate decayed to zero: nothing to gain

Each seed draws its own 600 training, 300 validation and 897 test images. The learning rate is the
one with which the *training weights* validate best; the test images choose nothing.
"""

import argparse
import math
import warnings
from typing import NamedTuple

import numpy as np
import torch
from matplotlib.figure import Figure
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ema_optim import EMAModel, EMAOptimizer, compute_optimal_decay, warmup_decay

LEARNING_RATES = (0.003, 0.01, 0.03, 0.1)
BATCH_SIZE = 16
INPUT_NOISE = 0.6  # standard deviation; pixels lie in [0, 1]

# What is evaluated, and its colour in the figure.
WEIGHTS = {
    "EMA weights, decay with warm-up": "#047857",
    "EMA weights": "#1d4ed8",
    "training weights": "#c2410c",
}
Accuracies = dict[str, float]  # in percent, by what is evaluated


class Run(NamedTuple):
    validation: dict[int, Accuracies]  # by step
    test: Accuracies


def train(images: Tensor, labels: Tensor, lr: float, seed: int, args: argparse.Namespace) -> Run:
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(images), generator=generator)
    training, validation, test = order.split([600, 300, 897])
    model = build_model(generator)
    sgd = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    optimizer = EMAOptimizer(sgd, decay=args.decay)  # all else is ordinary training
    warm = EMAModel(model, warmup_decay(args.decay))  # beside the optimizer's, only to compare them
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: lr_factor(step, args))
    curve = {}
    for step in range(1, args.steps + 1):
        batch = training[torch.randint(len(training), (BATCH_SIZE,), generator=generator)]
        noise = INPUT_NOISE * torch.randn(BATCH_SIZE, 64, generator=generator)
        loss = cross_entropy(model(images[batch] + noise), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        scheduler.step()
        warm.update()
        if step % math.ceil(args.steps / 50) == 0 or step == args.steps:
            curve[step] = evaluate(model, optimizer, warm, images[validation], labels[validation])
    return Run(curve, evaluate(model, optimizer, warm, images[test], labels[test]))


def build_model(generator: torch.Generator) -> nn.Module:
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def lr_factor(step: int, args: argparse.Namespace) -> float:
    warm_up = min(1.0, (step + 1) / (0.05 * args.steps))
    cosine = 0.5 * (1 + math.cos(math.pi * step / args.steps))
    return warm_up * (cosine if args.schedule == "cosine" else 1.0)


def evaluate(
    model: nn.Module, optimizer: EMAOptimizer, warm: EMAModel, images: Tensor, labels: Tensor
) -> Accuracies:
    accuracies = {"training weights": accuracy(model, images, labels)}
    with optimizer.swap_ema_weights():
        accuracies["EMA weights"] = accuracy(model, images, labels)
    with warm.use_ema():
        accuracies["EMA weights, decay with warm-up"] = accuracy(model, images, labels)
    return accuracies


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return 100 * (model(images).argmax(dim=1) == labels).double().mean().item()


def pick_learning_rate(runs: dict[float, list[Run]], steps: int) -> float:
    means = {
        lr: np.mean([run.validation[steps]["training weights"] for run in runs[lr]]) for lr in runs
    }
    best = max(means, key=means.__getitem__)
    print("learning rate   validation accuracy of the training weights, mean over the seeds")
    for lr, mean in means.items():
        print(f"{lr:<16g}{mean:.2f} %{'  <- picked' if lr == best else ''}")
    return best


def print_table(runs: list[Run], lr: float, args: argparse.Namespace) -> None:
    print(f"\n{args.schedule} learning rate {lr:g}, {args.steps} steps, {len(runs)} seeds")
    left = f"{100 * args.decay**args.steps:.1f} % initial weights left in the EMA"
    print(f"decay {args.decay:.6g}, {left}\n")
    print("test accuracy                               paired gain, ± standard error   better on")
    training = np.array([run.test["training weights"] for run in runs])
    for name in reversed(WEIGHTS):
        tested = np.array([run.test[name] for run in runs])
        print(f"{name:<33}{tested.mean():.2f} %", end="")
        if name == "training weights":
            print()
            continue
        gain = tested - training
        error = gain.std(ddof=1) / math.sqrt(len(gain))
        print(f"    {gain.mean():+.2f} ± {error:.2f} points", end="")
        print(f"            {(gain > 0).sum()} of {len(gain)} seeds")


def draw(runs: list[Run], args: argparse.Namespace) -> Figure:
    figure = Figure(figsize=(6, 3.8), dpi=150, layout="constrained")
    axes, steps = figure.subplots(), list(runs[0].validation)
    for name, colour in WEIGHTS.items():
        curves = np.array([[point[name] for point in run.validation.values()] for run in runs])
        mean = curves.mean(axis=0)
        low, high = np.quantile(curves, [0.1, 0.9], axis=0)
        axes.fill_between(steps, low, high, color=colour, alpha=0.13, linewidth=0)
        axes.plot(steps, mean, color=colour, linewidth=2, label=f"{name}: {mean[-1]:.1f} %")
    title = (
        f"The same {len(runs)} runs evaluated three times: digits, {args.schedule} learning rate"
    )
    axes.set_title(title, fontsize=10.5)
    axes.legend(title="line: mean, band: middle 80 %", labelcolor="linecolor", loc="best")
    axes.set(xlabel="optimizer step", ylabel="validation accuracy (%)")
    axes.set(xlim=(0, args.steps), ylim=(60 if curves[:, -1].min() > 70 else 0, 100))
    axes.grid(alpha=0.3)
    return figure


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="at least 2")
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--decay", type=float, help="default: compute_optimal_decay(steps)")
    parser.add_argument("--schedule", choices=["constant", "cosine"], default="constant")
    parser.add_argument("--output", default="quickstart.png", help="path of the figure")
    args = parser.parse_args(arguments)
    if args.seeds < 2:
        parser.error("--seeds must be at least 2: one seed has no standard error")
    args.decay = compute_optimal_decay(args.steps) if args.decay is None else args.decay
    return args


def compare(args: argparse.Namespace) -> tuple[float, list[Run]]:
    """Train with every learning rate and seed; the picked learning rate and its runs."""
    torch.set_num_threads(1)  # the network is too small to share
    # Early in the curve the EMA is mostly initial weights; the table says what is left at the end.
    warnings.filterwarnings("ignore", message="the EMA still holds")
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    runs: dict[float, list[Run]] = {lr: [] for lr in LEARNING_RATES}
    for lr, seed in tqdm([(lr, seed) for lr in runs for seed in range(args.seeds)], unit="run"):
        runs[lr].append(train(images, labels, lr, seed, args))
    lr = pick_learning_rate(runs, args.steps)
    return lr, runs[lr]


def main() -> None:
    args = parse_arguments()
    lr, runs = compare(args)
    print_table(runs, lr, args)
    draw(runs, args).savefig(args.output, pil_kwargs={"optimize": True})
    print(f"\nvalidation curves: {args.output}")
    if args.schedule == "constant":
        print("With a learning rate decayed to zero the gain is nil: try --schedule cosine.")


if __name__ == "__main__":
    main()
