"""Storage formats of the EMA that were measured and are not offered.

    python tests/benchmarks/rejected_formats.py

Error over the distance to the weights, as in accuracy_formats.py: at 1 the EMA is of no use. All
values are decoded, averaged in fp32 and stored again at every step.
"""

import argparse

import torch
from accuracy_formats import Exact, norm, print_table, walk
from torch import Tensor
from torchao.optim.subclass_4bit import OptimState4bit
from torchao.optim.subclass_8bit import OptimState8bit
from torchao.optim.subclass_fp8 import OptimStateFp8
from tqdm import tqdm

PROCESSES = {
    "walk, 0.999": (1e-3, False, 0.999),
    "cosine, 0.999": (1e-3, True, 0.999),
    "walk, 0.9999": (1e-3, False, 0.9999),
}


class Container:
    """The EMA in one of torchao's optimizer states, through its own ``copy_``."""

    def __init__(self, weights, decay, state):
        self.decay, self.state = decay, state
        self.state.copy_(weights)

    def update(self, weights):
        self.state.copy_(torch.lerp(self.state.dequantize().float(), weights, 1 - self.decay))

    def read(self):
        return self.state.dequantize().double()


class Rounded:
    """int8 with one scale for 256 weights, rounded stochastically."""

    def __init__(self, weights, decay, generator):
        self.decay, self.generator, self.ema = decay, generator, weights.clone()

    def update(self, weights):
        self.ema = self.round(torch.lerp(self.ema, weights, 1 - self.decay))

    def round(self, values):
        blocks = values.view(-1, 256)
        scale = blocks.abs().amax(dim=1, keepdim=True) / 127
        noise = torch.rand(blocks.shape, generator=self.generator)
        return ((blocks / scale + noise).floor() * scale).view(values.shape)

    def read(self):
        return self.ema.double()


class Delta(Rounded):
    """``ema - weights`` in that form: needs the weights of before every step."""

    def __init__(self, weights, decay, generator):
        super().__init__(torch.zeros_like(weights), decay, generator)
        self.weights = weights.clone()

    def update(self, weights):
        delta = self.decay * (self.ema - (weights - self.weights))
        self.ema, self.weights = self.round(delta), weights.clone()

    def round(self, values):
        return super().round(values) if values.any() else values

    def read(self):
        return (self.weights + self.ema).double()


def contenders(weights: Tensor, decay: float, seed: int) -> dict:
    shape, generator = weights.shape, torch.Generator().manual_seed(seed)
    return {
        "torchao 8-bit state": Container(weights, decay, OptimState8bit.zeros(shape)),
        "torchao fp8 state": Container(weights, decay, OptimStateFp8.zeros(shape)),
        "torchao 4-bit state": Container(weights, decay, OptimState4bit.zeros(shape)),
        "int8, stochastic": Rounded(weights, decay, generator),
        "difference to the weights, int8, stochastic": Delta(weights, decay, generator),
    }


def follow(steps, seed, rate, cosine, decay):
    path = (torch.cat(layers) for layers in walk(steps, rate, cosine, seed))
    weights = next(path)
    exact, kept = Exact([weights], decay), contenders(weights, decay, seed)
    for weights in tqdm(path, total=steps, unit="step"):
        exact.update([weights])
        for average in kept.values():
            average.update(weights)
    gap = norm([weights.double() - exact.emas[0]])
    return {name: norm([a.read() - exact.emas[0]]) / gap for name, a in kept.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    torch.set_num_threads(1)
    columns = [follow(args.steps, args.seed, *process) for process in PROCESSES.values()]
    rows = [[name, *(f"{column[name]:.2g}" for column in columns)] for name in columns[0]]
    print(f"torch {torch.__version__}, seed {args.seed}")
    title = f"error / distance to the weights, {args.steps} steps"
    print_table(title, ["format", *PROCESSES], rows)


if __name__ == "__main__":
    with torch.no_grad():
        main()
