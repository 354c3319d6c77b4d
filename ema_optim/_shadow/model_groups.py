"""A model in the form of param groups, for a shadow set without an optimizer."""

from collections.abc import Mapping

from torch import Tensor, nn

from .buffers import AveragedBuffers, Wanted, temporary_buffers
from .names import named_parameters, unique
from .shadow_set import ShadowSet
from .slots import Group


class ModelGroups:
    """The parameters of a model and its averaged buffers, as they were when last looked at.

    The model is walked anew at every public call: a module that was replaced must not leave the
    EMA behind on it.
    """

    def __init__(self, model: nn.Module, use_buffers: Wanted) -> None:
        self.model = model
        self.buffers = AveragedBuffers(use_buffers)
        self.param_groups: list[Group] = []

    def look(self, shadow: ShadowSet, anew: bool = False) -> None:
        """Walk the model; ``anew`` as ``AveragedBuffers.find`` takes it."""
        params = self._params()
        groups: list[Group] = [{"params": list(params), "param_names": list(params.values())}]
        if buffers := unique(self.buffers.find(self.model, shadow, anew)):
            groups.append(_buffer_group(buffers))
        self.param_groups = groups

    def _params(self) -> dict[Tensor, str]:
        return unique(named_parameters(self.model))

    def leave_temporary(self) -> None:
        """Leave out the buffers that no state dict of the model holds, until the next look."""
        temporary = temporary_buffers(self.model)
        params, *buffers = self.param_groups
        self.param_groups = [params]
        for group in buffers:
            pairs = zip(group["params"], group["param_names"], strict=True)
            if lasting := {b: name for b, name in pairs if b not in temporary}:
                self.param_groups.append(_buffer_group(lasting))


class BufferGroups(ModelGroups):
    """The averaged buffers of a model alone, for one whose parameters have their EMA elsewhere."""

    def _params(self) -> dict[Tensor, str]:
        return {}


def _buffer_group(buffers: Mapping[Tensor, str]) -> Group:
    names = list(buffers.values())
    return {"params": list(buffers), "param_names": names, "ema_buffers": True}
