"""What a user is told about the EMA: metrics, and warnings where it is read."""

import math
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from .._arithmetic.average import flagged, non_finite, relative_distance, squared_norms
from .._arithmetic.scratch import sample_of
from .._engines.quantized import apart, dense
from .._engines.sharding import by_spread, local, locals_of, sum_over_ranks
from .._warnings import warn
from ..schedules import compute_optimal_decay, initial_share
from .holdings import no_autograd
from .record import names_of
from .shadow_set import ShadowSet
from .slots import Slot, value_of

# With this much of the initial weights left in it, an EMA is worse than the training weights more
# often than not: decay 0.9999 after 1,000 steps leaves 90 %.
_SHARE_LIMIT = 0.1


def metrics(shadow: ShadowSet, total: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
    """The health of the EMA as floats, ready for a logger.

    Args:
        shadow: The shadow set.
        total: Adds up numbers over the ranks, where plain tensors are parts of larger ones.
    """
    shadow.offload.settle()
    warn_skipped(shadow)
    told = {"ema_decay": 0.0, "ema_updates": float(updates_made(shadow)), **_health(shadow, total)}
    for name, window in shadow.others.items():
        told |= {f"{key}/{name}": value for key, value in _health(window, total).items()}
    return told


def _health(window: ShadowSet, total: Callable[[Tensor], Tensor] | None) -> dict[str, float]:
    decay = window.decay_in_force()
    return {
        "ema_decay": decay,
        "ema_window": math.inf if decay == 1.0 else 1.0 / (1.0 - decay),
        "ema_initial_share": max((s.share for s in window.counted().values()), default=1.0),
        "ema_distance": _distance(window, window.members(), total or (lambda numbers: numbers)),
    }


def _distance(
    shadow: ShadowSet, params: Sequence[Tensor], total: Callable[[Tensor], Tensor]
) -> float:
    squares = []
    with no_autograd():
        for spread, members in by_spread(params).items():
            for batch in apart(members):
                parts = (_sample(shadow, param) for param in batch)  # one at a time
                for norms in squared_norms(parts):
                    squares.append(total(sum_over_ranks(norms, spread)).tolist())
    return relative_distance(squares)


def _sample(shadow: ShadowSet, param: Tensor) -> tuple[Tensor, Tensor, float]:
    """A part of the EMA and of the weights of a parameter, and what one element stands for."""
    slot, weights = shadow.find(param), local(dense(shadow.weights_of(param)))
    if slot is None or slot.low is None or not slot.age:
        (ema, weights), scale = sample_of((local(shadow.ema_of(param)), weights), shadow.step)
        return ema, weights.to(ema.device), scale
    stored = local(shadow.main_of(param)), local(slot.low), weights
    (main, low, weights), scale = sample_of(stored, shadow.step)
    return value_of(main, low), weights.to(main.device), scale


def updates_made(shadow: ShadowSet) -> int:
    """Updates of the EMA so far, on the optimizer's clock."""
    if not shadow.slots and not shadow.absent:
        return 0
    return max(0, shadow.step - shadow.update_after_step) // shadow.update_every


def warn_export(*windows: ShadowSet) -> None:
    """Warn, where averages are about to be read, of one that is not worth reading."""
    for window in windows:
        counted = window.counted()
        warn_young(window, "export", counted)
        warn_skipped(window)
        warn_non_finite(window, counted)


def warn_skipped(shadow: ShadowSet) -> None:
    """Warn once of weights that were skipped because they were not finite (on this rank)."""
    if not shadow.skip_non_finite or "skipped" in shadow.warned:
        return
    watched = [(p, s.met) for p, s in shadow.all_slots().items() if s.met is not None]
    met = [watched[i][0] for i in flagged([flag for _, flag in watched])]
    if met:
        names = ", ".join(names_of(shadow.groups, met)) or f"{len(met)} tensors"
        shadow.warned.once(
            "skipped",
            f"weights were NaN or infinite at some update, and their EMA was kept as it was "
            f"(skip_non_finite): {names}. Look at the training weights: the optimizer goes on "
            "from them",
        )


def warn_young(shadow: ShadowSet, kind: str, counted: Mapping[Tensor, Slot]) -> None:
    """Warn once of an EMA that still holds much of the initial weights, or that is none.

    Args:
        shadow: The shadow set.
        kind: "swap" or "export"; once for each.
        counted: The slots that hold an average.
    """
    slots = counted.values()
    if not slots and any(shadow.options.of(group).enabled for group in shadow.groups):
        _warn_unaveraged(shadow)
    worst = max(slots, key=lambda slot: slot.share, default=None)
    if worst is not None and worst.share > _SHARE_LIMIT:
        _warn_share(shadow, kind, worst)


def warn_of_run(shadow: ShadowSet, steps: float) -> None:
    """Warn, when a training begins, of an EMA that will be much of the initial weights at its end.

    Args:
        shadow: The shadow set.
        steps: Optimizer steps that are still to be made; infinite where nobody knows.
    """
    total = shadow.step + steps - shadow.update_after_step
    if not shadow.update_every <= total < math.inf:
        return
    decay, covered = shadow.decay, int(total) // shadow.update_every * shadow.update_every
    share = max((s.share for s in shadow.counted().values()), default=1.0)
    left = min(covered, int(steps))
    share = initial_share(decay, covered) if callable(decay) else share * decay**left
    if share > _SHARE_LIMIT:
        for kind in ("swap", "export"):  # it is told once
            shadow.warned.add(kind)
        shadow.warned.once(
            "run",
            f"the EMA will still hold {share:.0%} of the initial weights at the end of this run: "
            f"decay {decay} over {covered} steps. Leave decay out of the callback, which then "
            f"chooses it, pass compute_optimal_decay({covered}) (here "
            f"{compute_optimal_decay(covered):.6g}), a warm-up (warmup_decay) or update_after_step",
        )


def _warn_unaveraged(shadow: ShadowSet) -> None:
    with no_autograd():
        told = "cold" in shadow.warned or not shadow.has_stepped()
    if not told:
        shadow.warned.once(
            "unaveraged",
            "nothing was averaged though the weights have moved: what is read are the training "
            "weights (of an EMAModel the initial ones). Step the EMAOptimizer, not its inner "
            "optimizer, or call EMAModel.update() after every step, over parameters that require "
            "gradients",
        )


def warn_non_finite(shadow: ShadowSet, counted: Mapping[Tensor, Slot]) -> None:
    """Warn of an EMA that holds NaN or infinite values (on this rank)."""
    with no_autograd():
        bad = non_finite(locals_of(shadow.main_of(param) for param in counted))
    if bad:
        warn(
            f"{len(bad)} of {len(counted)} EMA tensors hold NaN or infinite values: the training "
            "weights did so at some step, and an average never forgets it. Resume from an earlier "
            "checkpoint, or load good weights and start a new EMA",
            every_rank=True,  # of sharded weights each looks at its own part
        )


def _warn_share(shadow: ShadowSet, kind: str, worst: Slot) -> None:
    made = worst.age // shadow.update_every
    shadow.warned.once(
        kind,
        f"the EMA still holds {worst.share:.0%} of the initial weights: decay "
        f"{shadow.decay_in_force():.6g} after {made} updates. "
        "Use a smaller decay (compute_optimal_decay), a warm-up (warmup_decay) or "
        "update_after_step",
    )
