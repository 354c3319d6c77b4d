"""The optimizer's two modes: training weights in the parameters, or EMA weights."""

from collections.abc import Iterator
from contextlib import contextmanager

from ._checkpoint import layout
from ._forwarding import ForwardingOptimizer, call_if_there
from ._shadow import report, swap
from ._shadow.shadow_set import ShadowSet


class SwappingOptimizer(ForwardingOptimizer):
    """A forwarding optimizer that can exchange training weights and EMA weights."""

    _ema: ShadowSet

    @property
    def swapped(self) -> bool:
        """Whether the EMA weights are in the parameters now."""
        return bool(self._ema.swapped)

    @contextmanager
    def swap_ema_weights(self, enabled: bool = True) -> Iterator[None]:
        """Exchange training weights and EMA weights for a block, and back, also on an exception.

        Addresses stay, so compiled models, CUDA graphs and tied weights stay valid. Extra memory:
        at most 4 MiB where the EMA has the parameter's dtype, else one copy in that dtype.
        Quantized weights (torchao's int8 training) hold the EMA rounded as their class rounds it,
        the same way at every swap; the training weights' codes and scales come back exactly.

        Args:
            enabled: False makes the block an ordinary one.

        Raises:
            RuntimeError: The EMA weights are swapped in already.
        """
        if not enabled:
            yield
            return
        self._resolve_pending()
        swap.refuse_swapped(self._ema, "swap_ema_weights()")
        try:
            # The mode first, on both sides: an interrupt may come between any two calls.
            self._ema.mode = "block"
            self._swap_in()
            yield
        finally:
            if self._ema.mode == "block":  # else a load inside the block has replaced the EMA
                self._ema.mode = "eval"
                self._swap_out()

    def eval(self) -> None:
        """Put the EMA weights in until ``train()``; a no-op after ``eval()`` or inside a block."""
        self._resolve_pending()
        if self._ema.mode != "train":
            return
        # The inner optimizer first: schedule-free moves the weights it finds.
        call_if_there(self.inner, "eval")
        self._ema.mode = "eval"
        try:
            if self._ema.eval_swaps:
                self._swap_in()
        except BaseException:
            self.train()
            raise

    def train(self) -> None:
        """Put the training weights back; a no-op when they are in.

        Raises:
            RuntimeError: Inside ``swap_ema_weights()``: leaving the block puts them back.
        """
        self._resolve_pending()
        swap.refuse_swapped(self._ema, "train()", also_after_eval=False)
        if self._ema.mode == "eval" or self._ema.swapped:
            self._swap_out()
        call_if_there(self.inner, "train")

    def apply_ema(self) -> None:
        """Make the EMA weights the training weights, one way (the EMA stays as it is).

        Inside a swap nothing is swapped back then.
        """
        self._resolve_pending()
        report.check_export(self._ema, self.param_groups)
        swap.apply(self._ema, self.param_groups)
        self._mark_groups()

    def _mark_groups(self) -> None:
        for group in self.param_groups:
            group.update(layout.marks(self._ema, group))

    def _resolve_pending(self) -> None:
        if self._ema.mode == "pending":
            swap.resolve_pending(self._ema, self.param_groups)
            self._mark_groups()

    def _swap_in(self) -> None:
        report.check_share(self._ema, self.param_groups, "swap")
        doubtful = swap.swap_in(self._ema, self.param_groups)
        self._mark_groups()
        if doubtful:
            report.check_finite(self._ema, self.param_groups)

    def _swap_out(self) -> None:
        try:
            swap.leave_block(self._ema)
        finally:
            self._mark_groups()
