"""``EMAEngine``: the EMA of the fp32 masters that a DeepSpeed engine trains."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import wraps
from typing import Any

import torch
from torch import Tensor

from .._arithmetic.formats import EMADtype
from .._checkpoint import layout, read
from .._door import Door
from .._shadow import names, report, swap
from .._shadow.blocks import as_block, is_enabled
from .._shadow.mistakes import check_by_name
from .._shadow.options import check_groups, warn_of_tau
from .._shadow.shadow_set import ShadowSet
from .._shadow.slots import Group
from .._warnings import warn
from ..schedules import Decay

try:
    from ._deepspeed import masters_of, shape_of
except ImportError as error:
    raise ImportError(
        "EMAEngine needs DeepSpeed, which is built where torch is installed: pip install "
        "--no-build-isolation deepspeed"
    ) from error

from . import _deepspeed_file as file
from ._deepspeed_checks import check_engine, refuse_by_name


class EMAEngine(Door):
    """Keep an exponential moving average (EMA) of the weights that a DeepSpeed engine trains.

    ``ema = decay * ema + (1 - decay) * masters`` after every step that is not skipped, of the fp32
    masters, sharded as they are and on their device (with ``offload_optimizer`` the CPU). The
    training is bit-equal to one without it, for ZeRO 0 to 3, and the engine's optimizer stays what
    it is. Attach it after ``deepspeed.initialize`` and before ``engine.load_checkpoint``.

    ``engine.save_checkpoint`` saves the EMA and ``engine.load_checkpoint`` loads it, bit for bit;
    a checkpoint written inside a swap goes on as if there had been none. An engine without an
    ``EMAEngine`` resumes from such a checkpoint as well (from one written inside a swap at the EMA
    weights, and ``zero_to_fp32`` of that is the EMA). Universal checkpoints do not hold it: see
    ``get_ema_state``. The random bits of a narrow ``dtype`` depend on the number of ranks.

    Args:
        engine: What ``deepspeed.initialize`` has returned first.
        decay: The share of the old EMA that is kept per optimizer step, in [0, 1], or a schedule
            ``update number (1-based) -> decay``. A param group may have its own ``ema_decay``.
        update_every: Optimizer steps between two updates; the update then applies
            ``decay ** update_every``. Default 1.
        update_after_step: Optimizer steps until averaging begins; until then the EMA is the
            training weights. Default 0.
        dtype: How an EMA tensor is stored, as for ``EMAOptimizer``. Default None: fp32.

    Raises:
        TypeError: ``engine`` is none, has no optimizer or an ``EMAOptimizer``, or is a pipeline's;
            ``decay`` names several windows.
        ValueError: A value is out of its range, or the engine is configured in a way in which the
            masters are not at hand: NVMe offload, ZenFlow, SuperOffload, masters in 16 bits,
            elastic checkpoints.
        RuntimeError: The engine has an ``EMAEngine`` already.

    Example::

        engine, *_ = deepspeed.initialize(model=model, optimizer=optimizer, config=config)
        ema = EMAEngine(engine, decay=0.999)  # before engine.load_checkpoint
        ...  # engine.backward(loss), engine.step()
        with ema.swap_ema_weights():  # on every rank
            evaluate(engine)
    """

    def __init__(
        self,
        engine: Any,
        decay: Decay = 0.999,
        *,
        update_every: int = 1,
        update_after_step: int = 0,
        dtype: EMADtype = None,
    ) -> None:
        check_engine(engine)
        if isinstance(decay, Mapping):
            raise TypeError(f"decay must be one under DeepSpeed, got the windows {list(decay)}")
        self.engine, self._masters = engine, masters_of(engine.optimizer)
        groups = self._masters.base.param_groups
        check_groups(groups)
        self._ema = ShadowSet(self._masters, decay, update_every, update_after_step, dtype)
        warn_of_tau(decay)
        self._ema.note_given(map(layout.options_of, groups))
        self._loading: tuple[read.Loaded, list[Group], list[Group]] | None = None
        self._attach()
        self._adopt()

    @as_block
    def swap_ema_weights(self, enabled: bool = True) -> Iterator[None]:
        """Exchange training weights and EMA weights for a block, and back, also on an exception.

        The masters change places with the EMA, and the weights of the forward are made from them
        anew, as a step makes them: one gather under ZeRO. Every rank enters and leaves the block.
        A step inside raises.

        Args:
            enabled: False makes the block an ordinary one.

        Raises:
            RuntimeError: The EMA weights are swapped in already.
            TypeError: ``enabled`` is a name or a decay: there is one window.
        """
        if not is_enabled(enabled):
            yield
            return
        swap.get_ready(self._ema)
        with swap.block(self._ema, "swap_ema_weights()"):
            yield

    use_ema = swap_ema_weights

    def eval(self) -> None:
        """Put the EMA weights in until ``train()``, on every rank; a no-op inside a block."""
        swap.get_ready(self._ema)
        swap.enter_eval(self._ema)

    def train(self) -> None:
        """Put the training weights back, on every rank.

        Raises:
            RuntimeError: Inside ``swap_ema_weights()``: leaving the block puts them back.
        """
        swap.get_ready(self._ema)
        swap.refuse_swapped(self._ema, "train()", also_after_eval=False)
        swap.put_back_after_eval(self._ema)

    def reset(self) -> None:
        """Have the average and its warm-up begin anew, at the weights of the next step.

        Raises:
            RuntimeError: The EMA weights are swapped in.
        """
        swap.get_ready(self._ema)
        swap.refuse_swapped(self._ema, "reset()")
        self._ema.clear()

    def ema_metrics(self) -> dict[str, float]:
        """The health of the EMA, for a logger: see ``EMAOptimizer``. Every rank calls it."""
        swap.recover(self._ema)
        return report.metrics(self._ema, self._masters.sum_over_ranks)

    def get_ema_state(self) -> dict[str, Tensor]:
        """The EMA weights by parameter name, without touching the weights; every rank calls it.

        Right at any time, also inside a swap. Before a change to or from a universal checkpoint
        keep it in a file, and give it to ``load_ema_state`` afterwards: the EMA is not in those.

        Returns:
            On the first rank whole fp32 tensors on the CPU, gathered one at a time, for
            ``model.load_state_dict(strict=False)`` and safetensors. On the others nothing.

        Raises:
            RuntimeError: Under ``round_robin_gradients``.
        """
        return self.ema_state(everywhere=False)

    def ema_state(self, everywhere: bool) -> dict[str, Tensor]:
        """``get_ema_state``, on every rank or on the first alone."""
        swap.recover(self._ema)
        refuse_by_name(self.engine)
        report.warn_export(self._ema)
        keeps, state = everywhere or torch.distributed.get_rank() == 0, {}
        with self._in_masters():
            for param, name in names.unique(self._named()).items():
                value = self._masters.read(param)
                if keeps:
                    state[name] = value.cpu()
        return state

    def load_ema_state(self, state: Mapping[str, Tensor], strict: bool = True) -> None:
        """Make ``state`` the EMA, without touching the weights; the next step averages into it.

        Args:
            state: What ``get_ema_state`` returned on the first rank; to be given on every rank.
            strict: Whether the names must be exactly those of the parameters.

        Raises:
            KeyError: Names are missing or unknown.
            ValueError: A tensor has another shape than its parameter.
            RuntimeError: The EMA weights are swapped in, or under ``round_robin_gradients``.
        """
        swap.get_ready(self._ema)
        swap.refuse_swapped(self._ema, "load_ema_state()")
        refuse_by_name(self.engine)
        check_by_name(state)
        named = self._named()
        shapes = {p: torch.empty(shape_of(p), device="meta") for p in named.values()}
        known = {name: shapes[param] for name, param in named.items()}
        values = names.matched(known, set(known.values()), state, strict)
        with (
            self._masters.unpublished(),
            swap.lent(self._ema),
        ):  # nobody waits for a rank that fails
            for param, shape in shapes.items():
                if shape in values:
                    self._masters.write(param, values[shape])
            names.take_loaded(self._ema, {master: master for master in self._ema.members()})

    @contextmanager
    def _in_masters(self) -> Iterator[None]:
        """The EMA weights in the masters, whatever the forward uses."""
        if self._ema.swapped:
            yield
            return
        with self._masters.unpublished():
            try:
                swap.swap_in(self._ema, self._ema.counted())
                yield
            finally:
                swap.put_back_for_good(self._ema)

    def _named(self) -> dict[str, Tensor]:
        """The averaged parameters of the model under all their names."""
        pairs = zip(self._ema.groups, self._masters.params(), strict=True)
        averaged = (params for group, params in pairs if self._ema.options.of(group).enabled)
        held = {id(param) for params in averaged for param in params}
        named = names.named_parameters(self.engine.module)
        return {name: param for name, param in named.items() if id(param) in held}

    def _attach(self) -> None:
        zero, base, engine = self._masters.zero, self._masters.base, self.engine
        zero.step = wraps(zero.step)(self._stepping(zero.step))
        zero.step.ema_engine = self
        engine.load_checkpoint = wraps(engine.load_checkpoint)(self._loads(engine.load_checkpoint))
        engine.save_checkpoint = wraps(engine.save_checkpoint)(self._saves(engine.save_checkpoint))
        base.register_state_dict_post_hook(self._merge)
        base.register_load_state_dict_pre_hook(self._split)
        base.register_load_state_dict_post_hook(self._install)

    def _stepping(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def step(*args: Any, **kwargs: Any) -> Any:
            ema = self._ema
            with ema.swap.alone("step()"):
                swap.recover(ema)
                swap.check_can_step(ema, False)
                lane = ema.begin_step()
                result = inner(*args, **kwargs)
                if not self._masters.was_skipped():
                    self._masters.clear_padding()
                    ema.finish_step(lane)
            return result

        return step

    def _saves(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def save_checkpoint(*args: Any, **kwargs: Any) -> Any:
            swap.recover(self._ema)
            return inner(*args, **kwargs)

        return save_checkpoint

    def _loads(self, inner: Callable[..., Any]) -> Callable[..., Any]:
        def load_checkpoint(*args: Any, **kwargs: Any) -> Any:
            swap.recover(self._ema)
            swap.refuse_swapped(self._ema, "load_checkpoint()")
            result = inner(*args, **kwargs)
            if result[0] is not None:
                self._loaded()
            return result

        return load_checkpoint

    def _loaded(self) -> None:
        """See to what was loaded, now that the masters are loaded too."""
        ema = self._ema
        self._masters.clear_padding()
        if self.engine.load_universal_checkpoint():
            ema.clear()
            warn(
                "a universal checkpoint holds no EMA: it begins at the weights of the next step. "
                "Keep get_ema_state() in a file before ds_to_universal, and give it to "
                "load_ema_state() on every rank now"
            )
            return
        saved_at = ema.take_notes().get(file.STEP)
        if saved_at not in (None, self.engine.global_steps):
            read.Loaded({}).install(ema)
            ema.warned.once("cold", file.STALE.format(saved_at, self.engine.global_steps))
        swap.resolve_pending(ema)

    def _merge(self, base: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        return file.merged(state_dict, self._ema, self.engine.global_steps)

    def _split(self, base: Any, state_dict: dict[str, Any]) -> dict[str, Any]:
        loaded = read.read(self._ema, state_dict)
        before = [dict(group) for group in base.param_groups]
        self._loading = loaded, before, state_dict["param_groups"]
        return file.stripped(state_dict)

    def _install(self, base: Any) -> None:
        assert self._loading is not None
        (loaded, before, saved), self._loading = self._loading, None
        loaded.install(self._ema, file.notes_of(saved))
        file.keep_options(base.param_groups, before, saved, self._ema.given)
        if loaded.cold:
            self._ema.warned.once("cold", file.COLD)

    def _adopt(self) -> None:
        """Take over an EMA that was loaded before, into the engine's bare optimizer."""
        self._masters.clear_padding()
        file.adopt(self._ema, self._masters.base)
        if self.engine.global_steps:
            self._loaded()
            if not self._ema.slots and not self.engine.load_universal_checkpoint():
                self._ema.warned.once("cold", file.COLD)
