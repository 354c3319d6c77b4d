"""LoRA with an EMA of the adapter alone: half a minute on a CPU, no download.

A small transformer learns Python's documentation, an adapter Python's code at a constant rate.
"""

import argparse
import copy
import inspect
import tempfile
import warnings
from pydoc_data.topics import topics

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM

from ema_optim import EMAOptimizer, compute_optimal_decay


def rows_of(text):
    rows = torch.tensor(list(text.encode())).unfold(0, 64, 64)
    return rows[torch.randperm(len(rows))]


def train(model, optimizer, rows):
    for _ in range(args.steps):
        batch = rows[torch.randint(len(rows), (8,))]
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def report(name, model):
    loss = model(input_ids=test_rows, labels=test_rows).loss.item()
    print(f"loss on source code, {name:35} {loss:.4f}")


parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
parser.add_argument("--steps", type=int, default=600)
args = parser.parse_args()
warnings.filterwarnings("ignore", message="`is_gradient_checkpointing`")  # peft's own call
torch.set_num_threads(1)  # the network is too small to share
torch.manual_seed(0)
sizes = {"hidden_size": 64, "intermediate_size": 192, "num_attention_heads": 4}
base = LlamaForCausalLM(LlamaConfig(vocab_size=256, num_hidden_layers=2, **sizes))
train(base, torch.optim.AdamW(base.parameters(), lr=4e-3), rows_of("\n".join(topics.values())))
test_rows, rows = rows_of(inspect.getsource(inspect)).tensor_split([500])
model = get_peft_model(copy.deepcopy(base), LoraConfig(r=8, target_modules="all-linear"))
adamw = torch.optim.AdamW(model.parameters(), lr=1e-2)  # given the frozen weights as well
optimizer = EMAOptimizer(adamw, decay=compute_optimal_decay(args.steps))
train(model, optimizer, rows)
report("no adapter", base)
report("training weights of the adapter", model)
with optimizer.swap_ema_weights(), tempfile.TemporaryDirectory() as folder:
    report("EMA weights of the adapter", model)
    model.save_pretrained(folder)
    report("the exported adapter", PeftModel.from_pretrained(base, folder))
for name, state in ("model", model.state_dict()), ("EMA", optimizer.get_ema_state(model)):
    print(f"bytes of the {name:43} {sum(tensor.nbytes for tensor in state.values()):,}")
