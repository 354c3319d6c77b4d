"""Parameters that an engine has replaced by tensors of its own, behind the optimizer's back.

DeepSpeed's ZeRO puts flat fp32 masters, or one partition of them, into the param groups of the
optimizer that it was given, and so do its fp16 wrappers; the model's own parameters are copies of
these from then on. A swap of the masters does not reach the model.
"""

from collections.abc import Iterable, Mapping

from torch import Tensor, nn


def kinds_of(params: Iterable[Tensor]) -> dict[int, bool]:
    """By id, whether each is an ``nn.Parameter``; no tensor is kept alive by it."""
    return {id(param): isinstance(param, nn.Parameter) for param in params}


def refuse_replaced(known: Mapping[int, bool], params: Iterable[Tensor]) -> None:
    """Raise RuntimeError where an engine has taken the model's parameters out of the groups.

    Known by the kind: models hold ``nn.Parameter``, masters are plain tensors. Parameters that
    give way to other parameters (FSDP2, pruning), and tensors that are added beside them, pass.

    Args:
        known: ``kinds_of`` all that was in the param groups before.
        params: What is there now.
    """
    now = kinds_of(params)
    if all(id in now for id, was_parameter in known.items() if was_parameter):
        return
    for tensor in params:
        if id(tensor) not in known and not isinstance(tensor, nn.Parameter):
            raise RuntimeError(
                "param_groups must hold the model's parameters, an engine (DeepSpeed?) has put a "
                f"plain tensor of shape {tuple(tensor.shape)} in their place: a swap would not "
                "reach the model. "
                "Give DeepSpeed the inner optimizer without EMAOptimizer, and attach "
                "ema_optim.integrations.deepspeed.EMAEngine(engine, decay) after initialize"
            )
