"""EMA weights in the Hugging Face Trainer: one callback. Under a minute on a CPU, no download.

    python hf_trainer.py    # prints a table, draws hf_trainer.png, resumes from a checkpoint

A small transformer learns the documentation that ships with Python, byte by byte, under three
learning rates. The EMA gains where the rate stays high. The Trainer's default, linear, decays it to
zero, and then there is nothing left for an average to gain; nor is there at the end of
warmup_stable_decay, whose EMA shows while the rate is still constant what the decay will give.
"""

import argparse
import pydoc_data.topics
import tempfile
from typing import NamedTuple

import torch
from matplotlib.figure import Figure
from tqdm import tqdm
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    PrinterCallback,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.utils.logging import disable_progress_bar

from ema_optim import EMACallback, compute_optimal_decay, warmup_decay

SCHEDULES = ("constant", "linear", "warmup_stable_decay")
EVALUATIONS = 20  # in a run
Row = list[float]  # step, evaluation loss of the training weights, of the EMA weights


class Run(NamedTuple):
    trainer: Trainer
    ema: EMACallback
    curve: list[Row]


class Curve(TrainerCallback):
    """Moves the bar, and notes the training weights' loss before the Trainer evaluates the EMA."""

    def __init__(self, bar: tqdm) -> None:
        self.bar, self.rows, self.trainer = bar, [], None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        self.bar.update()
        if state.global_step % args.eval_steps == 0:
            model.eval()
            with torch.no_grad():
                losses = [
                    model(**self.trainer.data_collator(part)).loss
                    for part in batches(self.trainer.eval_dataset, args.per_device_eval_batch_size)
                ]
            model.train()
            self.rows.append([state.global_step, torch.stack(losses).mean().item()])

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if self.rows and len(self.rows[-1]) == 2:
            self.rows[-1].append(metrics["eval_loss"])


def batches(data: list, size: int) -> list[list]:
    return [data[start : start + size] for start in range(0, len(data), size)]


def build_trainer(args, schedule="constant", seed=0, callbacks=None, model=None) -> Trainer:
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes)
    text = "\n".join(pydoc_data.topics.topics.values())
    rows = torch.tensor(list(text.encode())).unfold(0, 64, 64)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    data = [{"input_ids": row, "labels": row} for row in rows]
    every = max(1, args.steps // EVALUATIONS)
    length = {"max_steps": args.steps, "save_steps": args.steps // 2}
    length |= {"eval_strategy": "steps", "eval_steps": every, "per_device_eval_batch_size": 50}
    rate = {"learning_rate": 4e-3, "lr_scheduler_type": schedule, "seed": seed}
    if schedule == "warmup_stable_decay":
        rate["lr_scheduler_kwargs"] = {"num_decay_steps": args.steps // 4}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    settings = TrainingArguments(f"{args.folder}/{schedule}", **length, **rate, **quiet)
    model = model or LlamaForCausalLM(config)
    trainer = Trainer(model, settings, None, data[200:], data[:200], callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(args, bar: tqdm, schedule: str, seed: int = 0, resume: str | None = None) -> Run:
    ema = EMACallback(warmup_decay(compute_optimal_decay(args.steps)))  # the one line
    curve = Curve(bar)
    curve.trainer = trainer = build_trainer(args, schedule, seed, [ema, curve])
    trainer.train(resume_from_checkpoint=resume)
    return Run(trainer, ema, curve.rows)


def print_table(runs: dict[str, list[Run]], args) -> None:
    print(f"{args.steps} steps, seeds: {args.seeds}, decay {compute_optimal_decay(args.steps):.6g}")
    print("with a warm-up; evaluation loss at the end\n")
    print("learning rate          training weights   EMA weights   difference, ± standard error")
    for schedule, of_seeds in runs.items():
        last = torch.tensor([run.curve[-1] for run in of_seeds])
        gains = last[:, 2] - last[:, 1]
        error = f" ± {gains.std() / len(gains) ** 0.5:.4f}" if len(gains) > 1 else ""
        print(f"{schedule:<23}{last[:, 1].mean():<19.4f}{last[:, 2].mean():<14.4f}", end="")
        print(f"{gains.mean():+.4f}{error}")


def draw(runs: dict[str, list[Run]], args) -> None:
    figure = Figure(figsize=(9, 3.4), dpi=150, layout="constrained")
    for axes, (schedule, of_seeds) in zip(
        figure.subplots(1, len(runs), sharey=True), runs.items(), strict=True
    ):
        curves = torch.tensor([run.curve for run in of_seeds]).mean(dim=0).T
        for name, losses, colour in (
            ("training weights", curves[1], "#c2410c"),
            ("EMA weights", curves[2], "#1d4ed8"),
        ):
            label = f"{name}: {losses[-1]:.3f}"
            axes.plot(curves[0], losses, color=colour, linewidth=2, label=label)
        axes.set_title(f"{schedule} learning rate", fontsize=10)
        axes.set_xlabel("optimizer step")
        axes.legend(labelcolor="linecolor", fontsize=9)
        axes.set_ylim(curves[1:].min() - 0.05, curves[1:].min() + 0.9)
        axes.grid(alpha=0.3)
    figure.axes[0].set_ylabel("evaluation loss (nats per byte)")
    figure.savefig(args.output, pil_kwargs={"optimize": True})


def main(args: argparse.Namespace) -> None:
    total = args.steps * len(SCHEDULES) * args.seeds + args.steps - args.steps // 2
    with tqdm(total=total, unit="step") as bar:
        seeds = range(args.seeds)
        runs = {name: [train(args, bar, name, seed) for seed in seeds] for name in SCHEDULES}
        checkpoint = f"{args.folder}/constant/checkpoint-{args.steps // 2}"
        resumed = train(args, bar, "constant", args.seeds - 1, checkpoint)
    print_table(runs, args)
    last = runs["constant"][-1]
    exported = LlamaForCausalLM.from_pretrained(
        f"{args.folder}/constant/checkpoint-{args.steps}/ema"
    )
    of_exported = build_trainer(args, model=exported).evaluate()["eval_loss"]
    print(f"\nevaluation loss of the EMA weights of the last constant run {last.curve[-1][-1]:.4f}")
    print(f"the same, from_pretrained('checkpoint-{args.steps}/ema')       {of_exported:.4f}")
    weights = all(map(torch.equal, *(run.trainer.model.parameters() for run in (last, resumed))))
    emas = all(map(torch.equal, *(run.ema.get_ema_state().values() for run in (last, resumed))))
    print(f"resumed at step {args.steps // 2}, bit-equal: weights {weights}, EMA weights {emas}")
    draw(runs, args)
    print(f"\nevaluation curves: {args.output}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="at least 2")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", default="hf_trainer.png", help="path of the figure")
    torch.set_num_threads(1)  # the network is too small to share
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        main(parser.parse_args(namespace=argparse.Namespace(folder=folder)))
