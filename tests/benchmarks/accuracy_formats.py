"""What a storage format of the EMA costs: accuracy against float64, bytes and time.

    python tests/benchmarks/accuracy_formats.py            # all tables: some minutes on one core
    python tests/benchmarks/accuracy_formats.py --tables gaps cost

gaps:    16 layers of 1024 weights on known paths; the error of the EMA over its distance from the
         weights. At 1 the EMA is of no use; below 0.1 its noise is lost in that of the weights.
travel:  weights that moved once and then stay: how far from the way travelled an EMA ends.
digits:  a network trained on scikit-learn's digits, a fifth of their labels drawn anew, its EMA
         kept in every format at once; paired difference in test accuracy to the float64 EMA.
cost:    bytes of a weight, and the time of an update relative to an fp32 ``_foreach_lerp_``, for
         the shapes of a ResNet-50; CPU time of one thread, interleaved rounds, median.
"""

import argparse
import math
import platform
import statistics
import time
from collections.abc import Iterator

import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ema_optim import __version__, compute_optimal_decay
from ema_optim._arithmetic.formats import FORMATS, Format, Update

PLAIN = {"float32": Format(torch.float32)}
ALL = {**PLAIN, **{str(name).removeprefix("torch."): form for name, form in FORMATS.items()}}
NEAREST = "bfloat16, to nearest"  # what is not offered, for comparison


class Average:
    """The EMA of a list of tensors in one format."""

    def __init__(self, name: str, params: list[Tensor], decay: float) -> None:
        form = self.form = ALL.get(name, Format(torch.bfloat16))
        self.nearest, self.decay, self.updates = name == NEAREST, decay, 0
        self.mains = [torch.empty_like(p, dtype=form.main) for p in params]
        self.lows = [torch.empty_like(p, dtype=form.low) for p in params] if form.low else []
        sizes = torch.tensor([0, *(p.numel() for p in params)])
        self.starts = sizes.cumsum(0).tolist()[:-1]
        form.encode_(self.mains, self.lows, params)

    def update(self, params: list[Tensor]) -> None:
        self.updates += 1
        if self.nearest:
            new = torch._foreach_lerp([m.float() for m in self.mains], params, 1 - self.decay)
            torch._foreach_copy_(self.mains, new)
        else:
            update = Update(self.decay, self.updates, self.starts)
            self.form.update_(self.mains, self.lows, params, update)

    def read(self) -> list[Tensor]:
        targets = [torch.empty_like(main, dtype=torch.float64) for main in self.mains]
        self.form.decode_(targets, self.mains, self.lows)
        return targets


class Exact:
    """The EMA in float64."""

    def __init__(self, params: list[Tensor], decay: float) -> None:
        self.emas, self.decay = [p.double() for p in params], decay

    def update(self, params: list[Tensor]) -> None:
        torch._foreach_lerp_(self.emas, [p.double() for p in params], 1 - self.decay)


def averages(params: list[Tensor], decay: float) -> dict[str, Average]:
    return {name: Average(name, params, decay) for name in [*ALL, NEAREST]}


def print_table(title: str, head: list[str], rows: list[list[str]]) -> None:
    print(f"\n{title}\n")
    for row in [head, ["---"] * len(head), *rows]:
        print("| " + " | ".join(row) + " |")


def norm(tensors: list[Tensor]) -> float:
    return float(torch.linalg.vector_norm(torch.cat([t.flatten() for t in tensors])))


def walk(steps: int, rate: float, cosine: bool, seed: int) -> Iterator[list[Tensor]]:
    """Weights of 16 layers that walk at random and drift; their scales are 0.01 to 1."""
    generator = torch.Generator().manual_seed(seed)
    scale = torch.logspace(-2, 0, 16, dtype=torch.float64)[:, None]
    weights, drift = (
        scale * torch.randn(16, 1024, dtype=torch.float64, generator=generator) for _ in range(2)
    )
    for step in range(steps + 1):
        yield list(weights.float())
        pace = rate * (0.5 + 0.5 * math.cos(math.pi * step / steps) if cosine else 1.0)
        noise = scale * torch.randn(16, 1024, generator=generator, dtype=torch.float64)
        weights = weights + pace * (noise + 0.05 * drift)


def follow(path: Iterator[list[Tensor]], decay: float) -> tuple[float, dict[str, float]]:
    """The distance of the exact EMA from its last weights, and the error of every format."""
    params = next(path)
    exact, kept = Exact(params, decay), averages(params, decay)
    for params in path:
        for average in [exact, *kept.values()]:
            average.update(params)
    gap = norm(torch._foreach_sub([p.double() for p in params], exact.emas))
    errors = {n: norm(torch._foreach_sub(k.read(), exact.emas)) for n, k in kept.items()}
    return gap / norm(exact.emas), {
        name: error / norm(exact.emas) for name, error in errors.items()
    }


PROCESSES = {  # rate, whether it falls to zero by a cosine, decay
    "walk, 0.999": (1e-3, False, 0.999),
    "slow walk, 0.999": (1e-4, False, 0.999),
    "cosine, 0.999": (1e-3, True, 0.999),
    "walk, 0.9999": (1e-3, False, 0.9999),
    "cosine, 0.9999": (1e-3, True, 0.9999),
}


def gaps(args: argparse.Namespace) -> None:
    columns = []
    for rate, cosine, decay in tqdm(PROCESSES.values(), unit="process"):
        columns.append(follow(walk(args.steps, rate, cosine, args.seed), decay))
    rows = [["*distance*", *(f"*{gap:.2g}*" for gap, _ in columns)]]
    for name in columns[0][1]:
        rows.append([name, *(f"{errors[name] / gap:.2g}" for gap, errors in columns)])
    print_table(
        f"error / distance to the weights, {args.steps} steps", ["format", *PROCESSES], rows
    )


def still(steps: int, noise: float, seed: int) -> Iterator[list[Tensor]]:
    """Weights that move by 5e-4 after the first step, and then only jitter."""
    generator = torch.Generator().manual_seed(seed)
    base = torch.rand(1024, dtype=torch.float64, generator=generator) + 0.5
    yield [base.float()]
    for _ in range(steps):
        jitter = noise * torch.randn(1024, dtype=torch.float64, generator=generator)
        yield [(base * (1 + 5e-4 + jitter)).float()]


def travel(args: argparse.Namespace) -> None:
    steps, columns = 4 * args.steps, []
    noises = [0.0, 1e-5, 1e-4]
    for noise in tqdm(noises, unit="process"):
        _, errors = follow(still(steps, noise, args.seed), 0.9999)
        way = 5e-4 * (1 - 0.9999**steps)
        columns.append({name: error / way for name, error in errors.items()})
    rows = [[name, *(f"{column[name]:.1e}" for column in columns)] for name in columns[0]]
    head = ["format", *(f"noise {noise:g}" for noise in noises)]
    print_table(f"error / way travelled, decay 0.9999, {steps} steps", head, rows)


def build_model(generator: torch.Generator) -> nn.Module:
    layers = [nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 10)]
    for layer in layers[::2]:
        nn.init.kaiming_normal_(layer.weight, nonlinearity="relu", generator=generator)
        nn.init.zeros_(layer.bias)
    return nn.Sequential(*layers)


def accuracy(model: nn.Module, values: list[Tensor], images: Tensor, labels: Tensor) -> float:
    names = [name for name, _ in model.named_parameters()]
    state = dict(zip(names, values, strict=True))
    logits = torch.func.functional_call(model.double(), state, images.double())
    return 100 * (logits.argmax(dim=1) == labels).double().mean().item()


def train(steps: int, lr: float, decay: float, seed: int) -> tuple[float, float, dict[str, float]]:
    """Test accuracy of the training weights, of the float64 EMA and of every format."""
    pixels, digits = load_digits(return_X_y=True)
    images, labels = torch.tensor(pixels, dtype=torch.float32) / 16, torch.tensor(digits)
    generator = torch.Generator().manual_seed(seed)
    training, test = torch.randperm(len(images), generator=generator)[:1497].split([600, 897])
    given = labels.clone()
    wrong = training[torch.rand(600, generator=generator) < 0.2]
    given[wrong] = torch.randint(10, wrong.shape, generator=generator)
    model = build_model(generator)
    params = [param.detach() for param in model.parameters()]
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    exact, kept = Exact(params, decay), averages(params, decay)
    for _ in range(steps):
        batch = training[torch.randint(600, (16,), generator=generator)]
        optimizer.zero_grad()
        with torch.enable_grad():
            cross_entropy(model(images[batch]), given[batch]).backward()
        optimizer.step()
        for average in [exact, *kept.values()]:
            average.update(params)
    results = [[p.double() for p in params], exact.emas, *(k.read() for k in kept.values())]
    raw, best, *others = (accuracy(model, v, images[test], labels[test]) for v in results)
    return raw, best, dict(zip(kept, others, strict=True))


def digits(args: argparse.Namespace) -> None:
    settings = [(1000, 0.003, compute_optimal_decay(1000)), (3000, 0.001, 0.999)]
    work = [(setting, seed) for setting in settings for seed in range(args.seeds)]
    runs = {setting: [] for setting in settings}
    for setting, seed in tqdm(work, unit="run"):
        runs[setting].append(train(*setting, seed))
    head, cells = ["format"], {name: [name] for name in [*ALL, NEAREST]}
    for (steps, lr, decay), results in runs.items():
        raw, best = (statistics.fmean(run[i] for run in results) for i in (0, 1))
        head.append(
            f"{steps} steps, lr {lr:g}, decay {decay:.4g} (weights {raw:.2f}, EMA {best:.2f})"
        )
        for name in cells:
            gain = [others[name] - exact for _, exact, others in results]
            error = statistics.stdev(gain) / math.sqrt(len(gain))
            cells[name].append(f"{statistics.fmean(gain):+.2f} ± {error:.2f}")
    title = f"points of test accuracy against the float64 EMA, {args.seeds} seeds"
    print_table(title, head, list(cells.values()))


def resnet50() -> list[tuple[int, ...]]:
    shapes, channels = [(64, 3, 7, 7), (64,), (64,)], 64
    for width, blocks in ((64, 3), (128, 4), (256, 6), (512, 3)):
        for block in range(blocks):
            convolutions = [(width, channels, 1, 1), (width, width, 3, 3), (4 * width, width, 1, 1)]
            if block == 0:
                convolutions.append((4 * width, channels, 1, 1))
            shapes += [s for c in convolutions for s in (c, c[:1], c[:1])]
            channels = 4 * width
    return [*shapes, (1000, 2048), (1000,)]


def cost(args: argparse.Namespace) -> None:
    generator = torch.Generator().manual_seed(args.seed)
    models = {"ResNet-50": resnet50(), "2000 tensors of 1024": [(1024,)] * 2000}
    cells = {name: [name, ""] for name in ALL}
    head = ["format", "bytes of a weight"]
    for model, shapes in models.items():
        params = [torch.randn(shape, generator=generator) for shape in shapes]
        kept = {name: Average(name, params, 0.999) for name in ALL}
        times = {name: [] for name in ALL}
        for _ in tqdm(range(args.rounds), unit="round"):
            for name, average in kept.items():
                begin = time.process_time()
                average.update(params)
                times[name].append(time.process_time() - begin)
        median = {name: statistics.median(rounds[2:]) for name, rounds in times.items()}
        head.append(f"update, {model} (fp32: {1000 * median['float32']:.2f} ms)")
        for name, average in kept.items():
            held = sum(tensor.nbytes for tensor in average.mains + average.lows)
            cells[name][1] = f"{held / sum(param.numel() for param in params):.2f}"
            cells[name].append(f"{median[name] / median['float32']:.1f}x")
    print_table(f"memory and time, median of {args.rounds - 2} rounds", head, list(cells.values()))


TABLES = {"gaps": gaps, "travel": travel, "digits": digits, "cost": cost}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tables", nargs="+", choices=TABLES, default=list(TABLES))
    parser.add_argument("--steps", type=int, default=10_000, help="of gaps; travel takes 4 times")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--seeds", type=int, default=16, help="of digits, at least 2")
    parser.add_argument("--rounds", type=int, default=15, help="of cost, at least 3")
    args = parser.parse_args()
    torch.set_num_threads(1)
    versions = f"ema_optim {__version__}, torch {torch.__version__}"
    print(f"{versions}, Python {platform.python_version()}, {platform.machine()}, seed {args.seed}")
    with torch.no_grad():
        for table in args.tables:
            TABLES[table](args)


if __name__ == "__main__":
    main()
