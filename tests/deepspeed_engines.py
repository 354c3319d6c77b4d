"""Real DeepSpeed engines on CPU ranks, in processes of their own: ``@on_engines(*rows)``."""

import functools
import importlib.util
import inspect
import logging
import os
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from ranks import Pool

from ema_optim._warnings import EMAWarning

DECAY = 0.9
LR = 0.05
NEEDS = pytest.mark.skipif(
    importlib.util.find_spec("deepspeed") is None,
    reason="DeepSpeed is built where torch is installed: .ci/run, or pip install "
    "--no-build-isolation deepspeed",
)

FP32, BF16 = {}, {"bf16": {"enabled": True}}
# stage and precision: ranks, what the config has beside the stage, what zero_optimization has
ROWS = {
    "0 fp32": (2, FP32, {}),
    "0 bf16": (2, BF16, {}),
    "1 fp32": (2, FP32, {}),
    "1 bf16": (2, {**BF16, "data_types": {"grad_accum_dtype": "fp32"}}, {}),
    "2 bf16": (2, {**BF16, "gradient_accumulation_steps": 2, "gradient_clipping": 0.5}, {}),
    "2 fp32": (2, FP32, {"offload_optimizer": {"device": "cpu"}}),
    "3 fp32": (2, FP32, {"sub_group_size": 20, "stage3_param_persistence_threshold": 0}),
    "3 bf16": (2, BF16, {"stage3_param_persistence_threshold": 20}),
    "1 bf16, one rank": (1, BF16, {}),
    "2 fp32, one rank": (1, FP32, {}),
    "3 bf16, one rank": (1, {**BF16, "gradient_accumulation_steps": 2}, {}),
}
SHARDED = [row for row in ROWS if not row.startswith("0")]


@functools.cache
def pool(world):
    """One for all files; its processes end with this one, as daemons do."""
    return Pool(world)


def on_engines(*rows):
    """Run the body of a test on the ranks of each row."""

    def decorate(body):
        @functools.wraps(body)
        def test(row, tmp_path, **arguments):
            arguments.update({"row": row, "folder": str(tmp_path)})
            named = {k: v for k, v in arguments.items() if k in inspect.signature(body).parameters}
            if failures := pool(ROWS[row][0]).attempt(body, named):
                pytest.fail("\n".join(failures), pytrace=False)

        own = inspect.signature(body).parameters.values()
        own = [p for p in own if p.name not in ("row", "folder")]
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        first = [inspect.Parameter(name, kind) for name in ("row", "tmp_path")]
        test.__signature__ = inspect.Signature([*first, *own])
        test.body = body
        return NEEDS(pytest.mark.parametrize("row", rows)(test))

    return decorate


@functools.cache
def deepspeed():
    """The package, imported on a rank, without the kernel that it would compile for gloo."""
    os.environ["DS_ACCELERATOR"] = "cpu"
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("error", category=EMAWarning)
    short = "the EMA (will )?still hold|the model files hold"  # short runs
    warnings.filterwarnings("ignore", short, category=EMAWarning)
    import deepspeed

    sys.modules["deepspeed.comm.torch"].build_shm_op = lambda: None
    logging.disable(logging.ERROR)
    return deepspeed


def plain_model():
    torch.manual_seed(0)
    layers = torch.nn.Linear(4, 7), torch.nn.Tanh(), torch.nn.Linear(7, 3)
    return torch.nn.Sequential(*layers)


def groups_of(model, **options):
    """The two groups that trainers make: with and without weight decay."""
    weights = [p for p in model.parameters() if p.ndim > 1]
    biases = [p for p in model.parameters() if p.ndim == 1]
    return [{"params": weights}, {"params": biases, "weight_decay": 0.0, **options}]


def config_of(row, **zero):
    _, config, own = ROWS[row]
    optimization = {"stage": int(row[0]), **own, **zero}
    return {
        "train_micro_batch_size_per_gpu": 2,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": optimization,
        **config,
    }


def engine_of(row, wrap=lambda optimizer: optimizer, options=None, config=None, **zero):
    """An engine of a small model, the same on every rank and in every run."""
    model = plain_model()
    optimizer = wrap(torch.optim.AdamW(groups_of(model, **(options or {})), lr=LR))
    whole = {**config_of(row, **zero), **(config or {})}
    return deepspeed().initialize(model=model, optimizer=optimizer, config=whole)[0]


def ema_engine(row, decay=DECAY, **options):
    from ema_optim.integrations.deepspeed import EMAEngine

    engine = engine_of(row)
    return engine, EMAEngine(engine, decay, **options)


def train(engine, steps, after=lambda: None):
    """So many optimizer steps; ``after`` is called after each."""
    for number in range(engine.global_steps, engine.global_steps + steps):
        for micro in range(engine.gradient_accumulation_steps()):
            generator = torch.Generator().manual_seed(100 * number + 10 * micro + dist.get_rank())
            engine.backward(forward(engine, torch.randn(2, 4, generator=generator)).square().mean())
            engine.step()
        after()
    return engine


def forward(model, inputs=None):
    inputs = torch.linspace(-1, 1, 8).view(2, 4) if inputs is None else inputs
    dtype = next(model.parameters()).dtype
    return model(inputs.to(dtype)).float()


def shown(model):
    """What the forward gives, as a number that can be compared later."""
    with torch.no_grad():
        return forward(model).clone()


def masters(engine):
    """The fp32 masters by name, whole."""
    from ema_optim.integrations._deepspeed import masters_of

    source = masters_of(engine.optimizer)
    held = [param for group in source.params() for param in group]
    named = {id(param): name for name, param in engine.module.named_parameters()}
    return {named[id(param)]: source.read(param) for param in held}


def whole_state(ema):
    """The EMA by name, on every rank."""
    return ema.ema_state(everywhere=True)


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)


def everywhere(folder):
    """The first rank's folder: a test's is one for all ranks."""
    dist.barrier()
    return folder
