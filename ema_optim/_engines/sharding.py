"""Weights that are spread over processes (DTensor), and the FSDP2 modules that own them.

The EMA is elementwise: every rank averages its own part, without communication. This leaf holds
all that the package knows of it, and imports nothing of torch's until a DTensor exists.
"""

import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

_DTENSOR = "torch.distributed.tensor"
# Tensors of these types are neither sharded nor quantized; nearly all are.
PLAIN = frozenset({Tensor, nn.Parameter})

# A device mesh, and for each of its dimensions whether tensors are split over it (else copied).
Spread = tuple[Any, tuple[bool, ...]] | None


def is_sharded(tensor: object) -> bool:
    """Whether a tensor is a DTensor."""
    if type(tensor) in PLAIN:
        return False
    # Whoever made a DTensor has imported the module.
    module = sys.modules.get(_DTENSOR)
    return module is not None and isinstance(tensor, module.DTensor)


def local(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, as a plain tensor of the same memory."""
    if type(tensor) in PLAIN:
        return tensor
    # Not to_local(): of a parameter it makes a new Parameter at every call.
    return tensor._local_tensor.detach() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


def locals_of(tensors: Iterable[Tensor]) -> list[Tensor]:
    """``local`` of each."""
    tensors = list(tensors)
    return tensors if PLAIN.issuperset(map(type, tensors)) else list(map(local, tensors))


def local_parts(tensors: Sequence[Any]) -> list[Tensor]:
    """The local parts of DTensors alone, at the price of one attribute each.

    To be read anew at every use: FSDP2 may replace them at the first forward.
    """
    return [tensor._local_tensor for tensor in tensors]


def part_for(param: Tensor, value: Tensor) -> Tensor:
    """The part of ``value``, whole or spread like ``param``, that this rank keeps for ``param``."""
    if type(param) in PLAIN or not is_sharded(param) or is_sharded(value):
        return local(value)
    from torch.distributed.tensor import distribute_tensor

    mesh, placements = _layout(param)
    # None: every rank has the whole value, so that nothing needs to be sent.
    return local(distribute_tensor(value, mesh, placements, src_data_rank=None))


def copy_part_(target: Tensor, value: Tensor, param: Tensor) -> None:
    """Copy the part of ``value`` that this rank keeps for ``param`` into that of ``target``."""
    if type(param) in PLAIN:
        target.copy_(value)
    else:
        local(target).copy_(part_for(param, value))


def with_part(param: Tensor, part: Tensor) -> Tensor:
    """A tensor spread like ``param``, of which this rank holds ``part``, on whatever device."""
    if not is_sharded(param):
        return part
    made: Any = torch.empty_like(param, dtype=part.dtype, device=part.device, requires_grad=False)
    made._local_tensor = part  # from_local() would move it to the device of the mesh
    return made  # type: ignore[no-any-return]


def whole_on_first_rank(named: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Whole tensors on the CPU, gathered one at a time; of DTensors, on the first rank alone."""
    whole = {}
    for name, tensor in named.items():
        value = tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]
        if not is_sharded(tensor) or torch.distributed.get_rank() == 0:
            whole[name] = value.cpu()
    return whole


def is_first_rank() -> bool:
    """Whether this process is the one that writes files, among those of one training."""
    there = torch.distributed.is_available() and torch.distributed.is_initialized()
    return not there or torch.distributed.get_rank() == 0


def raise_together(error: Exception | None, spread: bool) -> None:
    """Raise what has failed on the first rank, on every rank where weights are spread over them.

    Args:
        error: What has failed here; None for nothing.
        spread: Whether other ranks wait for the answer: all of them call this then.

    Raises:
        RuntimeError: On the other ranks.
    """
    told = [None if error is None else f"{type(error).__name__}: {error}"]
    if spread:
        torch.distributed.broadcast_object_list(told, src=0)
    if error is not None:
        raise error
    if told[0] is not None:
        raise RuntimeError(f"the first rank could not write: {told[0]}")


def first_element(param: Tensor) -> int:
    """Where this rank's part begins, when the elements of the whole tensor are numbered through."""
    if not is_sharded(param):
        return 0
    from torch.distributed.tensor._utils import compute_local_shape_and_global_offset

    mesh, placements = _layout(param)
    _, offsets = compute_local_shape_and_global_offset(param.shape, mesh, placements)
    first, row = 0, 1
    for offset, size in zip(reversed(offsets), reversed(param.shape), strict=True):
        first += offset * row
        row *= size
    return first


def check_layout(what: str, value: Tensor, param: Tensor) -> None:
    """Raise ValueError for a DTensor that is spread in another way than its parameter."""
    if type(value) in PLAIN or not is_sharded(value):
        return
    if not is_sharded(param):
        raise ValueError(
            f"{what} must be a plain tensor like its parameter, got a DTensor: pass "
            "value.full_tensor()"
        )
    if _layout(value) != _layout(param):
        raise ValueError(
            f"{what} must lie on its parameter's mesh with its placements {_layout(param)}, got "
            f"{_layout(value)}: pass value.full_tensor() on every rank, or load through "
            "torch.distributed.checkpoint"
        )


def refuse_flat(params: Iterable[Tensor]) -> None:
    """Raise TypeError for the parameters of FSDP1.

    Its gathered weights cannot be given back by any public call, so that a forward after a swap
    would go on with the weights of before.
    """
    if any(getattr(param, "_fsdp_flattened", False) for param in params):
        raise TypeError(
            "parameters must not be flat ones of FSDP1 (FullyShardedDataParallel): shard the model "
            "with FSDP2, torch.distributed.fsdp.fully_shard, before the optimizer is built"
        )


def reshard(params: Iterable[Tensor], module: nn.Module | None = None) -> None:
    """Have FSDP2 give back the weights that it has gathered from ``params``.

    A forward would use them as they are, and ``named_parameters()`` show them in place of the
    parameters: the root stays gathered after every forward without a backward, and every module
    with ``reshard_after_forward=False``.

    Args:
        params: Parameters of an optimizer.
        module: A module that holds the FSDP2 modules which own them; None to look for those.

    Raises:
        RuntimeError: They are not found, because this torch keeps them elsewhere.
    """
    wanted = {id(p) for p in params if type(p) not in PLAIN and is_sharded(p)}
    if not wanted:
        return
    for owner in _owners(wanted) if module is None else fsdp_modules(module):
        _give_back(owner)


def reshard_model(model: nn.Module) -> None:
    """Have the FSDP2 modules in ``model`` give their gathered weights back."""
    for owner in fsdp_modules(model):
        _give_back(owner)


def fsdp_modules(model: nn.Module) -> list[Any]:
    """The modules of ``model`` that ``fully_shard`` was applied to."""
    if _DTENSOR not in sys.modules or "torch.distributed.fsdp" not in sys.modules:
        return []
    from torch.distributed.fsdp import FSDPModule

    return [module for module in model.modules() if isinstance(module, FSDPModule)]


def by_spread(params: Iterable[Tensor]) -> dict[Spread, list[Tensor]]:
    """Parameters by the ranks that their parts are spread over; None for plain tensors."""
    groups: dict[Spread, list[Tensor]] = {}
    for param in params:
        groups.setdefault(None if type(param) in PLAIN else _spread(param), []).append(param)
    return groups


def sum_over_ranks(numbers: Tensor, spread: Spread) -> Tensor:
    """Add up what each rank has computed of its own part; every rank of the mesh calls it.

    Args:
        numbers: A 1-D tensor.
        spread: A key of ``by_spread``.
    """
    if spread is None:
        return numbers
    from torch.distributed.tensor import DTensor, Partial, Replicate

    numbers = numbers.to(spread[0].device_type)  # that of tensors in host memory may not be
    # Over a mesh dimension that holds copies the numbers are the same on every rank.
    placements = [Partial() if split else Replicate() for split in spread[1]]
    return DTensor.from_local(numbers, spread[0], placements, run_check=False).full_tensor()


def holds_on_all_ranks(params: Iterable[Tensor], fact: bool) -> bool:
    """Whether ``fact`` holds on every rank that has a part of ``params``."""
    for spread, members in by_spread(params).items():
        doubts = torch.tensor([float(not fact)], device=local(members[0]).device)
        if bool(sum_over_ranks(doubts, spread)):
            return False
    return fact


def _layout(tensor: Any) -> tuple[Any, tuple[Any, ...]]:
    return tensor.device_mesh, tuple(tensor.placements)


def _spread(tensor: Any) -> Spread:
    if not is_sharded(tensor):
        return None
    return tensor.device_mesh, tuple(placement.is_shard() for placement in tensor.placements)


def _owners(wanted: set[int]) -> list[Any]:
    try:
        from torch.distributed._composable_state import _module_state_mapping
        from torch.distributed.fsdp import FSDPModule

        modules = [m for m in list(_module_state_mapping) if isinstance(m, FSDPModule)]
        return [m for m in modules if not wanted.isdisjoint(map(id, _sharded_params(m)))]
    except (ImportError, AttributeError) as error:
        raise RuntimeError(
            "the FSDP2 modules that own the parameters must be known, and this torch does not tell "
            "them: pass the model, EMAOptimizer(..., module=model)"
        ) from error


def _sharded_params(module: Any) -> Iterator[Tensor]:
    for group in _param_groups(module):
        yield from (param.sharded_param for param in group.fsdp_params)


def _param_groups(module: Any) -> list[Any]:
    state = module._get_fsdp_state()
    if hasattr(state, "_fsdp_param_groups"):
        return list(state._fsdp_param_groups)
    one = state._fsdp_param_group  # before torch 2.12
    return [] if one is None else [one]


def _give_back(module: Any) -> None:
    # A gather that is under way (a prefetch, unshard(async_op=True)) would come with the old
    # weights after all: unshard() ends it.
    if _may_be_gathering(module):
        module.unshard()
    module.reshard()


def _may_be_gathering(module: Any) -> bool:
    try:
        groups = _param_groups(module)
        return any(group._all_gather_result is not None for group in groups)
    except AttributeError:  # another torch: unshard() is right in any case, and dearer
        return True
