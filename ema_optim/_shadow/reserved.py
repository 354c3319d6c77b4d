"""The keys of a parameter's state that are ours."""

from collections.abc import Sequence

from torch.optim import Optimizer


class ReservedKeys:
    """Whether the inner optimizer keeps something of its own under our keys.

    Looked for whenever its state has grown; once it does, every later step raises before it moves.
    """

    def __init__(self) -> None:
        self._entries = 0  # when last looked at
        self._refusal: TypeError | None = None

    def look(self, inner: Optimizer, keys: Sequence[str]) -> None:
        """Raise TypeError where the inner optimizer has taken one of the keys."""
        state = [entry for entry in inner.state.values() if isinstance(entry, dict)]
        entries = sum(map(len, state))
        if entries == self._entries:
            return
        self._entries = entries
        if taken := sorted({key for entry in state for key in keys if key in entry}):
            name = type(inner).__name__
            self._refusal = TypeError(
                f"optimizer must not use the state keys {tuple(keys)}, got {taken} in the state "
                f"of {name}: use EMAModel beside {name} instead"
            )
        self.refuse()

    def refuse(self) -> None:
        """Raise what was found before."""
        if self._refusal is not None:
            raise self._refusal
