"""BatchNorm and the EMA: whose running statistics go with the EMA weights?

    python batchnorm.py

An optimizer sees parameters, not buffers: inside a swap the running statistics are still those of
the training weights, and they do not fit. Two remedies: estimate them anew for the EMA weights
(torch's `update_bn`), or average them as well (`EMAModel(..., use_buffers=True)`).

The data: scikit-learn's digits under fresh input noise, 600 to train and 1197 to test by seed.
"""

import argparse
import math
from contextlib import contextmanager

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.optim.swa_utils import update_bn
from tqdm import tqdm

from ema_optim import EMAModel, EMAOptimizer, compute_optimal_decay


@contextmanager
def swap_with_own_statistics(model: nn.Module, optimizer: EMAOptimizer, batches: list[Tensor]):
    """The swap, with fresh running statistics inside and the old ones put back afterwards."""
    held = {name: buffer.clone() for name, buffer in model.named_buffers()}
    with optimizer.swap_ema_weights():
        try:
            update_bn(batches, model)
            yield
        finally:
            model.load_state_dict(held, strict=False)


def train(images: Tensor, labels: Tensor, seed: int, steps: int) -> dict[str, float]:
    torch.manual_seed(seed)
    training, test = torch.randperm(len(images)).split([600, 1197])
    layers: list[nn.Module] = []
    for inputs in (64, 128, 128):
        layers += [nn.Linear(inputs, 128), nn.BatchNorm1d(128), nn.ReLU()]
    model = nn.Sequential(*layers, nn.Linear(128, 10))
    decay = compute_optimal_decay(steps)
    optimizer = EMAOptimizer(torch.optim.SGD(model.parameters(), lr=0.01, momentum=0.9), decay)
    ema = EMAModel(model, decay, use_buffers=True)  # beside the optimizer's, only to compare them
    for _ in range(steps):
        batch = training[torch.randint(len(training), (16,))]
        loss = cross_entropy(model(noisy(images[batch])), labels[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        ema.update()

    test_set = images[test], labels[test]
    accuracies = {"training weights": accuracy(model, *test_set)}
    with optimizer.swap_ema_weights():
        accuracies["EMA weights, statistics of the training weights"] = accuracy(model, *test_set)
    batches = [noisy(images[part]) for part in training.split(100)]  # what the model trains on
    with swap_with_own_statistics(model, optimizer, batches):
        accuracies["EMA weights, statistics from update_bn"] = accuracy(model, *test_set)
    with ema.use_ema():
        accuracies["EMA weights, averaged statistics (use_buffers)"] = accuracy(model, *test_set)
    return accuracies


def noisy(images: Tensor) -> Tensor:
    return images + 0.6 * torch.randn_like(images)


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    model.eval()
    predictions = model(images).argmax(dim=1)
    model.train()
    return 100 * (predictions == labels).double().mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=20, help="at least 2")
    parser.add_argument("--steps", type=int, default=1000)
    args = parser.parse_args()
    torch.set_num_threads(1)  # the network is too small to share
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    seeds = tqdm(range(args.seeds), unit="run")
    runs = [train(images, labels, seed, args.steps) for seed in seeds]
    title = f"{args.steps} steps, {args.seeds} seeds"
    print(f"{title:<50}test accuracy   paired gain, ± standard error")
    for row in runs[0]:
        mean = sum(run[row] for run in runs) / len(runs)
        gain = torch.tensor([run[row] - run["training weights"] for run in runs])
        error = gain.std() / math.sqrt(len(runs))
        print(f"{row:<50}{mean:5.2f} %         {gain.mean():+.2f} ± {error:.2f} points")


if __name__ == "__main__":
    main()
