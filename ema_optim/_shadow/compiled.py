"""One compiled graph for the inner optimizer's step and the EMA: each weight is read once.

    begin_step (Python)  ->  [ inner step, lerp, lerp, ... ] (traced)  ->  finish_step (Python)

Seeding, counters and every decision stay in Python. The traced step is the one without torch's
decorators, which break the graph in two places. What changes from step to step goes in as a 0-dim
tensor: a Python number would be compiled into the graph. Where the graph cannot stand in for the
inner step, that step is made as ever, and a warning says why.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import count
from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.optim import LBFGS, Adam, AdamW, Optimizer
from torch.optim import optimizer as torch_optimizer

from .._engines.sharding import is_sharded
from .._warnings import log, warn
from .buckets import Bucket
from .holdings import no_autograd
from .lanes import Lane
from .slots import Group

Plan = list[tuple[Bucket, float]]
Closure = Callable[[], Any] | None

# Where torch's decorators of step() live; what they do is done around the graph or not needed.
_DECORATORS = ("torch.optim.optimizer", "torch.utils._contextlib")
_LIMIT = "FailOnRecompileLimitHit"  # not in every version of torch
_NARROW = {torch.bfloat16, torch.float16}
_NUMBERS = count()


class CompiledStep:
    """Stands in for the inner step, together with the EMA where there is an update.

    Args:
        options: What ``torch.compile`` takes beside ``fullgraph``.
    """

    def __init__(self, options: dict[str, Any]) -> None:
        # The whole graph or none: a break would have the weights read twice, and an error after it
        # would leave half a step behind.
        self._graph: Callable[..., Any] = torch.compile(
            _of_its_own(_step_and_average), fullgraph=True, **options
        )
        self._failed = self._traced = False
        graphs = (options.get("options") or {}).get("triton.cudagraphs", False)
        self._replays = graphs or options.get("mode") in ("reduce-overhead", "max-autotune")
        self._stateless: set[Tensor] = set()  # parameters without inner state, before a step
        self._scalars: dict[tuple[Any, ...], Tensor] = {}
        self._warned: set[str] = set()

    def check(self, inner: Optimizer) -> None:
        """Warn right away of what will keep the graph from being used."""
        trained = [param for param in _params(inner) if param.requires_grad]
        self._warn(_obstacle(inner, None) or _unsuited(trained))

    def refuses(self, *more: Any) -> bool:
        """Whether the step was given what the graph does not take."""
        return self._warn("step() was given more than a closure" if any(more) else "")

    def step(self, inner: Optimizer, lane: Lane | None, closure: Closure) -> Any:
        """Step, and make those updates of the lane's windows that fit into the same graph.

        Those that remain to be made stay in the plans.
        """
        if self._failed or self._warn(_obstacle(inner, closure)):
            return inner.step() if closure is None else inner.step(closure)
        if closure is None:
            return self._step_on_grads(inner, lane)
        with torch.enable_grad():
            loss = closure()
        self._step_on_grads(inner, lane)
        return loss

    def _step_on_grads(self, inner: Optimizer, lane: Lane | None) -> Any:
        if not self._is_ready(inner):
            return inner.step()
        lanes = [] if lane is None else lane.all_windows()
        plan = [item for each in lanes for item in each.plan]
        fitting = [(bucket, factor) for bucket, factor in plan if _fits(bucket, factor)]
        try:
            result = self._run(inner, fitting)
        except _compile_errors() as error:  # raised before anything has run
            self._failed = True
            self._warn(f"{type(inner).__name__} could not be compiled ({_reason(error)})")
            return inner.step()
        for bucket, factor in fitting:
            bucket.counter.share *= factor
        done = {id(bucket) for bucket, _ in fitting}
        for each in lanes:
            each.plan = [item for item in each.plan if id(item[0]) not in done]
        return result

    def _run(self, inner: Optimizer, updates: Plan) -> Any:
        name = f"Optimizer.step#{type(inner).__name__}.step"  # as in profiles of the eager step
        with no_autograd(), self._as_tensors(inner.param_groups):
            averages = [
                (bucket.emas, bucket.params, bucket.met, self._rate(index, bucket, factor))
                for index, (bucket, factor) in enumerate(updates)
            ]
            self._log_first(inner, updates)
            if self._replays:
                _mark_addresses(ema for bucket, _ in updates for ema in bucket.emas)
            with torch.profiler.record_function(name), _settings(_params(inner)):
                return self._graph(undecorated_step(inner), inner, averages)

    def _log_first(self, inner: Optimizer, updates: Plan) -> None:
        if not self._traced:
            self._traced = True
            count = sum(len(bucket.emas) for bucket, _ in updates)
            text = "compiling the step of %s and the EMA of %s tensors: seconds to minutes"
            log(text, type(inner).__name__, count)

    def _is_ready(self, inner: Optimizer) -> bool:
        params = [param for param in _params(inner) if param.grad is not None]
        if self._warn(_sparse(params) or _unsuited(params)):
            return False
        if not inner.state and inner.param_groups[0].get("ema_step"):
            return True  # it has made steps and keeps nothing
        # A graph that creates state would be of no use to the next step: that one is eager.
        before, self._stateless = self._stateless, {p for p in params if not _has_state(inner, p)}
        return bool(params) and self._stateless <= before

    @contextmanager
    def _as_tensors(self, groups: Sequence[Group]) -> Iterator[None]:
        """Hide the numbers that change with every step; the user's groups hold floats as ever."""
        hidden: list[tuple[Group, str, Any, Any]] = []
        try:
            for index, group in enumerate(groups):
                for key in ("lr", "ema_decay", "ema_step"):
                    if isinstance(value := group.get(key), (int, float)):
                        stand_in = self._learning_rate(index, group) if key == "lr" else 0
                        hidden.append((group, key, stand_in, value))
                        group[key] = stand_in
            yield
        finally:
            for group, key, stand_in, value in hidden:
                if group[key] is stand_in:  # else the step has set it
                    group[key] = value

    def _learning_rate(self, index: int, group: Group) -> Tensor:
        device = group["params"][0].device if group["params"] else torch.device("cpu")
        # In double precision, as the Python float that it stands for.
        dtype = torch.float32 if device.type == "mps" else torch.float64
        return self._scalar("lr", index, dtype, device).fill_(group["lr"])

    def _rate(self, index: int, bucket: Bucket, factor: float) -> Tensor:
        ema = bucket.emas[0]
        return self._scalar("rate", index, ema.dtype, ema.device).fill_(1.0 - factor)

    def _scalar(self, *key: Any) -> Tensor:
        if key not in self._scalars:
            *_, dtype, device = key
            self._scalars[key] = torch.zeros((), dtype=dtype, device=device)
        return self._scalars[key]

    def _warn(self, reason: str) -> bool:
        if reason and reason not in self._warned:
            self._warned.add(reason)
            warn(f"compile() has no effect, the step runs in eager mode: {reason}")
        return bool(reason)


def _mark_addresses(emas: Iterable[Tensor]) -> None:
    # Dynamo does this for the inner optimizer's state alone, and for other tensors that are written
    # to Inductor makes no CUDA graph.
    for ema in emas:
        torch._dynamo.mark_static_address(ema, guard=False)  # a load replaces them: record anew


def undecorated_step(inner: Optimizer) -> Any:
    """The step of an optimizer's class without torch's decorators."""
    return inspect.unwrap(
        type(inner).step,
        stop=lambda function: function.__globals__["__name__"] not in _DECORATORS,
    )


def _step_and_average(
    step: Any,
    inner: Optimizer,
    averages: list[tuple[list[Tensor], list[Tensor], Tensor | None, Tensor]],
) -> Any:
    result = step(inner)
    for emas, weights, met, rate in averages:
        for i, (ema, weight) in enumerate(zip(emas, weights, strict=True)):
            if met is None:
                ema.lerp_(weight.to(ema.dtype), rate)
                continue
            finite = torch.isfinite(weight)
            met[i].logical_or_(~finite.all())
            ema.copy_(torch.where(finite, torch.lerp(ema, weight.to(ema.dtype), rate), ema))
    return result


def _of_its_own(function: Any) -> Any:
    # Dynamo counts graphs by code object, and remembers what has changed by its name: a second
    # optimizer would reach the first one's limit, and count as the first one with other shapes.
    code = function.__code__.replace(co_name=f"{function.__name__}_{next(_NUMBERS)}")
    return FunctionType(code, function.__globals__)


def _settings(params: Sequence[Tensor]) -> Any:
    """What torch's own compiler is to do otherwise than by default, where it compiles."""
    from torch._inductor import config

    settings: dict[str, Any] = {}
    if not _NARROW.isdisjoint({param.dtype for param in params}):
        # Else narrow weights are averaged before they are rounded, and only stored after it.
        settings["emulate_precision_casts"] = True
    if all(param.device.type == "cpu" for param in params[:1]):
        # Else the bias corrections, two powers, are computed again for every few elements, and
        # AdamW takes twice the time.
        settings["realize_opcount_threshold"] = 6
    return config.patch(settings)


def _fits(bucket: Bucket, factor: float) -> bool:
    # The ends are exact in eager mode: a NaN or an infinity would come through a weight of 0.
    own_way = bucket.sharded or bucket.quantized or bucket.format.rounds or bucket.staging
    if own_way or not 0.0 < factor < 1.0:
        return False
    return bucket.emas[0].is_floating_point()


def _obstacle(inner: Optimizer, closure: Closure) -> str:
    """Why the next step cannot be the compiled one, as far as the optimizer itself tells."""
    if _hooks(inner):
        return "step hooks are registered on the inner optimizer or on all; register them on this"
    if "step" in vars(inner):
        return "the inner optimizer's step is patched; build schedulers with the EMAOptimizer"
    if isinstance(inner, LBFGS):
        return "LBFGS evaluates its closure several times in a step"
    step = undecorated_step(inner)
    if closure is not None and not step.__module__.startswith("torch.optim."):
        return "what this optimizer does with a closure is unknown; call step() without one"
    return next(filter(None, (_group_obstacle(inner, group) for group in inner.param_groups)), "")


def _group_obstacle(inner: Optimizer, group: Group) -> str:
    if group.get("fused") or getattr(inner, "_step_supports_amp_scaling", False):
        return "a fused step is a kernel of its own; build the inner optimizer without fused=True"
    if group.get("differentiable"):
        return "differentiable=True records the step for autograd"
    capturable = group.get("capturable")
    # Its step refuses the learning rate as a tensor then.
    if isinstance(inner, (Adam, AdamW)) and group.get("foreach") and not capturable:
        return "foreach=True wants a fixed learning rate; leave it out, or add capturable=True"
    on_gpu = any(param.device.type in ("cuda", "xpu") for param in group["params"][:1])
    if on_gpu and capturable is False:
        return "its step counters are on the CPU; build the inner optimizer with capturable=True"
    return ""


def _hooks(inner: Optimizer) -> bool:
    return any(
        (
            inner._optimizer_step_pre_hooks,
            inner._optimizer_step_post_hooks,
            torch_optimizer._global_optimizer_pre_hooks,
            torch_optimizer._global_optimizer_post_hooks,
        )
    )


def _unsuited(params: Sequence[Tensor]) -> str:
    if any(param.is_complex() for param in params):
        return "a parameter is complex"
    if any(map(is_sharded, params)):
        return "a parameter is spread over ranks"
    return ""


def _sparse(params: Sequence[Tensor]) -> str:
    dense = all(param.grad is None or param.grad.layout is torch.strided for param in params)
    return "" if dense else "a gradient is sparse; build the embedding without sparse=True"


def _has_state(inner: Optimizer, param: Tensor) -> bool:
    state = inner.state.get(param) or {"": None}
    return all(value is not None for value in state.values())


def _params(inner: Optimizer) -> list[Tensor]:
    return [param for group in inner.param_groups for param in group["params"]]


def _compile_errors() -> tuple[type[BaseException], ...]:
    # Looked up late: importing ema_optim does not import the compiler.
    exc = torch._dynamo.exc
    return exc.TorchDynamoException, getattr(exc, _LIMIT, exc.TorchDynamoException)


def _reason(error: BaseException) -> str:
    if type(error).__name__ == _LIMIT:
        return "something in it changes again and again, and torch's recompile limit is reached"
    error = getattr(error, "inner_exception", error)
    first_line = next(iter(str(error).strip().splitlines()), "")
    return f"{type(error).__name__}: {first_line}"
