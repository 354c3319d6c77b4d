"""Warnings that point at the user's line, however many frames lie between."""

import sys
import warnings

_OURS = ("ema_optim", "contextlib", "torch", "accelerate", "transformers", "lightning")


def warn(message: str) -> None:
    """Issue a ``UserWarning`` at the innermost frame that is the user's, not a library's."""
    level = 1
    while _is_ours(level):
        level += 1
    warnings.warn(message, stacklevel=level + 1)


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
