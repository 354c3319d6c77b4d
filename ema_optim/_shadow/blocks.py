"""The ``with`` blocks of the front doors: told when left unused, and several as one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, _GeneratorContextManager, contextmanager, nullcontext
from functools import wraps
from typing import Any, ParamSpec

from .._warnings import warn

P = ParamSpec("P")


class _Block(_GeneratorContextManager[None]):
    """A block that says so when it was made and never entered."""

    unused: str | None = None  # the call, until it is entered

    def __enter__(self) -> None:
        self.unused = None
        super().__enter__()

    def _recreate_cm(self) -> Any:  # as a decorator
        self.unused = None
        return super()._recreate_cm()

    def __del__(self) -> None:
        if self.unused is not None:
            warn(
                f"{self.unused}() without `with` swaps nothing: write `with {self.unused}(...):` "
                "and what is to see the EMA weights inside"
            )


def as_block(
    function: Callable[P, Iterator[None]],
) -> Callable[P, AbstractContextManager[None]]:
    """As ``contextlib.contextmanager``, with a warning where the ``with`` was forgotten."""

    @wraps(function)
    def made(*args: P.args, **kwargs: P.kwargs) -> AbstractContextManager[None]:
        block = _Block(function, args, kwargs)  # type: ignore[arg-type]
        block.unused = function.__name__
        return block

    return made


def is_enabled(enabled: object) -> bool:
    """Whether a block is to swap; raise TypeError for an average, which would swap the first."""
    if isinstance(enabled, (str, float)) or callable(enabled):
        raise TypeError(
            f"enabled must be True or False, got {enabled!r}: an average is named by decay=, as in "
            f"swap_ema_weights(decay={enabled!r})"
        )
    return bool(enabled)


@as_block
def swap_ema_weights(owners: Sequence[Any], enabled: bool = True) -> Iterator[None]:
    """Swap several optimizers (and EMAModels) as one: all of them, or none.

    When one of them cannot be swapped, or an error or an interrupt comes in between, those that
    were swapped before it get their training weights back, bit for bit.

    Args:
        owners: Each an ``EMAOptimizer`` or an ``EMAModel``, over parameters of its own.
        enabled: False makes the block an ordinary one.

    Raises:
        TypeError: One of them has no EMA of its own.
        ValueError: One of them is there twice.
        RuntimeError: One of them is swapped in already; nothing is swapped then.

    Example:
        >>> models = [torch.nn.Linear(2, 2), torch.nn.Linear(2, 1)]  # a generator and a critic
        >>> inner = [torch.optim.Adam(model.parameters()) for model in models]
        >>> optimizers = [EMAOptimizer(optimizer, decay=0.999) for optimizer in inner]
        >>> with swap_ema_weights(optimizers):
        ...     models[1](models[0](torch.randn(8, 2)))
    """
    _check_owners(owners)
    with _nested(list(owners) if is_enabled(enabled) else []):
        yield


@contextmanager
def _nested(owners: Sequence[Any]) -> Iterator[None]:
    # One `with` in another, no ExitStack: its list of exits would outlive an interrupt that comes
    # between two of them in the traceback, and the blocks in it would count as still to be left.
    # By halves: an optimizer for every parameter would go deeper than Python does.
    if len(owners) < 2:
        with owners[0].swap_ema_weights() if owners else nullcontext():
            yield
        return
    half = len(owners) // 2
    with _nested(owners[:half]), _nested(owners[half:]):
        yield


def _check_owners(owners: Sequence[Any]) -> None:
    if not isinstance(owners, (list, tuple)):
        raise TypeError(
            f"swap_ema_weights() takes a list of EMAOptimizers and EMAModels, got {type(owners)}: "
            "for one, call its own swap_ema_weights()"
        )
    for owner in owners:
        if not callable(getattr(owner, "swap_ema_weights", None)):
            raise TypeError(
                f"swap_ema_weights() takes EMAOptimizers and EMAModels, got {type(owner)}: pass "
                "the EMAOptimizer itself where a library has wrapped it"
            )
    if len(set(map(id, owners))) < len(owners):
        raise ValueError("swap_ema_weights() takes each optimizer once, got one of them twice")
