"""A live teacher: representations learned without labels from the model's own EMA (BYOL).

    python teacher.py                # trains one network, prints a table, draws teacher.png

A student sees one noisy, shifted view of a digit and predicts what its teacher makes of another.
The teacher is the student's own EMA: `ema(view)`, a forward with the EMA weights and without a
copy. Its output is a target, not a path for gradients, so it is called under `no_grad`. Afterwards
a nearest-neighbour vote and a linear probe ask how much the representations know of the labels,
which the training has never seen; a network that was not trained is asked the same.

`target_network` is the same idea in reinforcement learning: a target that follows its network
softly (`decay = 1 - tau`), or a hard copy every N steps (`decay=0, update_every=N`).

Source: Grill et al., "Bootstrap your own latent", 2020. The data: scikit-learn's digits, 1000 to
train, 797 to test by seed.
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
from torch.nn.functional import cosine_similarity, normalize, pad
from tqdm import tqdm

from ema_optim import EMAModel

BATCH_SIZE = 128
TAU = 0.02  # the share of the student that goes into the teacher at every step


Scores = tuple[float, float]  # percent right: five nearest neighbours, a linear probe


class Digits(NamedTuple):
    """Without the labels of the training images nothing could be scored; the training has none."""

    training: Tensor
    training_labels: Tensor
    test: Tensor
    test_labels: Tensor


class Run(NamedTuple):
    curve: dict[int, tuple[float, float]]  # by step, neighbours: of the student, of the teacher
    untrained: Scores
    student: Scores
    teacher: Scores


class Network(nn.Module):
    """An encoder, whose output is the representation, and a projection that is compared."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(
            *(nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU()),
            *(nn.Conv2d(16, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
            *(nn.Conv2d(32, 32, 3, padding=1, stride=2), nn.BatchNorm2d(32), nn.ReLU()),
            nn.Flatten(),
        )
        self.projection = head(128, 64)

    def forward(self, images: Tensor) -> Tensor:
        return self.projection(self.encoder(images))


def head(inputs: int, outputs: int) -> nn.Module:
    return nn.Sequential(
        nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU(), nn.Linear(128, outputs)
    )


def view(images: Tensor) -> Tensor:
    """Shift each image by up to one pixel, scale its brightness and add noise."""
    count = len(images)
    padded = pad(images, (1, 1, 1, 1))
    row, column = torch.randint(0, 3, (2, count, 1, 1))
    rows, columns = row + torch.arange(8)[:, None], column + torch.arange(8)
    shifted = padded[torch.arange(count)[:, None, None], 0, rows, columns][:, None]
    return shifted * (0.7 + 0.6 * torch.rand(count, 1, 1, 1)) + 0.2 * torch.randn(images.shape)


def train(digits: Digits, seed: int, steps: int) -> Run:
    """The teacher is the EMA of encoder and projection; the predictor is the student's alone."""
    torch.manual_seed(seed)
    student, predictor = Network(), head(64, 64)
    teacher = EMAModel(student, decay=1 - TAU, use_buffers=True)
    params = [*student.parameters(), *predictor.parameters()]
    optimizer = torch.optim.AdamW(params, lr=2e-3, weight_decay=1e-3)
    untrained = scores(student, digits)
    curve = {0: (untrained[0], untrained[0])}
    for step in tqdm(range(1, steps + 1), desc=f"seed {seed}", unit="step"):
        batch = digits.training[torch.randint(len(digits.training), (BATCH_SIZE,))]
        one, other = view(batch), view(batch)
        loss = agreement(student, teacher, predictor, one, other)
        loss = loss + agreement(student, teacher, predictor, other, one)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        teacher.update()
        if step % math.ceil(steps / 20) == 0 or step == steps:
            curve[step] = scores(student, digits)[0], scores_of(teacher, student, digits)[0]
    return Run(curve, untrained, scores(student, digits), scores_of(teacher, student, digits))


def agreement(
    student: Network, teacher: EMAModel, predictor: nn.Module, one: Tensor, other: Tensor
) -> Tensor:
    with torch.no_grad():
        target = teacher(other)
    return -cosine_similarity(predictor(student(one)), target).mean()


def target_network(network: nn.Module, tau: float = 0.005, every: int | None = None) -> EMAModel:
    """The target of a value network, as in DQN or SAC: call it, `target(states)`.

    Args:
        network: The network in training; after each of its steps comes `target.update()`.
        tau: A soft target, `target <- (1 - tau) * target + tau * network` at every step.
        every: A hard target instead: a copy of the network, taken at every so many steps.
    """
    if every is not None:
        return EMAModel(network, decay=0, update_every=every)
    return EMAModel(network, decay=1 - tau)


def scores_of(teacher: EMAModel, student: Network, digits: Digits) -> Scores:
    with teacher.use_ema():
        return scores(student, digits)


@torch.no_grad()
def scores(network: Network, digits: Digits) -> Scores:
    network.eval()
    training, test = network.encoder(digits.training), network.encoder(digits.test)
    network.train()
    deviation, mean = torch.std_mean(training, dim=0)
    training, test = ((x - mean) / (deviation + 1e-6) for x in (training, test))
    classes = nn.functional.one_hot(digits.training_labels).float()
    near = normalize(test) @ normalize(training).T
    votes = classes[near.topk(5).indices].sum(dim=1)
    ridge = training.T @ training + 10 * torch.eye(training.shape[1])
    linear = test @ torch.linalg.solve(ridge, training.T @ (classes - 0.1))
    return right(votes, digits.test_labels), right(linear, digits.test_labels)


def right(outputs: Tensor, labels: Tensor) -> float:
    return 100 * (outputs.argmax(dim=1) == labels).double().mean().item()


def load(seed: int) -> Digits:
    pixels, digits = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 16
    labels = torch.tensor(digits)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(seed))
    training, test = order.split([1000, 797])
    return Digits(images[training], labels[training], images[test], labels[test])


def print_table(runs: list[Run], steps: int) -> None:
    print(f"BYOL on digits, {steps} steps, tau {TAU}, {len(runs)} seeds; percent right, mean")
    print(f"{'':<28}5 neighbours   linear probe")
    for name in ("untrained", "student", "teacher"):
        mean = np.mean([getattr(run, name) for run in runs], axis=0)
        label = {"untrained": "untrained network"}.get(name, f"{name} (no labels seen)")
        print(f"{label:<28}{mean[0]:>12.1f}   {mean[1]:>12.1f}")
    gain = np.array([run.teacher for run in runs]) - np.array([run.student for run in runs])
    error = gain.std(axis=0, ddof=1) / math.sqrt(len(runs))
    pairs = (f"{g:+.1f} ± {e:.1f}" for g, e in zip(gain.mean(axis=0), error, strict=True))
    print(f"{'teacher - student':<28}{next(pairs):>12}   {next(pairs):>12}")


def draw(runs: list[Run], output: str) -> None:
    steps = list(runs[0].curve)
    curves = np.array([list(run.curve.values()) for run in runs])  # [seed, step, network]
    axes = Figure(figsize=(6, 3.8), dpi=150, layout="constrained").subplots()
    names = (1, "teacher: the EMA weights", "#1d4ed8"), (0, "student", "#c2410c")
    for index, name, colour in names:
        mean = curves[:, :, index].mean(axis=0)
        low, high = curves[:, :, index].min(axis=0), curves[:, :, index].max(axis=0)
        axes.fill_between(steps, low, high, color=colour, alpha=0.15, linewidth=0)
        axes.plot(steps, mean, color=colour, linewidth=2, label=f"{name}, {mean[-1]:.1f} %")
    start = curves[:, 0, 0].mean()
    axes.axhline(start, color="#6b7280", linewidth=1, linestyle="--")
    axes.annotate(
        f"untrained network, {start:.1f} %",
        (steps[-1] / 2, start),
        (0, -12),
        textcoords="offset points",
        ha="left",
        color="#6b7280",
    )
    axes.set_title(
        f"Representations learned without labels: digits, {len(runs)} seeds", fontsize=11
    )
    axes.legend(title="line: mean, band: all seeds", labelcolor="linecolor", loc="lower right")
    axes.set(xlabel="optimizer step", ylabel="5 nearest neighbours right (%)", xlim=(0, steps[-1]))
    axes.grid(alpha=0.3)
    axes.figure.savefig(output, pil_kwargs={"optimize": True})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3, help="at least 2")
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--output", default="teacher.png", help="path of the figure")
    args = parser.parse_args()
    torch.set_num_threads(1)
    # The curve reads the teacher from its first steps on, when it is still the initial network.
    warnings.filterwarnings("ignore", message="the EMA still holds")
    runs = [train(load(seed), seed, args.steps) for seed in range(args.seeds)]
    print_table(runs, args.steps)
    draw(runs, args.output)
    print(f"curves: {args.output}")


if __name__ == "__main__":
    main()
