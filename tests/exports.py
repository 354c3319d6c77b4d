"""Checkpoints to export from, and what was exported."""

import peft
import torch
import transformers
from safetensors.torch import load_file
from sharded import equal
from torch import nn
from torch.optim import AdamW

from ema_optim import EMAOptimizer, export_ema

FORMATS = [None, torch.float64, "float24", "float32_compensated", torch.bfloat16]


def exported(source, folder, **options):
    export_ema(source, folder / "ema.safetensors", force=True, **options)
    return load_file(folder / "ema.safetensors")


def same(left, right):
    """Bit-equal, names and dtypes too."""
    alike = left.keys() == right.keys() and all(left[k].dtype == right[k].dtype for k in left)
    return alike and equal(left, right)


def net(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 8), nn.Linear(8, 2))


def named(model):
    return AdamW(model.named_parameters(), lr=0.05)


def unnamed(model):
    return AdamW(model.parameters(), lr=0.05)


def run(model, optimizer, steps=4):
    for step in range(steps):
        optimizer.zero_grad()
        inputs = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        dtype = next(model.parameters()).dtype
        model(inputs.to(dtype)).float().square().mean().backward()
        optimizer.step()
    return model, optimizer


def trained(inner=named, weights=torch.float32, **options):
    model = net().to(weights)
    return run(model, EMAOptimizer(inner(model), **{"decay": 0.6, **options}))


def saved(folder, name="checkpoint.pt", **content):
    torch.save(content, folder / name)
    return folder / name


def llama(adapter=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1}
    config = transformers.LlamaConfig(vocab_size=32, num_attention_heads=2, **sizes)
    model = transformers.LlamaForCausalLM(config)
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"])
    return peft.get_peft_model(model, lora) if adapter else model


def trainer_run(folder, model, callbacks, optimizers=(None, None), **options):
    rows = torch.randint(0, 32, (16, 12), generator=torch.Generator().manual_seed(0))
    settings = {"max_steps": 4, "save_steps": 4, "use_cpu": True, "report_to": "none"}
    args = transformers.TrainingArguments(
        str(folder), per_device_train_batch_size=4, disable_tqdm=True, **{**settings, **options}
    )
    data = [{"input_ids": row, "labels": row} for row in rows]
    trainer = transformers.Trainer(
        model, args, train_dataset=data, callbacks=callbacks, optimizers=optimizers
    )
    trainer.train()
    return trainer


def no_names(folder):
    return saved(folder, optimizer=trained(unnamed)[1].state_dict()), None
