"""EMA weights in the Hugging Face Trainer: one callback. Half a minute on a CPU, no download.

A small transformer learns the documentation that ships with Python, byte by byte, at a constant
learning rate. At one decayed to zero the first two losses would be nearly the same.
"""

import argparse
import pydoc_data.topics
import tempfile

import torch
from transformers import LlamaConfig, LlamaForCausalLM, PrinterCallback, Trainer, TrainingArguments
from transformers.utils.logging import disable_progress_bar

from ema_optim import EMACallback, compute_optimal_decay


def build_trainer(args: argparse.Namespace, callbacks=None, model=None) -> Trainer:
    torch.manual_seed(0)
    sizes = {"hidden_size": 64, "intermediate_size": 192, "num_hidden_layers": 2}
    config = LlamaConfig(vocab_size=256, num_attention_heads=4, **sizes)
    text = "\n".join(pydoc_data.topics.topics.values())
    rows = torch.tensor(list(text.encode())).unfold(0, 64, 64)
    rows = rows[torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))]
    data = [{"input_ids": row, "labels": row} for row in rows]
    length = {"max_steps": args.steps, "save_steps": args.steps // 2}
    rate = {"learning_rate": 4e-3, "lr_scheduler_type": "constant"}
    quiet = {"report_to": "none", "disable_tqdm": True, "use_cpu": True}
    settings = TrainingArguments(args.folder, **length, **rate, **quiet)
    model = model or LlamaForCausalLM(config)
    trainer = Trainer(model, settings, None, data[1000:], data[:1000], callbacks=callbacks)
    trainer.remove_callback(PrinterCallback)
    return trainer


def main(args: argparse.Namespace) -> None:
    trainer = build_trainer(args, [ema := EMACallback(decay="auto")])
    trainer.train()
    plain = build_trainer(args, model=trainer.model)  # holds the training weights after train()
    exported = LlamaForCausalLM.from_pretrained(f"{args.folder}/checkpoint-{args.steps}/ema")
    print(f"{args.steps} steps, decay {compute_optimal_decay(args.steps):.6g}\n")
    print(f"evaluation loss of the training weights   {plain.evaluate()['eval_loss']:.4f}")
    print(f"evaluation loss of the EMA weights        {trainer.evaluate()['eval_loss']:.4f}")
    loss = build_trainer(args, model=exported).evaluate()["eval_loss"]
    print(f"evaluation loss of the exported model     {loss:.4f}\n")

    resumed = build_trainer(args, [again := EMACallback(decay="auto")])
    resumed.train(resume_from_checkpoint=f"{args.folder}/checkpoint-{args.steps // 2}")
    weights = all(map(torch.equal, trainer.model.parameters(), resumed.model.parameters()))
    emas = all(map(torch.equal, ema.get_ema_state().values(), again.get_ema_state().values()))
    print(f"resumed at step {args.steps // 2}, bit-equal: weights {weights}, EMA weights {emas}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=800, help="at least 2")
    torch.set_num_threads(1)  # the network is too small to share
    disable_progress_bar()
    with tempfile.TemporaryDirectory() as folder:
        main(parser.parse_args(namespace=argparse.Namespace(folder=folder)))
