"""What both doors offer alike: reading the average, and making it the weights."""

from ._shadow import report, swap
from ._shadow.shadow_set import ShadowSet
from .schedules import Decay


class Door:
    """A front door over a shadow set."""

    _ema: ShadowSet

    @property
    def decay(self) -> Decay:
        """The decay, as given at construction: a float or a schedule."""
        return self._ema.decay

    @property
    def swapped(self) -> bool:
        """Whether the EMA weights are in the parameters now."""
        return bool(self._ema.swapped)

    def apply_ema(self) -> None:
        """Make the EMA weights the training weights, one way (the EMA stays as it is).

        Inside a swap nothing is swapped back then.

        Raises:
            RuntimeError: Another object has its EMA weights in the parameters.
        """
        swap.get_ready(self._ema)
        self._look()
        swap.refuse_others(self._ema, "apply_ema()")
        report.warn_export(self._ema)
        swap.apply(self._ema)

    def ema_metrics(self) -> dict[str, float]:
        """The health of the EMA, for a logger.

        Returns:
            ``ema_decay`` (in force now), ``ema_updates``, ``ema_window`` (``1 / (1 - decay)``, in
            optimizer steps), ``ema_initial_share`` (the largest share of initial weights still
            inside the EMA of a parameter) and ``ema_distance``
            (``||ema - weights|| / ||weights||`` with the training weights; NaN or infinite when
            what is read of either is). Of a tensor of more than 65,536 elements a 16th is read,
            another one after every step: a fraction of a step's time. Where the weights are spread
            over ranks every rank calls it: two numbers are summed up.
        """
        swap.recover(self._ema)
        self._look()
        return report.metrics(self._ema)

    def _look(self) -> None:
        """Look at what is followed, where that may have changed since the last call."""
