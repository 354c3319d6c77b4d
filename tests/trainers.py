"""What the tests of the ``Trainer`` share: tiny models built from a config, runs, a witness."""

import itertools
import subprocess
import sys

import peft
import torch
import transformers
from reference import Reference, same, wide
from torch.optim import AdamW
from transformers import (
    BertConfig,
    BertForMaskedLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)

from ema_optim import EMAOptimizer

DECAY = 0.1  # after one update no more than a tenth of the initial weights is left
STEPS = 8
V4 = transformers.__version__.startswith("4.")
CHECKPOINTING = {"activation_checkpointing": True}
if V4:
    reentrant = {"use_reentrant": False}  # that one needs inputs with a gradient
    CHECKPOINTING = {"gradient_checkpointing": True, "gradient_checkpointing_kwargs": reentrant}


def llama(seed=0, tie=True, cls=LlamaForCausalLM):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    heads = {"num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2}
    return cls(LlamaConfig(vocab_size=32, tie_word_embeddings=tie, **sizes, **heads))


def untied(seed=0):
    return llama(seed, tie=False)


def bf16(seed=0):
    return llama(seed).bfloat16()


def gpt2(seed=0):
    torch.manual_seed(seed)
    tokens = {"bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(
        GPT2Config(vocab_size=32, n_positions=16, n_embd=16, n_layer=1, n_head=2, **tokens)
    )


def bert(seed=0):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "max_position_embeddings": 16}
    return BertForMaskedLM(
        BertConfig(vocab_size=32, num_hidden_layers=1, num_attention_heads=2, **sizes)
    )


class Unused(LlamaForCausalLM):
    """A model with a parameter that never has a gradient."""

    def __init__(self, config):
        super().__init__(config)
        self.unused = torch.nn.Parameter(torch.randn(3))


def unused(seed=0):
    return llama(seed, cls=Unused)


def unused_bf16(seed=0):
    return unused(seed).bfloat16()


def lora(seed=0):
    config = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    return peft.get_peft_model(llama(), config) if seed == 0 else lora_from(seed, config)


def lora_from(seed, config):
    model = llama()  # the base is the same, the adapter is not
    torch.manual_seed(seed)
    return peft.get_peft_model(model, config)


class Plain(torch.nn.Module):
    """No PreTrainedModel; with a buffer that every training forward moves."""

    def __init__(self):
        super().__init__()
        self.embed, self.norm = torch.nn.Embedding(32, 16), torch.nn.BatchNorm1d(16)
        self.head = torch.nn.Linear(16, 32)

    def forward(self, input_ids, labels):
        logits = self.head(self.norm(self.embed(input_ids).flatten(0, 1)))
        return {"loss": torch.nn.functional.cross_entropy(logits, labels.flatten())}


def plain(seed=0):
    torch.manual_seed(seed)
    return Plain()


def tokens(count, seed):
    ids = torch.randint(0, 32, (count, 12), generator=torch.Generator().manual_seed(seed))
    return [{"input_ids": row, "labels": row} for row in ids]


TRAIN, EVAL = tokens(32, 0), tokens(8, 1)


def make(model, folder, *callbacks, **options):
    """A Trainer; ``scaler`` and what is no training argument go to where they belong."""
    scaler = options.pop("scaler", None)
    own = {"optimizers", "optimizer_cls_and_kwargs", "compute_metrics", "processing_class"}
    own = {key: options.pop(key) for key in own & options.keys()}
    cls = options.pop("trainer", Trainer)
    defaults = {
        "max_steps": STEPS,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "save_strategy": "no",
        "logging_steps": 1,
        "seed": 1,
    }
    quiet = {"report_to": [], "use_cpu": True, "disable_tqdm": True, "dataloader_pin_memory": False}
    quiet["label_names"] = ["labels"]  # transformers 4 does not find that of an adapter
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **quiet, **options})
    made = cls(
        model=model,
        args=args,
        train_dataset=TRAIN,
        eval_dataset=EVAL,
        callbacks=list(callbacks),
        data_collator=transformers.default_data_collator,
        **own,
    )
    if scaler:  # the Trainer makes none on a CPU
        made.accelerator.scaler = torch.amp.GradScaler("cpu", **scaler)
    return made


def fit(model, folder, *callbacks, resume=None, **options):
    trainer = make(model, folder, *callbacks, **options)
    trainer.train(resume_from_checkpoint=resume and str(resume))
    return trainer


def weights(model):
    return {name: value.detach().clone() for name, value in model.state_dict().items()}


def rounded(state, model):
    """An EMA by name as the model's parameters hold it, every name of a tied one."""
    named = dict(model.named_parameters())
    return {name: value.to(named[name].dtype) for name, value in state.items()}


def trainable(model):
    return [p for p in model.parameters() if p.requires_grad]


def parameters(model):
    return {n: p.detach().clone() for n, p in model.named_parameters() if p.requires_grad}


def saves(every=4, evaluate=None):
    """Arguments that save, and evaluate, every so many steps."""
    evaluates = {"eval_strategy": "steps", "eval_steps": evaluate} if evaluate else {}
    return {"save_strategy": "steps", "save_steps": every, **evaluates}


class Witness(TrainerCallback):
    """Averages in float64 what it sees after each step; names the weights of every batch."""

    def __init__(self, model, decay=DECAY, rtol=1e-5, **options):
        self.model, self.decay, self.rtol, self.options = model, decay, rtol, options
        self.batches, self.wrong, self.history = [], [], {}
        self.start()
        model.register_forward_pre_hook(self.look)

    def start(self):
        self.reference = Reference(trainable(self.model), self.decay, **self.options)
        self.training = [wide(p) for p in self.reference.params]

    def on_train_begin(self, args, state, control, **kwargs):
        if state.global_step:
            self.start()

    def on_step_end(self, args, state, control, **kwargs):
        now = [wide(p) for p in self.reference.params]
        if not same(now, self.training):  # else an overflow skipped the step
            self.reference.update()
        self.training = now
        self.history[state.global_step] = self.reference.emas

    def look(self, module, args):
        found = [name for name, values in self.both() if self.holds(values)]
        if module.training:
            self.wrong += [] if "training" in found else [found]
        else:
            self.batches.append("+".join(found))

    def both(self):
        return ("ema", self.reference.emas), ("training", self.training)

    def holds(self, values):
        return close([wide(p) for p in self.reference.params], values, self.rtol)


def close(left, right, rtol=1e-5):
    pairs = zip(left, right, strict=True)
    return all(torch.allclose(wide(a), wide(b), rtol=rtol, atol=1e-8) for a, b in pairs)


class EMAAt(TrainerCallback):
    """Keeps the EMA of every step by name."""

    def __init__(self, callback):
        self.callback, self.states = callback, {}

    def on_step_end(self, args, state, control, **kwargs):
        self.states[state.global_step] = self.callback.get_ema_state()


def best(at=4, **options):
    """Arguments by which the evaluation of step ``at`` is the best one."""
    scores = itertools.chain([float(step == at) for step in (2, 4, 6, 8)], itertools.repeat(0.0))
    wanted = {"load_best_model_at_end": True, "metric_for_best_model": "score"}
    scoring = {"compute_metrics": lambda prediction: {"score": next(scores)}}
    return {**saves(2, evaluate=2), **wanted, **scoring, "greater_is_better": True, **options}


def facts(trainer, callback):
    """All that a resume must bring back."""
    return [weights(trainer.model), callback.get_ema_state(), trainer.optimizer.state_dict()]


OVERFLOW = {"init_scale": 2.0**10, "growth_interval": 2, "growth_factor": 2.0**117}
FP16 = {"scaler": {**OVERFLOW, "backoff_factor": 2.0**-117}, "max_grad_norm": 0.0}


def numbers(trainer):
    """What the training logged, without the times."""
    keys = ("step", "loss", "grad_norm", "learning_rate")
    entries = [entry for entry in trainer.state.log_history if "loss" in entry]
    return [{k: repr(entry.get(k)) for k in keys} for entry in entries]  # NaN equals NaN this way


class Stops(TrainerCallback):
    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = state.global_step == 4


LOADERS = {
    llama: lambda folder: LlamaForCausalLM.from_pretrained(folder),
    untied: lambda folder: LlamaForCausalLM.from_pretrained(folder),
    bf16: lambda folder: LlamaForCausalLM.from_pretrained(folder).bfloat16(),
    bert: lambda folder: BertForMaskedLM.from_pretrained(folder),
    lora: lambda folder: peft.PeftModel.from_pretrained(llama(), folder, is_trainable=True),
}


def run_python(code, *arguments, **options):
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, **options)


DOORS = {
    "optimizers": lambda model: {
        "optimizers": (EMAOptimizer(AdamW(trainable(model), lr=1e-2), decay=DECAY), None)
    },
    "class": lambda model: {
        "optimizer_cls_and_kwargs": (EMAOptimizer.for_class(AdamW, decay=DECAY), {"lr": 1e-2})
    },
}
