"""LoRA with an EMA of the adapter alone: half a minute on a CPU, no download.

    python lora.py    # prints a table, draws lora.png

A small transformer learns Python's documentation, an adapter Python's code at a constant rate.
"""

import argparse
import copy
import inspect
import tempfile
import warnings
from pydoc_data.topics import topics

import torch
from matplotlib.figure import Figure
from peft import LoraConfig, PeftModel, get_peft_model
from tqdm import tqdm
from transformers import LlamaConfig, LlamaForCausalLM

from ema_optim import EMAOptimizer, compute_optimal_decay, warmup_decay


def rows_of(text):
    rows = torch.tensor(list(text.encode())).unfold(0, 64, 64)
    return rows[torch.randperm(len(rows))]


def train(model, optimizer, rows, title):
    for step in tqdm(range(1, args.steps + 1), title, unit="step"):
        batch = rows[torch.randint(len(rows), (8,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        yield step


@torch.no_grad()
def loss_of(model, rows):
    return model(input_ids=rows, labels=rows).loss.item()


def draw(curve, loss_of_base):
    steps, training, ema = zip(*curve, strict=True)
    axes = Figure(figsize=(6, 3.8), dpi=150, layout="constrained").subplots()
    axes.axhline(
        loss_of_base, color="#6b7280", linestyle=":", label=f"no adapter: {loss_of_base:.3f}"
    )
    for name, losses, colour in (("training", training, "#c2410c"), ("EMA", ema, "#1d4ed8")):
        label = f"{name} weights of the adapter: {losses[-1]:.3f}"
        axes.plot(steps, losses, color=colour, linewidth=2, label=label)
    axes.set_title("One adapter validated twice: constant learning rate", fontsize=11)
    axes.legend(labelcolor="linecolor")
    axes.set(xlabel="optimizer step", ylabel="loss on source code (nats per byte)")
    axes.grid(alpha=0.3)
    axes.figure.savefig(args.output, pil_kwargs={"optimize": True})


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=600)
parser.add_argument("--output", default="lora.png", help="path of the figure")
args = parser.parse_args()
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft's own call
warnings.filterwarnings("ignore", message="the EMA still holds")  # at the first points of the curve
torch.set_num_threads(1)  # the network is too small to share
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes))
adamw = torch.optim.AdamW(base.parameters(), lr=4e-3)
for _ in train(base, adamw, rows_of("\n".join(topics.values())), "the model"):
    pass
code_rows = rows_of(inspect.getsource(inspect))
test_rows, validation_rows, rows = code_rows.tensor_split([500, 600])
model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules="all-linear"))
adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)  # given the frozen weights as well
optimizer = EMAOptimizer(adamw, decay=warmup_decay(compute_optimal_decay(args.steps)))
curve = []
for step in train(model, optimizer, rows, "an adapter"):
    if step % max(1, args.steps // 20) == 0:
        curve.append([step, loss_of(model, validation_rows)])
        with optimizer.swap_ema_weights():
            curve[-1].append(loss_of(model, validation_rows))
draw(curve, loss_of(base, validation_rows))
losses = {"no adapter": loss_of(base, test_rows)}
losses["training weights of the adapter"] = loss_of(model, test_rows)
with optimizer.swap_ema_weights(), tempfile.TemporaryDirectory() as folder:
    losses["EMA weights of the adapter"] = loss_of(model, test_rows)
    model.save_pretrained(folder)
    losses["the exported adapter"] = loss_of(PeftModel.from_pretrained(base, folder), test_rows)
for name, loss in losses.items():
    print(f"loss on source code, {name:35} {loss:.4f}")
for name, state in ("model", model.state_dict()), ("EMA", optimizer.get_ema_state(model)):
    print(f"bytes of the {name:43} {sum(tensor.nbytes for tensor in state.values()):,}")
print(f"\nvalidation curves: {args.output}")
