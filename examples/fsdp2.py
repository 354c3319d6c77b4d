"""Weights sharded over several ranks with FSDP2: train, resume on other ranks, export the EMA.

    torchrun --nproc-per-node 2 fsdp2.py                # GPUs if there are any, else CPU cores
    torchrun --nproc-per-node 4 fsdp2.py --steps 800    # the same run goes on, on four ranks

A small transformer learns to write Python's own help pages, character by character. Every rank
holds its part of the weights and of their EMA; the distributed checkpoints in --folder hold both.
At the end the EMA weights become one file, with which a plain model validates as the sharded one.

The learning rate is constant: that of 0.003, 0.006 and 0.01 with which the *training weights*
validate best. Decayed to zero, it would leave the EMA little to gain (see quickstart.py).
"""

import argparse
import os
import time
from itertools import pairwise
from pathlib import Path
from pydoc_data import topics

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from matplotlib.figure import Figure
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy
from tqdm import tqdm

from ema_optim import EMAOptimizer, warmup_decay

SEED = 0
BLOCKS, WIDTH, HEADS, CONTEXT = 3, 64, 4, 64
BATCH = 32  # windows of text per step, over all ranks
WINDOWS = 8 * BATCH  # of held-out text

Arguments = argparse.Namespace
Row = list  # step, ranks, validation loss of the training weights, of the EMA weights


class Transformer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.characters, self.places = nn.Embedding(128, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, dropout=0.0, batch_first=True)
            for _ in range(BLOCKS)
        )
        self.head = nn.Linear(WIDTH, 128)

    def forward(self, text: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(CONTEXT, device=text.device)
        x = self.characters(text) + self.places.weight
        for block in self.blocks:
            x = block(x, src_mask=mask, is_causal=True)
        return self.head(x.flatten(0, 1))  # flat: else the output is a view, and FSDP2 warns


def start_process_group() -> torch.device:
    if not torch.cuda.is_available():
        dist.init_process_group("gloo")
        return torch.device("cpu")
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
    torch.cuda.set_device(device)
    dist.init_process_group("cpu:gloo,cuda:nccl", device_id=device)
    return device


def build(args: Arguments) -> tuple[nn.Module, EMAOptimizer]:
    torch.manual_seed(SEED)
    model = Transformer().to(args.device)  # a large one is built on the meta device
    for module in (*model.blocks, model):
        fully_shard(module)
    adamw = torch.optim.AdamW(model.parameters(), lr=args.lr)  # after the sharding, as always
    return model, EMAOptimizer(adamw, decay=warmup_decay(args.decay))


def read_text(device: torch.device) -> tuple[Tensor, Tensor]:
    characters = "\n".join(topics.topics.values()).encode("ascii", "replace")
    text = torch.tensor(list(characters), device=device)
    training, held_out = text.split([len(text) * 9 // 10, len(text) - len(text) * 9 // 10])
    return training, held_out.unfold(0, CONTEXT + 1, len(held_out) // (WINDOWS + 1))[:WINDOWS]


def my_part(rows: Tensor) -> Tensor:
    return rows[dist.get_rank() :: dist.get_world_size()]


def batch_of(step: int, text: Tensor) -> Tensor:
    """The step alone decides on the batch: a run on other ranks goes on with the same text."""
    generator = torch.Generator().manual_seed(SEED + step)
    starts = torch.randint(len(text) - CONTEXT, (BATCH, 1), generator=generator)
    return text[(my_part(starts) + torch.arange(CONTEXT + 1)).to(text.device)]


def loss_of(model: nn.Module, windows: Tensor) -> Tensor:
    return cross_entropy(model(windows[:, :-1]), windows[:, 1:].flatten())


@torch.no_grad()
def mean_loss(model: nn.Module, windows: Tensor) -> Tensor:
    return torch.stack([loss_of(model, part) for part in windows.split(BATCH)]).mean()


def validate(model: nn.Module, windows: Tensor) -> float:
    loss = mean_loss(model, my_part(windows))
    dist.all_reduce(loss)
    return loss.item() / dist.get_world_size()


def train(model: nn.Module, optimizer: EMAOptimizer, rows: list[Row], args: Arguments) -> None:
    text, windows = read_text(args.device)
    done = rows[-1][0] if rows else 0
    rank_0 = dist.get_rank() == 0
    for step in tqdm(range(done + 1, args.steps + 1), unit="step", disable=not rank_0):
        loss = loss_of(model, batch_of(step, text))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()  # the inner step, then the average of this rank's part
        if step % args.every == 0 or step == args.steps:
            rows.append([step, dist.get_world_size(), validate(model, windows)])
            with optimizer.swap_ema_weights():
                rows[-1].append(validate(model, windows))
            save(model, optimizer, rows, args.folder / f"step-{step:06d}")


def save(model: nn.Module, optimizer: EMAOptimizer, rows: list[Row], path: Path) -> None:
    """Into a directory of its own: should a rank die here, the previous one is still whole."""
    weights, state = get_state_dict(model, optimizer)
    dcp.save({"model": weights, "optimizer": state, "rows": rows}, checkpoint_id=path)


def resume(model: nn.Module, optimizer: EMAOptimizer, folder: Path) -> list[Row]:
    complete = sorted(path.parent for path in folder.glob("step-*/.metadata"))  # written last
    if not complete:
        return []
    weights, state = get_state_dict(model, optimizer)  # this rank's part of this run: to be filled
    checkpoint = {"model": weights, "optimizer": state, "rows": []}
    dcp.load(checkpoint, checkpoint_id=complete[-1])
    weights, state, rows = checkpoint.values()
    set_state_dict(model, optimizer, model_state_dict=weights, optim_state_dict=state)
    step, ranks = rows[-1][:2]
    say(f"resumed at step {step} (ranks: then {ranks}, now {dist.get_world_size()})")
    return rows


def export(model: nn.Module, optimizer: EMAOptimizer, file: Path) -> None:
    """One tensor at a time is whole, and rank 0 alone keeps it: no second model on any device."""
    state = {}
    for name, ema in optimizer.get_ema_state(model).items():
        whole = ema.full_tensor()  # every rank calls it and sends its part
        if dist.get_rank() == 0:
            state[name] = whole.cpu()
    if dist.get_rank() == 0:
        torch.save(state, file)


def check(file: Path, rows: list[Row], args: Arguments) -> None:
    with torch.device("meta"):
        model = Transformer()  # no memory yet
    state = torch.load(file, map_location=args.device, weights_only=True)
    model.load_state_dict(state, assign=True)
    plain, sharded = mean_loss(model, read_text(args.device)[1]).item(), rows[-1][-1]
    print(f"\n{file.name}: the EMA weights, {file.stat().st_size:,} bytes")
    print(f"validation loss, sharded                {sharded:.6f}")
    print(f"validation loss, file in a plain model  {plain:.6f}")
    if abs(plain - sharded) > 1e-5 * sharded:
        raise SystemExit("the two differ")


def describe(model: nn.Module, optimizer: EMAOptimizer, args: Arguments) -> None:
    whole = sum(param.numel() for param in model.parameters())
    part = sum(param.to_local().numel() for param in model.parameters())
    lr = optimizer.param_groups[0]["lr"]  # a resumed run goes on with the checkpoint's
    device = args.device.type
    say(f"ranks: {dist.get_world_size()}, device: {device}, torch {torch.__version__}, seed {SEED}")
    say(f"{whole:,} parameters, {part:,} of them on rank 0")
    say(f"up to step {args.steps}, constant learning rate {lr:g}, decay up to {args.decay:g}")


def print_table(rows: list[Row]) -> None:
    print("\nvalidation loss\nstep   ranks   training weights   EMA weights   difference")
    for step, ranks, training, ema in rows:
        print(f"{step:<7}{ranks:<8}{training:<19.4f}{ema:<14.4f}{ema - training:+.4f}")


def draw(rows: list[Row], args: Arguments) -> None:
    steps, _, training, ema = zip(*rows, strict=True)
    axes = Figure(figsize=(6, 3.8), dpi=150, layout="constrained").subplots()
    for name, losses, colour in (("EMA", ema, "#1d4ed8"), ("training", training, "#c2410c")):
        label = f"{name} weights: {losses[-1]:.3f}"
        axes.plot(steps, losses, color=colour, linewidth=2, marker="o", markersize=3, label=label)
    for (step, ranks, *_), (_, then, *_) in pairwise(rows):
        if ranks != then:
            label = f"ranks: {ranks}, then {then}"
            axes.axvline(step, color="#6b7280", linestyle=":", label=label)
    axes.set_title("One sharded run validated twice: constant learning rate", fontsize=11)
    axes.legend(labelcolor="linecolor")
    axes.set(xlabel="optimizer step", ylabel="validation loss (nats per character)")
    axes.grid(alpha=0.3)
    axes.figure.savefig(args.output, pil_kwargs={"optimize": True})


def say(text: str) -> None:
    if dist.get_rank() == 0:
        print(text, flush=True)


def parse_arguments() -> Arguments:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=600, help="of the whole run")
    parser.add_argument("--every", type=int, default=50, help="steps between two checkpoints")
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--decay", type=float, default=0.99, help="reached by a warm-up")
    parser.add_argument("--folder", type=Path, default="fsdp2_run", help="of checkpoints, export")
    parser.add_argument("--output", default="fsdp2.png", help="path of the figure")
    if BATCH % int(os.environ.get("WORLD_SIZE", BATCH + 1)):
        parser.error(f"start it with torchrun --nproc-per-node N, where N divides {BATCH}")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    args.device = start_process_group()
    model, optimizer = build(args)
    rows = resume(model, optimizer, args.folder)
    describe(model, optimizer, args)
    train(model, optimizer, rows, args)
    export(model, optimizer, args.folder / "ema.pt")
    if dist.get_rank() == 0:
        print_table(rows)
        check(args.folder / "ema.pt", rows, args)
        draw(rows, args)
    dist.barrier()  # no rank leaves while rank 0 is at work
    dist.destroy_process_group()
    time.sleep(0.5)  # gloo's threads can abort a process that ends right after a collective


if __name__ == "__main__":
    main()
