"""The counter hash against numpy's unsigned arithmetic, and its statistics."""

import numpy as np
import pytest
import torch

from ema_optim._arithmetic.noise import Noise

MASK = 2**64 - 1
WIDTHS = [8, 16]
each_width = pytest.mark.parametrize("bits", WIDTHS)


def noise(bits, stream, starts, sizes, capacity=None):
    total = sum(sizes)
    out = torch.full((total,), -1, dtype=torch.int32)
    source = Noise(bits, stream, starts, sizes, capacity or total, out.device)
    for piece in out.split(capacity or max(total, 1)):
        source.fill_(piece)
    return out


def splitmix64(state):
    state = (state + 0x9E3779B97F4A7C15) & MASK
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & MASK
    return state ^ (state >> 31)


def lowbias32(words, key):
    words = (words ^ (words >> np.uint32(16))) * np.uint32(0x7FEB352D) + np.uint32(key)
    words = (words ^ (words >> np.uint32(15))) * np.uint32(0x846CA68B)
    return words ^ (words >> np.uint32(16))


def expected(bits, stream, positions):
    key = splitmix64(stream & MASK)
    blocks = {int(b): splitmix64(key + int(b)) & 0xFFFFFFFF for b in set(positions >> 32)}
    first = np.array([blocks[int(b)] for b in positions >> 32], dtype=np.uint32)
    words = (positions // (32 // bits)).astype(np.uint32) * np.uint32(0x9E3779B9) + first
    shift = (positions % (32 // bits) * bits).astype(np.uint32)
    return (lowbias32(words, key >> 32) >> shift) & np.uint32(2**bits - 1)


@each_width
@pytest.mark.parametrize("stream", [0, 1, -7, 2**40 + 3, 2**64 - 1])
@pytest.mark.parametrize("start", [0, 1, 2, 3, 4, 12345, 2**31 - 5, 2**32 - 6, 2**35 + 1])
def test_the_hash_is_that_of_unsigned_arithmetic(bits, stream, start):
    positions = np.arange(start, start + 1001, dtype=np.int64)
    ours = noise(bits, stream, [start], [1001]).numpy()
    assert np.array_equal(ours, expected(bits, stream, positions).astype(np.int32))


def test_the_bits_are_those_of_earlier_versions():
    assert noise(8, 1, [0], [8]).tolist() == [83, 88, 81, 34, 167, 54, 200, 49]
    sixteen = [22611, 8785, 13991, 12744, 14131, 55294, 23674, 23259]
    assert noise(16, 1, [0], [8]).tolist() == sixteen


@each_width
def test_cutting_and_order_change_no_bit(bits):
    sizes = [1, 2, 3, 0, 5, 1000, 1, 7, 4096]
    starts = np.cumsum([3, *sizes])[:-1].tolist()
    whole = noise(bits, 5, [3], [sum(sizes)])
    assert torch.equal(noise(bits, 5, starts, sizes), whole)
    assert torch.equal(noise(bits, 5, starts, sizes, capacity=11), whole)
    shuffled = noise(bits, 5, starts[::-1], sizes[::-1])
    parts = [whole[start - 3 : start - 3 + size] for start, size in zip(starts, sizes, strict=True)]
    assert torch.equal(shuffled, torch.cat(parts[::-1]))


@each_width
def test_scattered_positions_take_more_words_than_the_buffer_holds(bits):
    positions = np.arange(0, 9000, 9)
    ours = noise(bits, 2, positions.tolist(), [1] * len(positions)).numpy()
    assert np.array_equal(ours, expected(bits, 2, positions).astype(np.int32))


def signs(bits, integers):
    """Bits as rows of +1 and -1."""
    rows = torch.arange(bits, dtype=torch.int32)[:, None]
    return ((integers >> rows) & 1).double() * 2 - 1


def worst(left, right):
    """The largest correlation between a bit of one and a bit of the other, in standard errors."""
    return float((left @ right.T).abs().max() / left.shape[1] ** 0.5)


COUNT = 2**18


@each_width
@pytest.mark.parametrize("stream", [0, 1, 1000])
def test_integers_are_uniform(bits, stream):
    integers = noise(bits, stream, [0], [COUNT])
    counts = torch.bincount(integers >> (bits - 8), minlength=256).double()
    chi_square = float(((counts - COUNT / 256) ** 2 / (COUNT / 256)).sum())
    assert len(counts) == 256
    assert abs(chi_square - 255) < 5 * (2 * 255) ** 0.5
    assert worst(signs(bits, integers), torch.ones(1, COUNT, dtype=torch.double)) < 5


@each_width
@pytest.mark.parametrize("lag", [1, 2, 3, 4, 5, 8, 64, 1024, 65536])
def test_neighbours_are_uncorrelated(bits, lag):
    rows = signs(bits, noise(bits, 3, [0], [COUNT]))
    assert worst(rows[:, lag:], rows[:, :-lag]) < 5.5


@each_width
@pytest.mark.parametrize("other", [1, 2, 3, 4, 256, 2**31, 2**32, 2**63])
def test_updates_are_uncorrelated(bits, other):
    rows, others = (signs(bits, noise(bits, s, [0], [COUNT])) for s in (7, 7 + other))
    assert worst(rows, others) < 5.5


@each_width
@pytest.mark.parametrize("start", [2**k for k in range(18, 36)])
def test_tensors_are_uncorrelated(bits, start):
    rows, others = (signs(bits, noise(bits, 7, [s], [COUNT])) for s in (0, start))
    assert worst(rows, others) < 5.5


@each_width
def test_one_element_is_uncorrelated_over_its_updates(bits):
    draws = torch.stack([noise(bits, stream, [1000], [8]) for stream in range(4000)])
    rows = signs(bits, draws.T.reshape(8, 1, -1))
    size = rows.shape[-1] ** 0.5
    assert float(rows.mean(-1).abs().max()) * size < 5
    assert float((rows[..., 1:] * rows[..., :-1]).mean(-1).abs().max()) * size < 5


def test_no_generator_is_touched():
    before = torch.get_rng_state()
    noise(16, 1, [0], [100])
    assert torch.equal(torch.get_rng_state(), before)
