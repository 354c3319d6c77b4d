"""One average as a combination of others, and how far off it will be: numbers only.

``lag(s) = decay(s) * ... * decay(t)`` is the share of the update made at step ``s`` that the
average of step ``t`` lacks, 1 for later steps. For any optimizer
``average = weights - sum_s lag(s) * update(s)``, so a combination whose coefficients sum to 1 is
off by ``sum_s (sum_i x_i * lag_i(s) - lag_target(s)) * update(s)``: the norm of that difference of
lags is minimised. Plain weights are the average with decay 0.0.
"""

from array import array
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ..schedules import Decay, Schedule, _call
from .at_once import AT_ONCE
from .laws import law_of


class Average(NamedTuple):
    """What decides an average: its decay, its last step and when it was updated."""

    decay: Decay
    step: int
    update_every: int = 1
    update_after_step: int = 0


class Solver:
    """The combinations that a fixed list of averages can give.

    Between two steps of the inputs all averages of one decay are multiples of one another, so the
    inner products take ``O(steps * decays + inputs**2)``, and are made once for all targets.
    """

    def __init__(self, inputs: Sequence[Average]) -> None:
        self.inputs = list(inputs)
        self._decays: list[Average] = []  # those that differ, with step 0: compared, never hashed
        for average in self.inputs:
            if average._replace(step=0) not in self._decays:
                self._decays.append(average._replace(step=0))
        self._row = [self._decays.index(average._replace(step=0)) for average in self.inputs]
        self._last: tuple[int, _System] | None = None  # one alone: it holds a number per step

    def solve(self, target: Average) -> tuple[list[float], float]:
        """Return one coefficient for each input, and the error.

        Args:
            target: The average that is wanted. Inputs of later steps get the coefficient 0.

        Returns:
            The coefficients, whose sum is 1, and the expected distance between the combination
            and the target over that between the training weights and the target (if updates are
            of one size and uncorrelated): 1.0 is no better than the training weights.

        Raises:
            ValueError: If no input is as old as the target.
        """
        if target in self.inputs:
            kept = self.inputs.index(target)
            return [float(index == kept) for index in range(len(self.inputs))], 0.0
        used = [index for index, average in enumerate(self.inputs) if average.step <= target.step]
        if not used:
            raise ValueError(f"no average is known at step {target.step} or before it")
        if self._last is None or self._last[0] != target.step:
            self._last = target.step, self._system(used, target.step)
        found, error = self._last[1].solve(target)
        coefficients = [0.0] * len(self.inputs)
        for index, value in zip(used, found, strict=True):
            coefficients[index] = value
        return coefficients, error

    def _system(self, used: list[int], last: int) -> "_System":
        steps, rows = [self.inputs[index].step for index in used], [self._row[i] for i in used]
        ends = sorted({*steps, last} - {0})
        segments = list(pairwise([0, *ends]))
        known = [factors(decay, last) for decay in self._decays]
        return _System(steps, rows, segments, [lags(line, segments) for line in known])


class _System:
    """The inner products of all inputs up to one step, solved for one target after another."""

    def __init__(
        self,
        steps: list[int],
        rows: list[int],
        segments: list[tuple[int, int]],
        known: list[Tensor],
    ) -> None:
        self.segments, ones = segments, torch.ones(segments[-1][1], dtype=torch.float64)
        self.basis = torch.stack([*known, ones])  # what an average lacks of a later update: all
        # Input i is, in segment k, share[i, k] times the line row[i, k] of the basis.
        pairs = [
            _shares(step, row, segments, self.basis) for step, row in zip(steps, rows, strict=True)
        ]
        self.share = torch.stack([share for share, _ in pairs])
        self.row = torch.stack([row for _, row in pairs])
        self.solver = _Constrained(self._products())

    def solve(self, target: Average) -> tuple[list[float], float]:
        wanted = lags(factors(target, self.segments[-1][1]), self.segments)
        # The target is known by the end of every segment; what follows it multiplies.
        share, _ = _shares(target.step, 0, self.segments, wanted[None])
        lag = torch.cat(
            [wanted[a:b] * part for (a, b), part in zip(self.segments, share.tolist(), strict=True)]
        )
        inner = torch.stack([self.basis[:, a:b] @ lag[a:b] for a, b in self.segments])
        found = self.solver.solve((self.share * inner.T.gather(0, self.row)).sum(1))
        return found.tolist(), self._error(found, lag)

    def _error(self, found: Tensor, lag: Tensor) -> float:
        # On the lags themselves: a quadratic form would lose half of the digits.
        width = len(self.basis)
        weight = torch.zeros(width, len(self.segments), dtype=torch.float64)
        weight.scatter_add_(0, self.row, found[:, None] * self.share)
        made = [weight[:, k] @ self.basis[:, a:b] for k, (a, b) in enumerate(self.segments)]
        off, size = (torch.cat(made) - lag).norm().item(), lag.norm().item()
        return off / size if size else float("inf") if off else 0.0

    def _products(self) -> Tensor:
        inputs, width = len(self.share), len(self.basis)
        total = torch.zeros(inputs, inputs, dtype=torch.float64)
        parts = [self.basis[:, a:b] for a, b in self.segments]
        products = torch.stack([part @ part.T for part in parts])
        lines = [self.share * (self.row == line) for line in range(width)]
        for first in range(width):
            for second in range(width):
                total += (lines[first] * products[:, first, second]) @ lines[second].T
        return total


class _Constrained:
    """The minimum of ``x @ products @ x - 2 * x @ right`` where x sums to 1."""

    def __init__(self, products: Tensor) -> None:
        # Unit diagonal: inputs may differ by orders of magnitude; the weights of now are 0.
        size = products.diagonal().sqrt()
        self.scale = torch.where(size > 0, 1 / size, 1.0)
        self.border = self.scale.max()
        edge = (self.scale / self.border)[:, None]
        core = products * self.scale[:, None] * self.scale
        corner = torch.zeros(1, 1, dtype=torch.float64)
        matrix = torch.cat([torch.cat([core, edge], 1), torch.cat([edge.T, corner], 1)])
        # The least squares of least norm, as gelsd has it, kept for further targets: duplicates
        # make the matrix singular, and hundreds of snapshots nearly so.
        values, self.vectors = torch.linalg.eigh(matrix)
        least = values.abs().max() * len(values) * torch.finfo(torch.float64).eps
        self.inverse = torch.where(values.abs() > least, 1 / values, 0.0)

    def solve(self, right: Tensor) -> Tensor:
        wanted = torch.cat([right * self.scale, 1 / self.border[None]])
        found: Tensor = self.vectors @ (self.inverse * (self.vectors.T @ wanted))
        return found[:-1] * self.scale


def factors(average: Average, steps: int) -> Tensor:
    """Return what the steps 1 to ``steps`` multiply an average by: 0 before the start, 1 between.

    Raises as ``decay_factor``.
    """
    made, every = torch.ones(steps, dtype=torch.float64), average.update_every
    made[: average.update_after_step] = 0.0
    late = made[average.update_after_step :]
    updates = len(late) // every
    if updates:
        each = _decays(average.decay, updates * every)
        late[every - 1 :: every] = each.view(updates, every).prod(1)
    return made


def lags(line: Tensor, segments: Sequence[tuple[int, int]]) -> Tensor:
    """Return, for every step, the product of ``line`` from there to the end of its segment."""
    return torch.cat([line[a:b].flip(0).cumprod(0).flip(0) for a, b in segments])


def _shares(
    step: int, row: int, segments: Sequence[tuple[int, int]], basis: Tensor
) -> tuple[Tensor, Tensor]:
    covered = [k for k, (_, end) in enumerate(segments) if end <= step]
    share = torch.ones(len(segments), dtype=torch.float64)
    rows = torch.full((len(segments),), len(basis) - 1)
    if covered:
        rows[: len(covered)] = row
        whole = basis[row, [segments[k][0] for k in covered]]  # of each segment, from its begin
        later = whole.flip(0).cumprod(0).flip(0)
        share[: len(covered) - 1] = later[1:]
    return share, rows


def _decays(decay: Decay, updates: int) -> Tensor:
    """Return the decays of the updates 1 to ``updates``, one a step."""
    if not callable(decay):
        return torch.full((updates,), float(decay), dtype=torch.float64)
    try:
        law: Any = law_of(decay)
    except TypeError:  # a function of the user's
        return _called(decay, updates)
    # As the schedule computes it, for all steps at once: a sweep asks for many such targets.
    numbers = torch.arange(1, updates + 1, dtype=torch.float64)
    return AT_ONCE[law["schedule"]](numbers, **decay.keywords)  # type: ignore[attr-defined]


def _called(decay: Schedule, updates: int) -> Tensor:
    called = torch.frombuffer(array("d", map(decay, range(1, updates + 1))), dtype=torch.float64)
    wrong = ~((called >= 0) & (called <= 1))
    if wrong.any():  # looked at together, as a check for each costs more than most schedules
        _call(decay, int(wrong.nonzero()[0]) + 1)
    return called
