"""What is told: warnings that point at the user's line, once and on one rank, and the log."""

import logging
import sys
import warnings

import torch.distributed as dist

_OURS = ("ema_optim", "contextlib", "torch", "accelerate", "transformers", "lightning")
_LOG = logging.getLogger("ema_optim")
_told: set[str] = set()  # what is said once in a process


class EMAWarning(UserWarning):
    """The category of every warning of this package, for ``warnings.filterwarnings``."""


def warn(message: str, every_rank: bool = False, once: str | None = None) -> None:
    """Issue an ``EMAWarning`` at the innermost frame that is the user's, not a library's.

    Args:
        message: What is wrong, and the remedy.
        every_rank: For what the first rank may not know of; else it alone warns.
        once: A key under which it is said once in this process. Default None: every time.
    """
    if once in _told or not (every_rank or _is_first()):
        return
    if once is not None:
        _told.add(once)
    level = 1
    while _is_ours(level):
        level += 1
    warnings.warn(message, EMAWarning, stacklevel=level + 1)


def log(message: str, *args: object) -> None:
    """Say at level INFO, through ``logging.getLogger("ema_optim")``, what was done or chosen."""
    if _is_first():
        _LOG.info(message, *args)


def _is_first() -> bool:
    return not (dist.is_available() and dist.is_initialized()) or dist.get_rank() == 0


def _is_ours(level: int) -> bool:
    try:
        name = sys._getframe(level + 1).f_globals.get("__name__", "")
    except ValueError:  # the stack ends inside the package: an embedding without a user frame
        return False
    return any(name == ours or name.startswith(f"{ours}.") for ours in _OURS)


class Warned(set[str]):
    """The kinds of warnings that one object has given already."""

    def once(self, kind: str, message: str) -> None:
        """Warn, unless that kind was given before."""
        if kind not in self:
            self.add(kind)
            warn(message)
