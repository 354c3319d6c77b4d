"""What of DeepSpeed is refused, before anything is attached."""

from typing import Any

from deepspeed.runtime.engine import DeepSpeedEngine
from deepspeed.runtime.pipe.engine import PipelineEngine
from torch.optim import Optimizer

from ..optimizer import EMAOptimizer


def check_engine(engine: Any) -> None:
    """Raise TypeError, ValueError or RuntimeError for an engine whose EMA cannot be kept."""
    if not isinstance(engine, DeepSpeedEngine):
        raise TypeError(
            f"engine must be a DeepSpeedEngine, got {type(engine)}: pass what "
            "deepspeed.initialize has returned first, and Accelerate's prepare() of the model"
        )
    if isinstance(engine, PipelineEngine):
        raise TypeError("engine must hold the whole model, got a PipelineEngine: use ZeRO alone")
    base = getattr(engine.optimizer, "optimizer", engine.optimizer)
    if isinstance(base, EMAOptimizer) or not isinstance(base, Optimizer):
        raise TypeError(
            f"engine must have a torch optimizer, got {type(base)}: pass the inner optimizer to "
            "deepspeed.initialize, without EMAOptimizer"
        )
    for name, (refused, remedy) in _configurations(engine).items():
        if refused:
            raise ValueError(f"EMAEngine must have the fp32 masters at hand, got {name}: {remedy}")
    if attached(engine.optimizer) is not None:
        raise RuntimeError("the engine has an EMAEngine already: use that one")


def _configurations(engine: Any) -> dict[str, tuple[bool, str]]:
    zero = engine.optimizer
    kind = type(zero).__name__
    disk = engine.zero_nvme_offload_optimizer() or getattr(zero, "swap_optimizer", False)
    param = engine.zero_offload_param()
    disk_params = param is not None and getattr(param.device, "value", param.device) == "nvme"
    narrow = engine.bf16_master_weights_and_gradients(), engine.fp16_master_weights_and_gradients()
    return {
        "NVMe offload": (bool(disk or disk_params), "offload to the CPU"),
        "ZenFlow": (bool(getattr(engine, "zenflow", False)), "leave 'zenflow' out"),
        "SuperOffload": (
            bool(engine.super_offload()) or kind.startswith("SuperOffload"),
            "leave 'super_offload' out",
        ),
        "masters in 16 bits": (any(narrow), "leave '*_master_weights_and_grads' out"),
        "elastic_checkpoint": (bool(engine.zero_elastic_checkpoint()), "set it to false"),
    }


def refuse_by_name(engine: Any) -> None:
    """Raise RuntimeError where DeepSpeed hands out the masters of other parameters."""
    if engine.zero_optimization_stage() in (1, 2) and engine.zero_round_robin_gradients():
        raise RuntimeError(
            "the EMA by name under round_robin_gradients: DeepSpeed hands out the fp32 weights of "
            "other parameters there. Set it to false; swap_ema_weights() is right in any case"
        )


def attached(zero: Any) -> Any:
    """The ``EMAEngine`` that is attached to an engine's optimizer, or None."""
    return getattr(getattr(zero, "step", None), "ema_engine", None)
