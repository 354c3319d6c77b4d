"""Random bits for stochastic rounding: a hash of where an element is and which update it is.

No generator is touched, neither torch's global one nor another: the training run sees the same
random numbers with and without this, and a resumed run goes on with the very same bits.
(``_fp32_to_bf16_sr`` of torchao draws from the global generator and takes no bits of the caller's.)
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

_GOLDEN = 0x9E3779B9  # 2**32 / golden ratio, odd: neighbouring words start far apart
_BLOCK = 1 << 32  # elements after which the counter of the words would wrap: a new key there
_BYTES = {8: torch.uint8, 16: torch.uint16}


class Words:
    """Room for hashed words: a ramp and two buffers, made at the first use and kept.

    One owner at a time may fill it.
    """

    def __init__(self) -> None:
        self._made: dict[torch.device, tuple[Tensor, Tensor, Tensor]] = {}

    def of(self, length: int, device: torch.device) -> tuple[Tensor, ...]:
        """Ramp, words and spare words, each of this length."""
        kept = self._made.get(device)
        if kept is None or len(kept[0]) < length:
            ramp = torch.arange(length, dtype=torch.int32, device=device).mul_(_signed(_GOLDEN))
            kept = self._made[device] = ramp, torch.empty_like(ramp), torch.empty_like(ramp)
        return tuple(tensor[:length] for tensor in kept)


class Noise:
    """Uniform random integers of 8 or 16 bits, one for every element of a list of tensors.

        word(j) = mix((j * golden + key_1) mod 2**32, key_2)

    One hashed 32-bit word serves four (two) neighbouring elements. ``mix`` is lowbias32 (C.
    Wellons, public domain; the finaliser of murmur3 with better constants) with the second key
    added between its multiplications, so that two streams are never shifted copies of each other.
    The keys come from the stream number by splitmix64 (S. Vigna, public domain).

    Args:
        bits: 8 or 16.
        stream: Any integer; each update uses its own.
        starts: For each tensor the position of its first element in one numbering of all elements.
            Only the position and the stream decide on an element's bits, so that cutting a tensor
            in pieces, or the order of the list, changes nothing.
        sizes: For each tensor its number of elements.
        capacity: The largest number of elements that one ``fill_`` will ask for.
        device: Where the bits are made.
        words: Where to find room for them; None makes it.
    """

    def __init__(
        self,
        bits: int,
        stream: int,
        starts: Sequence[int],
        sizes: Sequence[int],
        capacity: int,
        device: torch.device,
        words: Words | None = None,
    ) -> None:
        self._dtype = _BYTES[bits]
        self._per_word = 32 // bits
        self._key = _mix64(stream)
        self._runs = _runs(starts, sizes)
        length = capacity // self._per_word + 2
        self._ramp, self._words, self._spare = (words or Words()).of(length, device)

    def fill_(self, out: Tensor) -> None:
        """Write the next ``out.numel()`` integers into a flat int32 tensor."""
        done, used = 0, 0
        waiting: list[tuple[Tensor, Tensor]] = []
        for start, size in self._take(out.numel()):
            count = (start % self._per_word + size - 1) // self._per_word + 1
            if used + count > len(self._words):
                self._flush(used, waiting)
                used, waiting = 0, []
            key = start // self._per_word * _GOLDEN + _mix64(self._key + start // _BLOCK)
            words = self._words[used : used + count]
            torch.add(self._ramp[:count], _signed(key), out=words)
            first = start % self._per_word
            integers = words.view(self._dtype)[first : first + size]
            waiting.append((out[done : done + size], integers))
            done, used = done + size, used + count
        self._flush(used, waiting)

    def _flush(self, used: int, waiting: list[tuple[Tensor, Tensor]]) -> None:
        _mix_(self._words[:used], self._spare[:used], self._key >> 32)
        for target, integers in waiting:
            target.copy_(integers)

    def _take(self, count: int) -> Iterator[tuple[int, int]]:
        """The next positions as runs (first, how many) that cross no block."""
        while count:
            start, size = self._runs.pop()
            taken = min(size, count, _BLOCK - start % _BLOCK)
            if taken < size:
                self._runs.append((start + taken, size - taken))
            count -= taken
            yield start, taken


def _mix_(words: Tensor, spare: Tensor, key: int) -> None:
    _fold_(words, spare, 16)
    words.mul_(_signed(0x7FEB352D)).add_(_signed(key))
    _fold_(words, spare, 15)
    words.mul_(_signed(0x846CA68B))
    _fold_(words, spare, 16)


def _fold_(words: Tensor, spare: Tensor, shift: int) -> None:
    torch.bitwise_right_shift(words, shift, out=spare)
    # int32 shifts its sign in: without the mask the highest bit would always end as 0.
    words.bitwise_xor_(spare.bitwise_and_((1 << (32 - shift)) - 1))


def _runs(starts: Sequence[int], sizes: Sequence[int]) -> list[tuple[int, int]]:
    """Runs of neighbouring positions as (first, how many), the last one first."""
    runs: list[tuple[int, int]] = []
    for start, size in zip(starts, sizes, strict=True):
        if runs and sum(runs[-1]) == start:
            runs[-1] = (runs[-1][0], runs[-1][1] + size)
        elif size:
            runs.append((start, size))
    return runs[::-1]


def _mix64(number: int) -> int:
    state = (number + 0x9E3779B97F4A7C15) % 2**64
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB % 2**64
    return state ^ (state >> 31)


def _signed(number: int) -> int:
    """The int32 with the same lower 32 bits."""
    return (number + 2**31) % 2**32 - 2**31
