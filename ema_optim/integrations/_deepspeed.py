"""Where DeepSpeed keeps the fp32 masters of a model, and how they get into the forward.

    kind      optimizer of the engine          masters, by param group
    --------  -------------------------------  -----------------------------------------------
    Whole     the user's own (stage 0, fp32)   the model's parameters
    Copies    FP16_UnfusedOptimizer (stage 0)  a copy of each parameter
    Joined    FP16_Optimizer (stage 0)         one flat tensor
    Stage12   DeepSpeedZeroOptimizer           this rank's part of one flat tensor
    BF16      BF16_Optimizer (stage 1)         this rank's part of one flat tensor
    Stage3    DeepSpeedZeroOptimizer_Stage3    this rank's part of each sub-group

These are attributes of DeepSpeed 0.19 that no public call gives. What reads and writes a parameter
by name is public (``deepspeed.utils.safe_*``), and so is ``update_lp_params()``.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from deepspeed.utils import (
    safe_get_full_fp32_param,
    safe_set_full_fp32_param,
    safe_set_local_fp32_param,
)
from torch import Tensor

from .._checkpoint.layout import options_of
from .._shadow.slots import Group


class Masters:
    """The fp32 masters of an engine in the form of param groups, for a shadow set.

    Attributes:
        zero: The engine's optimizer.
        base: The torch optimizer inside; it steps the masters.
    """

    has_ema_copies = True  # the forward uses copies, which ``publish`` makes
    masters = ""  # the attribute of ``zero`` that holds the masters
    weights = ""  # the one that holds the model's parameters, by param group

    def __init__(self, zero: Any) -> None:
        self.zero, self.base = zero, getattr(zero, "optimizer", zero)
        self._publishes = True

    @property
    def state(self) -> Any:
        """The state of the torch optimizer."""
        return self.base.state

    @property
    def param_groups(self) -> list[Group]:
        """The param groups over the masters; ZeRO empties the torch optimizer's own."""
        pairs = zip(self.base.param_groups, self.tensors(), strict=True)
        return [
            {**options_of(group), "lr": group.get("lr"), "params": list(tensors)}
            for group, tensors in pairs
        ]

    def tensors(self) -> list[Sequence[Tensor]]:
        """The masters of this rank, by param group."""
        return [[flat] for flat in getattr(self.zero, self.masters)]

    def params(self) -> list[list[Tensor]]:
        """The model's parameters, by param group."""
        return [list(group) for group in getattr(self.zero, self.weights)]

    def was_skipped(self) -> bool:
        """Whether the step that was just made has moved nothing, for want of finite gradients."""
        return bool(getattr(self.zero, "overflow", False))

    def publish(self) -> None:
        """Have the forward use what the masters hold now; every rank calls it."""
        if self._publishes:
            with torch.no_grad():
                self._publish()

    @contextmanager
    def unpublished(self) -> Iterator[None]:
        """Let the forward use what it does, whatever happens to the masters inside."""
        self._publishes = False
        try:
            yield
        finally:
            self._publishes = True

    def clear_padding(self) -> None:
        """Zero what is in the masters beside the weights, where DeepSpeed leaves it as it was."""

    def read(self, param: Tensor) -> Tensor:
        """What the masters hold of a parameter, whole on every rank; every rank calls it."""
        whole = safe_get_full_fp32_param(param)
        if whole is None:
            raise RuntimeError(
                f"DeepSpeed knows no fp32 master of a parameter of {shape_of(param)}"
            )
        return whole.reshape(shape_of(param))  # type: ignore[no-any-return]

    def write(self, param: Tensor, value: Tensor) -> None:
        """Have the masters hold ``value`` of a parameter; every rank its own part."""
        safe_set_full_fp32_param(param, value.float())

    def sum_over_ranks(self, numbers: Tensor) -> Tensor:
        """Add up what each rank has computed of its own masters; every rank calls it."""
        torch.distributed.all_reduce(numbers, group=self.zero.dp_process_group)
        return numbers

    def _publish(self) -> None:
        self.zero.update_lp_params()


class Stage12(Masters):
    """ZeRO 1 and 2."""

    masters, weights = "single_partition_of_fp32_groups", "bit16_groups"


class BF16(Masters):
    """ZeRO 1 with gradients accumulated in fp32."""

    masters, weights = "fp32_groups_flat_partition", "bf16_groups"


class Stage3(Masters):
    """ZeRO 3."""

    def __init__(self, zero: Any) -> None:
        super().__init__(zero)
        self._padding: tuple[list[int], list[Tensor]] = [], []

    def clear_padding(self) -> None:
        # What is behind the last element of a parameter was never written. It may be NaN, and the
        # distance from the weights or a warning would tell of it.
        flats = self.zero.fp32_partitioned_groups_flat
        if (places := [flat.data_ptr() for flat in flats]) != self._padding[0]:
            self._padding = places, list(self._padded(flats))
        if self._padding[1]:
            torch._foreach_zero_(self._padding[1])

    def _padded(self, flats: Sequence[Tensor]) -> Iterator[Tensor]:
        for params, flat in zip(self.zero.fp16_groups, flats, strict=True):
            first = 0
            for param in params:
                size, rank = param.ds_tensor.numel(), _rank_of(param)
                filled = min(max(param.ds_numel - rank * size, 0), size)
                if filled < size:
                    yield flat.detach()[first + filled : first + size]
                first += size

    def tensors(self) -> list[Sequence[Tensor]]:
        return self._by_group(self.zero.fp32_partitioned_groups_flat)

    def params(self) -> list[list[Tensor]]:
        groups = self._by_group(self.zero.fp16_groups)
        return [[param for sub_group in group for param in sub_group] for group in groups]

    def write(self, param: Any, value: Tensor) -> None:
        # DeepSpeed's setter of whole values raises where the elements do not divide by the ranks,
        # on one of them: the others would wait for it in the next collective.
        size, rank = param.ds_tensor.numel(), _rank_of(param)
        ranks = torch.distributed.get_world_size(param.ds_process_group)
        flat = torch.nn.functional.pad(value.float().flatten(), (0, size * ranks - value.numel()))
        safe_set_local_fp32_param(param, flat[rank * size : (rank + 1) * size])

    def _publish(self) -> None:
        zero = self.zero
        zero.empty_partition_cache()  # or the next forward would use weights gathered before
        flats = zip(
            zero.fp16_partitioned_groups_flat, zero.fp32_partitioned_groups_flat, strict=True
        )
        for low, high in flats:
            low.copy_(high)
        if zero.persistent_parameters:
            zero.persistent_parameters[0].all_gather(zero.persistent_parameters)
        zero.invalidate_secondary_tensor()

    def _by_group(self, sub_groups: Sequence[Any]) -> list[Any]:
        found: list[Any] = [[] for _ in self.base.param_groups]
        for number, sub_group in enumerate(sub_groups):
            found[self.zero.sub_group_to_group_id[number]].append(sub_group)
        return found


class Whole(Masters):
    """No wrapper: the model's parameters are their own masters, the same on every rank."""

    def tensors(self) -> list[Sequence[Tensor]]:
        return [group["params"] for group in self.base.param_groups]

    def params(self) -> list[list[Tensor]]:
        return [list(group["params"]) for group in self.base.param_groups]

    def read(self, param: Tensor) -> Tensor:
        return self._master(param).detach().clone()

    def write(self, param: Tensor, value: Tensor) -> None:
        self._master(param).detach().copy_(value)

    def sum_over_ranks(self, numbers: Tensor) -> Tensor:
        return numbers

    def _publish(self) -> None:
        pass

    def _master(self, param: Tensor) -> Tensor:
        return param


class Copies(Whole):
    """Stage 0 with a copy of each parameter."""

    def tensors(self) -> list[Sequence[Tensor]]:
        return list(self.zero.fp32_groups)

    def params(self) -> list[list[Tensor]]:
        return [list(group) for group in self.zero.fp16_groups]

    def _publish(self) -> None:
        for param in (param for group in self.params() for param in group):
            param.detach().copy_(self._master(param))

    def _master(self, param: Tensor) -> Tensor:
        groups = zip(self.params(), self.tensors(), strict=True)
        pairs = (pair for group in groups for pair in zip(*group, strict=True))
        return next(master for own, master in pairs if own is param)


class Joined(Copies):
    """Stage 0 with one flat master for each param group."""

    def tensors(self) -> list[Sequence[Tensor]]:
        return [[flat] for flat in self.zero.fp32_groups_flat]

    def _master(self, param: Tensor) -> Tensor:
        for params, (flat,) in zip(self.params(), self.tensors(), strict=True):
            first = 0
            for own in params:
                if own is param:
                    return flat.detach()[first : first + own.numel()].view(own.shape)
                first += own.numel()
        raise KeyError("the parameter is not the optimizer's")


_KINDS: dict[str, type[Masters]] = {
    "fp32_partitioned_groups_flat": Stage3,
    "single_partition_of_fp32_groups": Stage12,
    "fp32_groups_flat_partition": BF16,
    "fp32_groups_flat": Joined,
    "fp32_groups": Copies,
}


def masters_of(zero: Any) -> Masters:
    """The masters of an engine's optimizer."""
    for attribute, kind in _KINDS.items():
        if hasattr(zero, attribute):
            return kind(zero)
    if isinstance(zero, torch.optim.Optimizer):
        return Whole(zero)
    raise TypeError(
        f"engine must have an optimizer whose fp32 masters are known, got {type(zero)}: use "
        "DeepSpeed 0.19, ZeRO stage 0, 1, 2 or 3"
    )


def _rank_of(param: Any) -> int:
    return torch.distributed.get_rank(param.ds_process_group)


def shape_of(param: Any) -> torch.Size:
    """The shape of a parameter as the model's author knows it; ZeRO 3 keeps an empty tensor."""
    return torch.Size(getattr(param, "ds_shape", param.shape))
