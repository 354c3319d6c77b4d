"""``EMAOptimizer``: any torch optimizer, with the EMA of the weights inside.

    step()  = the inner optimizer's step, then  ema <- decay * ema + (1 - decay) * weights

The optimizer owns no tensor: the inner optimizer keeps its state, the shadow set keeps the EMA,
and this class forwards to both. It composes and does not share: torch replaces ``state`` and
``param_groups`` on every load, so both are looked up where they live.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.optim import Optimizer

from ._arithmetic.formats import EMADtype
from ._checkpoint import carry, layout, nested, read
from ._checkpoint.state import StateView, replace_state
from ._door import InnerDoor
from ._forwarding import call_if_there, forwarding_class, inner_step
from ._shadow import elsewhere, swap
from ._shadow.blocks import as_block, is_enabled
from ._shadow.choice import Choice, choose
from ._shadow.options import check_groups, check_new_group, check_wrappable, warn_of_tau
from ._shadow.shadow_set import ShadowSet
from ._shadow.slots import Group
from ._shadow.swap_state import Mode
from ._shadow.windows import Decays


class EMAOptimizer(InnerDoor):
    """Wrap an optimizer and keep an exponential moving average (EMA) of the weights it trains.

    ``ema = decay * ema + (1 - decay) * weights`` after every step; the EMA begins at the weights
    before the first one. If the learning rate is decayed to zero, it gains nothing.

    The trajectory of the training weights is bit-equal to that of the inner optimizer alone. The
    EMA is part of ``state_dict()``, in fp32 for every narrower parameter. Param groups may carry
    their own ``ema_decay`` (a float, honoured live like ``lr``), ``ema_dtype`` or
    ``ema_enabled=False``.

    Args:
        optimizer: The inner optimizer, built as usual; used through this wrapper from now on.
        decay: The share of the old EMA that is kept per optimizer step, in [0, 1], or a schedule
            ``update number (1-based) -> decay``. 0.999 averages over about 1,000 steps. A float is
            that float from the first update on: there is no hidden warm-up. Several by name,
            ``{"short": power_decay(0.05), "long": power_decay(0.20)}``, keep one average each: the
            first is the EMA, the others are read with ``decay="long"``, and any window between
            them with ``decay=power_decay(0.12)``.
        update_every: Optimizer steps between two updates; the update then applies
            ``decay ** update_every``, so that the window stays the same. Default 1: the exact EMA.
        update_after_step: Optimizer steps until averaging begins (default 0); until then the EMA is
            the training weights.
        dtype: How an EMA tensor is stored: ``torch.float32``, ``torch.float64``, ``"float24"`` (3
            bytes) or ``torch.bfloat16`` (2 bytes), both rounded stochastically, or
            ``"float32_compensated"`` (6 bytes) for decays of 0.9999 and more. Default None: fp32
            for every narrower float (rounded to nearest an EMA would stop moving), else the
            parameter's own dtype.
        device: ``"cpu"`` keeps the EMA in pinned host memory, averaged by a worker thread while the
            training goes on: no byte of it on the accelerator. With ``update_every=1`` every step
            waits for a copy of the weights; from 2 on a write by hand between two steps raises.
            Sharded checkpoints load; a full state dict is refused by torch ("Device mismatch",
            nothing has changed then): load the EMA with ``load_ema_state``. Default None: beside
            the weights; of weights on a CPU both are the same.
        skip_non_finite: Whether an element whose weight is NaN or infinite keeps its EMA at that
            update, so that a run that goes back to good weights has a good EMA; the next swap,
            metrics or save warns once, with the names. An update on a CPU takes 1.5 to 2.4 times as
            long. Default False: such a weight stays in the EMA.
        module: The model, to name the FSDP2 modules that own the parameters. Default None: found.

    Raises:
        TypeError: ``optimizer`` is no ``torch.optim.Optimizer``, an EMAOptimizer already, or holds
            the flat parameters of FSDP1.
        ValueError: A value is out of its range.

    Example:
        >>> optimizer = EMAOptimizer(torch.optim.AdamW(model.parameters(), lr=1e-3), decay=0.999)
        >>> ...  # train as usual
        >>> with optimizer.swap_ema_weights():
        ...     evaluate(model)

    Source: Polyak and Juditsky, "Acceleration of stochastic approximation by averaging", 1992.
    """

    def __init__(
        self,
        optimizer: Optimizer,
        decay: Decays = 0.999,
        *,
        update_every: int = 1,
        update_after_step: int = 0,
        dtype: EMADtype = None,
        device: torch.device | str | None = None,
        skip_non_finite: bool = False,
        module: nn.Module | None = None,
    ) -> None:
        check_wrappable(optimizer, EMAOptimizer)
        nested.check_served(optimizer)
        check_groups(optimizer.param_groups)
        shadow = ShadowSet(
            optimizer,
            decay,
            update_every,
            update_after_step,
            dtype,
            module,
            skip_non_finite,
            device=device,
        )
        shadow.check_offload()
        warn_of_tau(decay)
        if layout.clear_reserved(optimizer):
            shadow.warned.add("cold")
        super().__init__(optimizer)
        self._ema, self._view = shadow, StateView(optimizer, shadow)
        shadow.note_given(map(layout.options_of, self.param_groups))
        shadow.mark()

    @property
    def state(self) -> Any:
        """The inner optimizer's state and the EMA, as one live and writable mapping."""
        return self._view

    @state.setter
    def state(self, value: Mapping[Any, Any]) -> None:
        replace_state(self._view, value)

    def step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        """Run the inner optimizer's step, then average.

        Neither the EMA nor its counter moves on a step that a ``GradScaler`` has skipped. Hooks
        run in this order: this optimizer's pre-hooks, torch's global ones, the inner optimizer's;
        the step; the inner optimizer's post-hooks, the global ones, the average, this optimizer's.
        Global hooks are handed the inner optimizer, once, and see the EMA of the step before.

        Args:
            closure: Reevaluates the model and returns the loss; passed through once.
            *args: What the inner step takes beside it.
            **kwargs: What the inner step takes beside it, by name.

        Returns:
            What the inner step returned.

        Raises:
            RuntimeError: The EMA weights are in the parameters (inside ``swap_ema_weights()``,
                after ``eval()``, or after loading a checkpoint written while swapped); or a CUDA
                graph is captured, see ``update()``.
        """
        return self._hooked_step(self._step, closure, args, kwargs)

    # Torch would wrap this function for the global hooks and the profiler; the inner step is.
    step.hooked = True  # type: ignore[attr-defined]

    def _step(self, closure: Callable[[], Any] | None = None, *args: Any, **kwargs: Any) -> Any:
        ema, compiling = self._ema, torch.compiler.is_compiling()
        # A compiled graph knows of no other threads.
        with nullcontext() if compiling else ema.swap.alone("step()"):
            swap.recover(ema)
            elsewhere.refuse_captured(ema, "step()")
            swap.check_can_step(ema, closure is not None)
            swap.resolve_pending(ema)
            lane, compiled = ema.begin_step(), None if compiling else ema.compiled
            if compiled is not None and not compiled.refuses(args, kwargs):
                result = compiled.step(self.inner, lane, closure)
            else:
                result = inner_step(self.inner, closure, args, kwargs)
            ema.keys.look(self.inner, layout.STATE_KEYS)
            # A fused inner optimizer is stepped in any case, and told by the scaler to skip.
            ema.finish_step(lane, getattr(self.inner, "found_inf", None))
        return result

    def update(self) -> None:
        """Count one step that was made elsewhere, and average: ``step()`` without the inner step.

        For a step in a replayed CUDA graph or in an engine, or ``inner.step()`` on purpose. To be
        called right after each (not after one that a ``GradScaler`` has skipped); the EMA is then
        that of ``step()``, bit for bit. A parameter that has joined since begins at its weights of
        now.

        Raises:
            RuntimeError: No step of this optimizer was counted before: the EMA begins at the
                weights before the first. As ``step()``, while the EMA weights are in the
                parameters or a CUDA graph is captured.
        """
        elsewhere.count_step(self._ema)

    @as_block
    def swap_ema_weights(
        self, enabled: bool = True, *, decay: Choice = None, max_error: float = 0.05
    ) -> Iterator[None]:
        """Exchange training weights and EMA weights for a block, and back, also on an exception.

        Addresses stay, so compiled models, CUDA graphs and tied weights stay valid. Extra memory
        where the EMA has the parameter's dtype: at most 4 MiB on a CPU (fp32: 1 MiB) and 64 MiB of
        fp32 on an accelerator; else one copy in the parameter's dtype.
        Quantized weights hold the EMA rounded as their class rounds it, and come back exactly.

        Inside, a step of any torch optimizer over these parameters raises; another write is warned
        of at the end. A ``state_dict()``, ``torch.jit.trace`` or ``torch.export`` made inside shows
        the training weights afterwards: take ``get_ema_state(model)``. Activation checkpointing
        recomputes at the weights of the moment: end a backward before a swap.

        Args:
            enabled: False makes the block an ordinary one.
            decay: Which average: the name of a window, or a decay for one that is combined from
                the windows there are; default None, the first. Another than the first takes one
                copy of the training weights, and ``state_dict()`` raises inside.
            max_error: The limit of the error of a combination, which is told in advance: its
                expected distance from that average over that of the average from the weights.

        Raises:
            RuntimeError: The EMA weights are swapped in already; or at the end, where another
                object has swapped since and not yet back.
            ValueError: There is no such window, the told error is above its limit, or a decay was
                changed on a resume, so that nothing can be combined.
        """
        if not is_enabled(enabled):
            yield
            return
        swap.get_ready(self._ema)
        shown = choose(self._ema, decay, max_error)
        with swap.block(self._ema, "swap_ema_weights()", self._ema.module, shown):
            yield

    use_ema = swap_ema_weights

    def eval(self) -> None:
        """Put the EMA weights in until ``train()``; a no-op after ``eval()`` or inside a block."""
        swap.get_ready(self._ema)
        if self._ema.mode is not Mode.TRAIN:
            return
        # The inner optimizer first: schedule-free moves the weights it finds.
        call_if_there(self.inner, "eval")
        try:
            swap.enter_eval(self._ema)
        except BaseException:
            self.train()
            raise

    def train(self) -> None:
        """Put the training weights back; a no-op when they are in.

        Raises:
            RuntimeError: Inside ``swap_ema_weights()``: leaving the block puts them back.
        """
        swap.get_ready(self._ema)
        swap.refuse_swapped(self._ema, "train()", also_after_eval=False)
        swap.put_back_after_eval(self._ema)
        call_if_there(self.inner, "train")

    def add_param_group(self, param_group: Group) -> None:
        """Add a param group; the EMA of its parameters begins at their weights at the next step.

        It may carry ``ema_decay``, ``ema_dtype`` and ``ema_enabled``; a value out of its range is a
        ValueError or TypeError, and nothing is added.
        """
        check_new_group(param_group)
        self._ema.refuse_own_decays([param_group])
        self.inner.add_param_group(param_group)
        self._ema.note_given([layout.options_of(self.param_groups[-1])])
        self._ema.mark()

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def state_dict(self) -> dict[str, Any]:
        """The inner optimizer's state dict with the EMA in it: all that a resume needs.

        Right at any time. Written while swapped, it goes with the model's state dict of the same
        moment; the training weights come back after loading both.
        """
        return self._hooked_state_dict(self._state_dict)

    def _state_dict(self) -> dict[str, Any]:
        swap.recover(self._ema)
        inner = self.inner.state_dict()
        is_torch_form = nested.is_torch_form(inner, self.param_groups)
        return layout.merge(inner, self._ema) if is_torch_form else nested.nest(inner, self._ema)

    @torch._disable_dynamo  # type: ignore[attr-defined]
    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load a checkpoint, the EMA bit for bit.

        What the constructor was given (``decay``, ``update_every``, ...) is not overwritten. A
        checkpoint without an EMA loads too: the EMA then begins at the weights of the next step.

        Args:
            state_dict: From ``EMAOptimizer.state_dict()`` or from the inner optimizer alone.

        Raises:
            ValueError, TypeError: The checkpoint is damaged or another model's; the message names
                the parameter. Nothing has changed then.
        """
        self._hooked_load_state_dict(self._load_state_dict, state_dict)

    def _load_state_dict(self, state_dict: dict[str, Any]) -> None:
        swap.recover(self._ema)
        theirs, merged = nested.parts(state_dict, self.inner, self.inner.param_groups)
        merged, notes = carry.unpacked(merged)
        loaded = read.read(self._ema, merged)
        before = [dict(group) for group in self.inner.param_groups]
        self._load_inner(loaded.inner if theirs is None else theirs)
        loaded.install(self._ema, notes)
        read.keep_options(self._ema, before, merged["param_groups"])
        self._ema.mark()
        if loaded.cold or theirs is state_dict:
            self._ema.warned.once(
                "cold", "the checkpoint holds no EMA: it begins at the weights of the next step"
            )

    @classmethod
    def for_class(cls, optimizer_class: type[Optimizer], **options: Any) -> type["_Built"]:
        """A real subclass that takes what ``optimizer_class`` takes, for APIs that want a class.

        Args:
            optimizer_class: The inner optimizer's class, or a factory of it.
            options: What ``EMAOptimizer`` takes beside the optimizer.

        Returns:
            A class whose instances are ``EMAOptimizer(optimizer_class(params, ...), ...)``.
        """
        made: type[_Built] = forwarding_class(cls, optimizer_class, options)
        return made

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy. Hooks and patches of ``step`` stay behind, as with torch."""
        swap.recover(self._ema)
        return {**super().__getstate__(), "_ema": self._ema}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what ``__getstate__`` gave."""
        super().__setstate__(state)
        self._view = StateView(self.inner, self._ema)


if TYPE_CHECKING:

    class _Built(EMAOptimizer):
        """What a class of ``for_class`` makes, for type checkers."""

        def __init__(self, params: Any, *args: Any, **kwargs: Any) -> None: ...
