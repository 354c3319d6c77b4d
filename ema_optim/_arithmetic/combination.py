"""A combination of averages of the same weights."""

from collections.abc import Sequence

import torch
from torch import Tensor


def combined(values: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """Return ``sum(coefficients * values)`` of coefficients that sum to 1, in fp32 at least.

    Computed as ``values[0] + sum(coefficients[1:] * (values[1:] - values[0]))``: averages of
    weights that have not moved give exactly these.

    Args:
        values: Averages, of one shape, dtype and device.
        coefficients: One for each.
    """
    dtype = torch.promote_types(values[0].dtype, torch.float32)
    first, *others = (value.to(dtype) for value in values)
    total = first.clone()
    for value, coefficient in zip(others, coefficients[1:], strict=True):
        total.add_(value - first, alpha=coefficient)
    return total
