"""PEFT: an EMA of the adapter alone, over dense and over quantized frozen weights."""

import copy
import os

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from reference import Reference, same, wide
from torch import nn
from torch.optim import AdamW
from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

from ema_optim import EMACallback, EMAModel, EMAOptimizer

pytestmark = [
    # peft asks transformers for the state of gradient checkpointing under its former name.
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

DECAY = 0.2
TARGETS = ["q_proj", "v_proj"]


def dense(seed=0, **kwargs):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 64, "intermediate_size": 64, "vocab_size": 32}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 2, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, **kwargs))


def attention_layers(model):
    for layer in model.model.layers:
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            yield layer.self_attn, name, getattr(layer.self_attn, name)


def torchao_nf4():
    nf4 = pytest.importorskip("torchao.quantization.quantize_.workflows.nf4.nf4_tensor")
    model = dense()
    for _, _, linear in attention_layers(model):
        weight = nf4.to_nf4(linear.weight.detach(), block_size=64, scaler_block_size=64)
        linear.weight = nn.Parameter(weight, requires_grad=False)
    return model


def bitsandbytes_nf4():
    bnb = pytest.importorskip("bitsandbytes", reason="bitsandbytes is optional: no extra needs it")
    model = dense()
    for parent, name, linear in attention_layers(model):
        quantized = bnb.nn.Linear4bit(64, 64, bias=False, quant_type="nf4")
        weight = linear.weight.detach()
        quantized.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        setattr(parent, name, quantized.to("cpu"))
    model.is_loaded_in_4bit = True  # peft picks its layer by this
    return model


BASES = {"dense": dense, "torchao": torchao_nf4, "bitsandbytes": bitsandbytes_nf4}
ADAPTERS = {
    "lora": {},
    "dora": {"use_dora": True},
    "rslora": {"use_rslora": True},
    "with-head": {"modules_to_save": ["lm_head"]},
    "with-tokens": {"trainable_token_indices": {"embed_tokens": [0, 3]}},
}
COMBINATIONS = {
    f"{name}-{of}": (BASES[of], ADAPTERS[name])
    for name in ADAPTERS
    for of in BASES
    if (name, of) != ("dora", "torchao")  # peft cannot dequantize torchao's NF4 for its norm
}
of_every_base = pytest.mark.parametrize("base", BASES.values(), ids=BASES)
of_every_adapter = pytest.mark.parametrize("adapter", ADAPTERS.values(), ids=ADAPTERS)
of_every_combination = pytest.mark.parametrize(
    ("base", "adapter"), COMBINATIONS.values(), ids=COMBINATIONS
)


def adapt(base, seed=1, **adapter):
    torch.manual_seed(seed)
    return get_peft_model(base, LoraConfig(r=2, target_modules=TARGETS, **adapter))


def tokens(rows=8):
    random = torch.Generator().manual_seed(0)
    return torch.randint(0, 32, (rows, 4, 12), generator=random)


def logits(model):
    with torch.no_grad():
        return model(input_ids=tokens(1)[0]).logits


def train(model, optimizer, batches=None, after=lambda: None):
    for batch in tokens() if batches is None else batches:
        model(input_ids=batch, labels=batch).loss.backward()
        optimizer.step()
        after()
        optimizer.zero_grad()


def trained(base=dense, **adapter):
    """A model and its optimizer, which was given the frozen weights as well."""
    model = adapt(base(), **adapter)
    optimizer = EMAOptimizer(AdamW(model.parameters(), lr=0.05), DECAY)
    train(model, optimizer)
    return model, optimizer


def clones(model, trainable):
    named = model.named_parameters()
    return {n: p.detach().clone() for n, p in named if p.requires_grad == trainable}


def weights(model):
    """Of the trainable parameters."""
    return clones(model, True)


def base_weights(model):
    return [linear.weight.detach().clone() for _, _, linear in lora_layers(model)]


def lora_layers(model):
    for parent, name, layer in attention_layers(model.base_model.model):
        yield parent, name, getattr(layer, "base_layer", layer)


def trainer(model, folder, callbacks, **kwargs):
    arguments = {
        "max_steps": 8,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "save_steps": 4,
        "eval_steps": 4,
        "eval_strategy": "steps",
        "report_to": [],
        "use_cpu": True,
        "disable_tqdm": True,
    }
    args = TrainingArguments(output_dir=folder, **{**arguments, **kwargs})
    rows = [{"input_ids": row, "labels": row} for row in tokens().flatten(0, 1)]
    return Trainer(
        model=model, args=args, train_dataset=rows, eval_dataset=rows[:8], callbacks=callbacks
    )


@of_every_combination
def test_ema_takes_the_bytes_of_the_adapter_and_nothing_for_the_frozen_base(base, adapter):
    model, optimizer = trained(base, **adapter)
    trainable = [p for p in model.parameters() if p.requires_grad]
    emas = [entry["ema"] for entry in optimizer.state.values() if "ema" in entry]
    assert sum(ema.nbytes for ema in emas) == sum(4 * p.numel() for p in trainable)
    assert set(optimizer.get_ema_state(model)) == set(weights(model))
    assert set(optimizer.state) == set(trainable)


@of_every_combination
def test_ema_equals_the_float64_reference(base, adapter):
    model = adapt(base(), **adapter)
    optimizer = EMAOptimizer(AdamW(model.parameters(), lr=0.05), DECAY)
    reference = Reference([p for p in model.parameters() if p.requires_grad], DECAY)
    train(model, optimizer, after=reference.update)
    emas = list(map(wide, optimizer.get_ema_state(model).values()))
    torch.testing.assert_close(emas, reference.emas, rtol=1e-6, atol=1e-7)


@of_every_base
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_trajectory_equals_that_of_the_bare_optimizer(base, checkpointing):
    runs = []
    for wrap in (False, True):
        model = adapt(base())
        if checkpointing:
            model.base_model.model.activation_checkpointing_enable()
            model.enable_input_require_grads()
        optimizer = AdamW(model.parameters(), lr=0.05)
        train(model.train(), EMAOptimizer(optimizer, DECAY) if wrap else optimizer)
        runs.append(weights(model))
    assert same(*runs)


@of_every_base
def test_swap_changes_the_adapter_alone_and_comes_back(base):
    model, optimizer = trained(base)
    before, frozen, ema = weights(model), logits_without(model), optimizer.get_ema_state(model)
    outside = logits(model)
    with optimizer.swap_ema_weights():
        assert same(weights(model), ema)
        assert not torch.equal(logits(model), outside)
        assert torch.equal(logits_without(model), frozen)
    assert same(weights(model), before)
    assert torch.equal(logits(model), outside)


def logits_without(model):
    with model.disable_adapter():
        return logits(model)


@of_every_combination
def test_adapter_saved_inside_a_swap_loads_as_the_ema_adapter(base, adapter, tmp_path):
    model, optimizer = trained(base, **adapter)
    with optimizer.swap_ema_weights():
        model.save_pretrained(tmp_path)
        inside = logits(model.eval())  # bitsandbytes has another kernel for it
    loaded = PeftModel.from_pretrained(base(), tmp_path)
    assert torch.equal(logits(loaded), inside)
    ema = optimizer.get_ema_state(model)
    assert same({n: p.detach() for n, p in loaded.named_parameters() if n in ema}, ema)


@of_every_adapter
def test_ema_state_loads_into_another_model_by_name(adapter):
    model, optimizer = trained(**adapter)
    other = adapt(dense(), seed=2, **adapter)
    assert not other.load_state_dict(optimizer.get_ema_state(model), strict=False).unexpected_keys
    with optimizer.swap_ema_weights():
        assert torch.equal(logits(other), logits(model))


@of_every_base
def test_resumed_loop_equals_the_uninterrupted_one(base):
    model = adapt(base())
    optimizer = EMAOptimizer(AdamW(model.parameters(), lr=0.05), DECAY)
    train(model, optimizer, tokens()[:4])
    saved = copy.deepcopy([optimizer.state_dict(), weights(model)])
    train(model, optimizer, tokens()[4:])
    other = adapt(base(), seed=2)
    resumed = EMAOptimizer(AdamW(other.parameters(), lr=0.05), DECAY)
    resumed.load_state_dict(saved[0])
    other.load_state_dict(saved[1], strict=False)
    train(other, resumed, tokens()[4:])
    assert same(weights(other), weights(model))
    assert same(resumed.get_ema_state(other), optimizer.get_ema_state(model))


def test_adapter_activated_later_begins_an_ema_of_its_own_and_the_first_one_goes_on():
    model, optimizer = trained()
    rested = {n: p for n, p in model.named_parameters() if p.requires_grad}
    reference = Reference(rested.values(), DECAY)
    reference.emas = [optimizer.state[p]["ema"].double() for p in rested.values()]
    model.add_adapter("second", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("second")
    added = [p for p in model.parameters() if p.requires_grad]
    optimizer.add_param_group({"params": added})
    train(model, optimizer, tokens(2))
    both = optimizer.get_ema_state(model)
    reference.update()
    reference.update()
    for name, expected in zip(rested, reference.emas, strict=True):
        torch.testing.assert_close(both[name].double(), expected)
    assert {optimizer.state[p]["ema_step"].item() for p in added} == {2}


# Merging.


def test_merge_and_unmerge_inside_a_swap_leave_the_base_as_it_was():
    model, optimizer = trained()
    before = base_weights(model)
    with optimizer.swap_ema_weights():
        inside = logits(model)
        model.merge_adapter()
        torch.testing.assert_close(logits(model), inside, rtol=1e-5, atol=1e-5)
        model.unmerge_adapter()
    torch.testing.assert_close(base_weights(model), before, rtol=0, atol=1e-6)


def test_copy_merged_inside_a_swap_is_the_deployed_ema_model():
    model, optimizer = trained()
    before = base_weights(model)
    with optimizer.swap_ema_weights():
        inside = logits(model)
        deployed = copy.deepcopy(model).merge_and_unload()
    torch.testing.assert_close(logits(deployed), inside, rtol=1e-5, atol=1e-5)
    assert same(base_weights(model), before)


def test_danger_a_merge_inside_a_swap_that_is_undone_outside_moves_the_base_weights():
    # It adds the product of the EMA weights and takes off that of the training weights.
    model, optimizer = trained()
    layer = model.base_model.model.model.layers[0].self_attn.q_proj
    before = base_weights(model)[0]
    with optimizer.swap_ema_weights():
        of_ema = layer.get_delta_weight("default")
        model.merge_adapter()
    drift = of_ema - layer.get_delta_weight("default")
    model.unmerge_adapter()
    assert drift.abs().max() > 1e-3
    torch.testing.assert_close(base_weights(model)[0] - before, drift, rtol=0, atol=1e-6)


def test_danger_a_swap_of_a_merged_adapter_does_not_reach_the_forward():
    model, optimizer = trained()
    model.merge_adapter()
    outside = logits(model)
    with optimizer.swap_ema_weights():
        assert torch.equal(logits(model), outside)
    model.unmerge_adapter()


# The Trainer.


@pytest.mark.parametrize("base", [dense, torchao_nf4])
@pytest.mark.parametrize("checkpointing", [False, True], ids=["plain", "gradient-checkpointing"])
def test_trainer_trajectory_equals_the_one_without_the_callback(base, checkpointing, tmp_path):
    runs = []
    for callbacks in ([], [EMACallback(DECAY)]):
        model = adapt(base())
        trainer(model, tmp_path, callbacks, activation_checkpointing=checkpointing).train()
        runs.append(weights(model))
    assert same(*runs)


@pytest.mark.parametrize(
    ("base", "adapter"), [*((dense, adapter) for adapter in ADAPTERS.values()), (torchao_nf4, {})]
)
def test_trainer_checkpoint_holds_the_ema_adapter_beside_the_training_adapter(
    base, adapter, tmp_path
):
    model, callback = adapt(base(), **adapter), EMACallback(DECAY)
    trainer(model, tmp_path, [callback]).train()
    ema = callback.get_ema_state()
    for folder, expected in (("checkpoint-8", weights(model)), ("checkpoint-8/ema/adapter", ema)):
        loaded = PeftModel.from_pretrained(base(), tmp_path / folder)
        assert same({n: p.detach() for n, p in loaded.named_parameters() if n in ema}, expected)
    assert set(ema) == set(weights(model))


@of_every_adapter
def test_trainer_resume_equals_the_uninterrupted_run(adapter, tmp_path):
    whole, first = adapt(dense(), **adapter), EMACallback(DECAY)
    trainer(whole, tmp_path, [first]).train()
    resumed, second = adapt(dense(), seed=2, **adapter), EMACallback(DECAY)
    run = trainer(resumed, tmp_path, [second])
    run.train(resume_from_checkpoint=os.path.join(tmp_path, "checkpoint-4"))
    assert same(weights(resumed), weights(whole))
    assert same(second.get_ema_state(), first.get_ema_state())
    assert list(resumed.peft_config) == ["default"]  # the EMA folder is no adapter of the model


@pytest.mark.parametrize("save_only_model", [False, True])
@of_every_adapter
def test_trainer_ends_with_the_ema_adapter_of_the_best_checkpoint(
    adapter, save_only_model, tmp_path
):
    model = adapt(dense(), **adapter)
    best = {"load_best_model_at_end": True, "save_only_model": save_only_model}
    run = trainer(model, tmp_path, [EMACallback(DECAY)], **best)
    run.train()
    folder = os.path.join(run.state.best_model_checkpoint, "ema", "adapter")
    loaded = PeftModel.from_pretrained(dense(), folder)
    assert torch.equal(logits(loaded), logits(model.eval()))


def test_trainer_evaluates_the_ema_adapter_and_the_callback_exports_it(tmp_path):
    model, callback = adapt(dense()), EMACallback(DECAY)
    run = trainer(model, tmp_path, [callback])
    run.train()
    training = weights(model)
    evaluated = run.evaluate()["eval_loss"]
    assert same(weights(model), training)
    callback.apply_ema(model)
    model.save_pretrained(tmp_path / "best")
    callback.restore_original(model)
    assert same(weights(model), training)
    loaded = PeftModel.from_pretrained(dense(), tmp_path / "best")
    assert trainer(loaded, tmp_path, []).evaluate()["eval_loss"] == evaluated


def test_merge_left_at_the_end_of_use_ema_is_undone_and_raises():
    model = adapt(dense())
    ema = EMAModel(model, DECAY)
    for _ in range(3):
        with torch.no_grad():
            [p.add_(torch.randn_like(p)) for p in model.parameters() if p.requires_grad]
        ema.update()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(RuntimeError, match="it was undone"), ema.use_ema():
        model.merge_adapter()
    for name, tensor in model.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-5, atol=1e-5)


def test_use_ema_of_a_merged_adapter_raises():
    model = adapt(dense())
    ema = EMAModel(model, DECAY)
    model.merge_adapter()
    with pytest.raises(RuntimeError, match="unmerge_adapter"), ema.use_ema():
        pass


@pytest.mark.parametrize("save_only_model", [False, True])
def test_trainer_ends_with_the_best_of_an_adapter_by_another_name(save_only_model, tmp_path):
    model = adapt(dense())
    torch.manual_seed(7)
    model.add_adapter("b", LoraConfig(r=2, target_modules=TARGETS))
    model.set_adapter("b")
    best = {"load_best_model_at_end": True, "save_only_model": save_only_model}
    run = trainer(model, tmp_path, [EMACallback(DECAY)], **best)
    run.train()
    folder = os.path.join(run.state.best_model_checkpoint, "ema", "adapter", "b")
    loaded = PeftModel.from_pretrained(dense(), folder)
    assert torch.equal(logits(loaded), logits(model.eval()))
