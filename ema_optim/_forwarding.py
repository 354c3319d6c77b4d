"""An optimizer that stands in front of another one: torch's surface and hooks, no arithmetic."""

import copy
from collections import OrderedDict
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from torch.optim import Optimizer

Group = dict[str, Any]

_HOOKS = (
    "_optimizer_step_pre_hooks",
    "_optimizer_step_post_hooks",
    "_optimizer_state_dict_pre_hooks",
    "_optimizer_state_dict_post_hooks",
    "_optimizer_load_state_dict_pre_hooks",
    "_optimizer_load_state_dict_post_hooks",
)


class ForwardingOptimizer(Optimizer):
    """The part of an optimizer's surface that is the inner optimizer's, looked up where it lives.

    Forwarded and not shared: torch replaces ``param_groups`` on every load, and a second reference
    to the old ones would disconnect the learning-rate scheduler without a word. The instance's
    hooks run here, around what a subclass does; the inner optimizer's and torch's global ones run
    inside the inner optimizer: each once.
    """

    inner: Optimizer

    def __init__(self, optimizer: Optimizer) -> None:
        # Optimizer.__init__ is not called: it would build groups, state and a profiled step of its
        # own beside the inner optimizer's.
        ForwardingOptimizer.__setstate__(self, {"inner": optimizer})

    if not TYPE_CHECKING:  # a type checker would take every name for one that is there

        def __getattr__(self, name: str) -> Any:
            """Name the way to what the inner optimizer alone has."""
            inner = self.__dict__.get("inner")
            remedy = ""
            if not name.startswith("_") and hasattr(inner, name):
                remedy = f": the inner optimizer has it, use .inner.{name}"
                if callable(getattr(inner, name)):
                    remedy += (
                        ". Only step() and update() average: an optimizer that is stepped by other "
                        "names takes EMAOptimizer.for_class(...) as its base, or EMAModel is used"
                    )
            raise AttributeError(f"{type(self).__name__} has no attribute {name!r}{remedy}")

    @property
    def param_groups(self) -> list[Group]:
        """The inner optimizer's param groups."""
        return self.inner.param_groups

    @param_groups.setter
    def param_groups(self, value: list[Group]) -> None:
        self.inner.param_groups = value

    @property
    def defaults(self) -> dict[str, Any]:
        """The inner optimizer's defaults."""
        return self.inner.defaults

    @defaults.setter
    def defaults(self, value: dict[str, Any]) -> None:
        self.inner.defaults = value

    # A GradScaler sets the next two on the optimizer it was given, steps a fused optimizer even
    # when the step is to be skipped, and deletes them again. It reads them with a default, so a
    # missing one has to stay an AttributeError.

    @property
    def grad_scale(self) -> Any:
        """The scale by which a fused inner optimizer divides the gradients."""
        return self.inner.grad_scale  # type: ignore[attr-defined]

    @grad_scale.setter
    def grad_scale(self, value: Any) -> None:
        self.inner.grad_scale = value  # type: ignore[attr-defined]

    @grad_scale.deleter
    def grad_scale(self) -> None:
        del self.inner.grad_scale  # type: ignore[attr-defined]

    @property
    def found_inf(self) -> Any:
        """Whether a fused inner optimizer is to skip the step."""
        return self.inner.found_inf  # type: ignore[attr-defined]

    @found_inf.setter
    def found_inf(self, value: Any) -> None:
        self.inner.found_inf = value  # type: ignore[attr-defined]

    @found_inf.deleter
    def found_inf(self) -> None:
        del self.inner.found_inf  # type: ignore[attr-defined]

    @property
    def _step_supports_amp_scaling(self) -> bool:
        return bool(self.inner._step_supports_amp_scaling)  # type: ignore[attr-defined]

    def _hooked_step(
        self, step: Callable[..., Any], closure: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        """Make a step between this instance's hooks."""
        # With the optimizer in front, as torch hands the arguments to hooks.
        args = (self, closure, *args) if args or closure is not None else (self,)
        for pre_hook in self._optimizer_step_pre_hooks.values():
            if (changed := pre_hook(self, args, kwargs)) is not None:
                if not isinstance(changed, tuple) or len(changed) != 2:
                    raise RuntimeError(
                        f"a step pre-hook must return None or (args, kwargs), got {changed!r}"
                    )
                args, kwargs = changed
        result = step(*args[1:], **kwargs)
        for post_hook in self._optimizer_step_post_hooks.values():
            post_hook(self, args, kwargs)
        return result

    def _hooked_state_dict(self, save: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """Make a state dict between this instance's hooks."""
        for pre_hook in self._optimizer_state_dict_pre_hooks.values():
            pre_hook(self)
        state_dict = save()
        for post_hook in self._optimizer_state_dict_post_hooks.values():
            if (changed := post_hook(self, state_dict)) is not None:
                state_dict = changed
        return state_dict

    def _hooked_load_state_dict(
        self, load: Callable[[dict[str, Any]], None], state_dict: Mapping[str, Any]
    ) -> None:
        """Load a state dict between this instance's hooks."""
        if isinstance(state_dict, Mapping):  # that of a chain may be a list
            state_dict = dict(state_dict)
        for pre_hook in self._optimizer_load_state_dict_pre_hooks.values():
            if (changed := pre_hook(self, state_dict)) is not None:
                state_dict = changed
        load(state_dict)
        for post_hook in self._optimizer_load_state_dict_post_hooks.values():
            post_hook(self)

    def _load_inner(self, state_dict: dict[str, Any]) -> None:
        before = self.inner.state, self.inner.param_groups
        try:
            self.inner.load_state_dict(state_dict)
        except BaseException as error:
            # Torch replaces both before a subclass looks into them and may refuse.
            for name, value in zip(("state", "param_groups"), before, strict=True):
                with suppress(AttributeError):  # a wrapper may only show those of another
                    setattr(self.inner, name, value)
            if isinstance(error, (KeyError, IndexError, AttributeError)):
                raise ValueError(
                    f"state_dict must have what {type(self.inner).__name__} needs, got one at "
                    f"which it raises {error!r}: it is damaged, or another optimizer's"
                ) from error
            raise

    def __getstate__(self) -> dict[str, Any]:
        """For pickle and deepcopy. Hooks and patches of ``step`` stay behind, as with torch."""
        return {"inner": self.inner}

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Restore what ``__getstate__`` gave."""
        self.__dict__.update(state)
        for name in _HOOKS:
            self.__dict__.setdefault(name, OrderedDict())
        self._warned_capturable_if_run_uncaptured = True


def inner_step(
    inner: Optimizer, closure: Callable[[], Any] | None, args: tuple[Any, ...], kwargs: Any
) -> Any:
    """Step an optimizer with what the user gave; it may tell a missing closure from None."""
    if args or closure is not None:
        return inner.step(closure, *args, **kwargs)
    return inner.step(**kwargs)


def call_if_there(optimizer: Optimizer, name: str) -> None:
    """Call a method that some optimizers have."""
    # Schedule-free optimizers have eval() and train(); torch's own have neither.
    method = getattr(optimizer, name, None)
    if method is not None:
        method()


def forwarding_class(base: Any, optimizer_class: Any, options: dict[str, Any]) -> Any:
    """A subclass of ``base`` that builds its inner optimizer from ``(params, ...)``."""

    def __init__(self: Any, params: Any, *args: Any, **kwargs: Any) -> None:
        base.__init__(self, optimizer_class(params, *args, **kwargs), **options)

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:
        cls: Any = type(self)
        made = memo[id(self)] = cls.__new__(cls)
        made.__setstate__(copy.deepcopy(self.__getstate__(), memo))
        return made

    def __reduce_ex__(self: Any, protocol: int) -> tuple[Any, ...]:
        # The class is made at run time: pickle finds it by its ingredients, not by a name.
        return _blank, (base, optimizer_class, options), self.__getstate__()

    name = f"EMA{getattr(optimizer_class, '__name__', 'Optimizer')}"
    methods = {f.__name__: f for f in (__init__, __deepcopy__, __reduce_ex__)}
    body = {**methods, "__module__": base.__module__}
    return type(name, (base,), {**body, "__doc__": base.__doc__})


def _blank(base: Any, optimizer_class: Any, options: dict[str, Any]) -> Any:
    made = forwarding_class(base, optimizer_class, options)
    return made.__new__(made)
