"""``EMAModel``: the EMA of a model's weights, for loops that keep their optimizer as it is."""

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ._arithmetic.formats import EMADtype
from ._checkpoint import layout, model_form, read
from ._door import Door
from ._engines import adapters
from ._shadow import elsewhere, mistakes, names, report, swap, teacher
from ._shadow.blocks import as_block, is_enabled
from ._shadow.buffers import HeldBuffers, Wanted
from ._shadow.choice import Choice, choose, in_place, read_from
from ._shadow.model_groups import ModelGroups
from ._shadow.movement import Movement
from ._shadow.options import warn_of_tau
from ._shadow.shadow_set import ShadowSet
from ._shadow.slots import Group
from ._shadow.swap_state import Mode
from ._shadow.windows import Decays


class EMAModel(Door):
    """Keep an exponential moving average (EMA) of a model's weights beside the model.

    ``ema = decay * ema + (1 - decay) * weights`` at every update; the EMA begins at the weights
    that the model has at construction.

    Call ``update()`` once after each optimizer step. Averaged are the parameters that require a
    gradient. Buffers (running statistics of BatchNorm) are the model's own by default, put back as
    they were when ``use_ema()`` ends; with ``use_buffers=True`` the running statistics are averaged
    like the weights, and what else is in a buffer (masks, observers, caches) stays the model's own.

    Args:
        model: The model in training; not copied. Weights loaded into it after construction need
            ``reset()``.
        decay: The share of the old EMA that is kept per optimizer step, in [0, 1], or a schedule
            ``update number (1-based) -> decay``. Several by name as for ``EMAOptimizer``.
        use_buffers: Which buffers are averaged. Default False: none. True: ``running_mean`` and
            ``running_var`` of torch's norm classes and their subclasses. A list of names (shell
            patterns, ``["*.expert_bias"]``): these. A buffer that is named has to be of floats and
            to keep its shape; one that no state dict of the model holds is not saved here either.
        update_every: Optimizer steps between two updates; the update then applies
            ``decay ** update_every``. Default 1.
        update_after_step: Optimizer steps until averaging begins; until then the EMA is the
            training weights. Default 0.
        dtype: How an EMA tensor is stored, as for ``EMAOptimizer``. Default None: fp32 for every
            narrower float, else the tensor's own dtype.
        device: ``"cpu"`` keeps the EMA in pinned host memory, as for ``EMAOptimizer``. Default
            None: beside the weights.
        skip_non_finite: Whether an element whose weight is NaN or infinite keeps its EMA at that
            update, as for ``EMAOptimizer``. Default False.

    It equals ``torch.optim.swa_utils.AveragedModel`` bit for bit with ``update()`` where that has
    ``update_parameters(model)``: with ``update_after_step=1`` the one that averages by
    ``multi_avg_fn=get_ema_multi_avg_fn(decay)`` (its first call copies), with
    ``decay=equal_average()`` and float32 weights the one of ``get_swa_multi_avg_fn()``.

    Raises:
        TypeError: ``model`` is no module.
        ValueError: A value is out of its range.

    Example:
        >>> ema = EMAModel(model, decay=0.999)
        >>> for batch in loader:
        ...     train_step(model, batch)  # ends with optimizer.step()
        ...     ema.update()
        >>> with ema.use_ema():
        ...     evaluate(model)
    """

    _groups_of = ModelGroups

    def __init__(
        self,
        model: nn.Module,
        decay: Decays = 0.999,
        *,
        use_buffers: Wanted = False,
        update_every: int = 1,
        update_after_step: int = 0,
        dtype: EMADtype = None,
        device: torch.device | str | None = None,
        skip_non_finite: bool = False,
    ) -> None:
        mistakes.check_model(model)
        self.model = model
        self._source = self._groups_of(model, use_buffers)
        settings = self._source, decay, update_every, update_after_step, dtype
        self._ema = ShadowSet(
            *settings, skip_non_finite=skip_non_finite, sees_steps=False, device=device
        )
        self._movement = Movement()
        self.reset()
        warn_of_tau(decay)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """The forward of the model with the EMA weights: a live teacher, the model untouched.

        Right at any time: before and after the student's forward, under ``autocast`` and
        ``no_grad``. No weight is copied where EMA and weights have one dtype; for narrower weights
        the EMA is cast for the time of the call. Train or eval mode is the model's own, and its
        hooks run; buffers are its own too (averaged where ``use_buffers`` says so), and what the
        forward does to them is forgotten. No gradient reaches the weights. With activation
        checkpointing call it under ``no_grad``: a backward recomputes at the training weights.
        A model in a data-parallel wrapper is called without it; a compiled one is compiled once
        more. Inside ``use_ema()`` it is the model's own forward.

        Args:
            *args: What the model takes.
            **kwargs: What the model takes, by name.

        Returns:
            What the model returns.

        Raises:
            RuntimeError: The EMA is in a narrow storage format or on another device; the weights
                are sharded (FSDP2), quantized, or hold merged LoRA adapters.
        """
        swap.recover(self._ema)
        if self._ema.mode is not Mode.TRAIN:
            return self.model(*args, **kwargs)
        adapters.refuse_merged(self.model)
        self._look()
        return teacher.forward(self._ema, self.model, args, kwargs)

    @property
    def use_buffers(self) -> Wanted:
        """Which buffers are averaged, as given at construction."""
        return self._source.buffers.wanted

    def reset(self) -> None:
        """Begin anew from the model's weights, for weights loaded after construction.

        Parameters that were replaced by new ones (``load_state_dict(assign=True)``, a new module)
        begin anew by themselves, at the next ``update()``.

        Raises:
            RuntimeError: Inside ``use_ema()``.
        """
        self._refuse_in_block("reset()")
        self._source.look(self._ema, anew=True)
        swap.refuse_others(self._ema, "reset()")
        self._ema.follow_members()

    def update(self) -> None:
        """Average once; call it after every optimizer step (not after every micro-batch).

        Raises:
            RuntimeError: Inside ``use_ema()``; while a CUDA graph is captured.
        """
        self._refuse_in_block("update()")
        elsewhere.refuse_captured(self._ema, "update()")
        self._look()
        with self._ema.swap.alone("update()"):
            swap.refuse_others(self._ema, "update()")
            self._ema.finish_step(self._ema.begin_step())
        if self._movement.rests(self._ema.groups[0]["params"]):
            self._ema.warned.once(
                "rests",
                "update() was called although the weights had not moved, at 3 of the last 4 "
                "updates: call it once after every optimizer step, not after every micro-batch "
                "(nor after a step that a GradScaler has skipped)",
            )

    @as_block
    def use_ema(
        self, enabled: bool = True, *, decay: Choice = None, max_error: float = 0.05
    ) -> Iterator[None]:
        """Exchange training weights and EMA weights for a block, and back, also on an exception.

        Whatever the block does to buffers is undone when it ends, averaged ones included.

        While the EMA weights are in, a step of any torch optimizer over these parameters and
        ``load_state_dict()`` of the model raise; what is written into them in another way is
        warned of at the end. A ``state_dict()`` of the model, a ``torch.jit.trace`` or a
        ``torch.export`` made inside refers to the parameters and shows the training weights
        afterwards: take ``get_ema_state()``. Activation checkpointing recomputes at the weights of
        the moment: end a backward before a swap.

        Args:
            enabled: False makes the block an ordinary one.
            decay: Which average, as for ``EMAOptimizer.swap_ema_weights``.
            max_error: The limit of its told error.

        Raises:
            ValueError: There is no such average.
            RuntimeError: Inside ``use_ema()``. With merged LoRA adapters, and at the end of a block
                that has left them merged (they are unmerged then). At the end, where another object
                has swapped since and not yet back.
        """
        if not is_enabled(enabled):
            yield
            return
        self._refuse_in_block("use_ema()")
        adapters.refuse_merged(self.model)
        self._look()
        shown = choose(self._ema, decay, max_error)
        with swap.block(self._ema, "use_ema()", self.model, shown):
            held = HeldBuffers(self.model)
            try:
                yield
            finally:
                try:
                    undone = adapters.unmerge(self.model)
                finally:
                    held.put_back()
        if undone:
            adapters.raise_unmerged()

    swap_ema_weights = use_ema

    def get_ema_state(
        self,
        *,
        decay: Choice = None,
        max_error: float = 0.05,
        device: torch.device | str | None = None,
        copy: bool = True,
    ) -> dict[str, Tensor]:
        """The EMA weights by name, without touching the model; right at any time.

        Args:
            decay: Which average, as for ``EMAOptimizer.swap_ema_weights``.
            max_error: The limit of its told error.
            device: Where the copies are to be; they are moved one by one.
            copy: As ``EMAOptimizer.get_ema_state`` takes it.

        Returns:
            Fresh copies in the EMA's dtype, one for each averaged parameter (and each averaged
            buffer), ready for ``model.load_state_dict(strict=False)`` and for safetensors.
        """
        if not copy:
            self._refuse_in_block("get_ema_state(copy=False)")
        swap.recover(self._ema)
        self._look()
        shown = choose(self._ema, decay, max_error)
        if not copy:
            return teacher.live_state(in_place(self._ema, shown), self.model, device)
        report.warn_export(*read_from(self._ema, shown))
        value_of = None if shown is None else shown.value
        return names.ema_state(self._ema, self.model, device, value_of)

    def load_ema_state(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Make ``state`` the EMA, without touching the model; the next update averages into it.

        Args:
            state: As ``get_ema_state`` returns it; one prefix of all names (``module.``,
                ``model.``), there or in the model, is no difference.
            strict: Whether the names must be exactly those of what is averaged.

        Raises:
            KeyError: Names are missing or unknown.
            ValueError: A tensor has another shape than its parameter, or lies on another mesh.
            RuntimeError: Inside ``use_ema()``.
        """
        self._refuse_in_block("load_ema_state()")
        self._look()
        names.load_ema_state(self._ema, self.model, state, strict)

    def state_dict(self) -> dict[str, Any]:
        """All that a resume needs beside the model's own state dict.

        Raises:
            RuntimeError: Inside ``use_ema()``, where the model's state dict holds the EMA weights.
        """
        self._refuse_in_block("state_dict()")
        return self._packed()

    def _packed(self) -> dict[str, Any]:
        groups = self._saved_groups()
        packed = [{"params": g["param_names"], "ema_params": self._averaged(g)} for g in groups]
        empty = {"state": {}, "param_groups": packed}
        return layout.merge(empty, self._ema)

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Load what ``state_dict()`` returned, bit for bit; before or after the model's own.

        Args:
            state_dict: From an EMAModel of the same model. Of its buffers only those are loaded
                that are averaged here; none of these may be missing.

        Raises:
            ValueError: The names or shapes are another model's, or an entry is damaged; nothing
                has changed then.
            RuntimeError: Inside ``use_ema()``.
        """
        self._refuse_in_block("load_state_dict()")
        self._read(state_dict).install(self._ema)

    def _read(self, state_dict: Mapping[str, Any]) -> read.Loaded:
        groups = self._saved_groups()
        model_form.check_names(groups, state_dict)
        # By name, not by position: the order of a model's modules may change.
        named = [{**g, "params": list(g["param_names"])} for g in groups]
        pairs = zip(state_dict["param_groups"], named, strict=False)  # buffers may be left out
        saved = {**state_dict, "param_groups": [{**old, **new} for old, new in pairs]}
        return read.read(self._ema, saved)

    def __repr__(self) -> str:
        """Settings, whether swapped, and what model it is of."""
        ema, count = self._ema, sum(map(Tensor.numel, self._ema.members()))
        return (
            f"EMAModel (decay={ema.decays}, update_every={ema.update_every}, "
            f"update_after_step={ema.update_after_step}, use_buffers={self.use_buffers}, "
            f"swapped={self.swapped}) of {type(self.model).__name__}, {count:,} averaged numbers"
        )

    def _averaged(self, group: Group) -> list[str]:
        pairs = zip(group["params"], group["param_names"], strict=True)
        return [name for tensor, name in pairs if self._ema.find(tensor) is not None]

    def _saved_groups(self) -> list[Group]:
        self._look()
        self._source.leave_temporary()
        return self._ema.groups

    def _look(self) -> None:
        self._source.look(self._ema)

    def _refuse_in_block(self, what: str) -> None:
        swap.recover(self._ema)
        if self._ema.mode is Mode.BLOCK:
            raise RuntimeError(f"{what} inside use_ema(): leave the block first")
        if self._ema.mode is Mode.EVAL:  # a copy made inside use_ema() has no block
            swap.put_back_for_good(self._ema)

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy."""
        swap.recover(self._ema)
        return self.__dict__
