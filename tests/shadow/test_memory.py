"""Which tensors share memory, against the byte addresses of all their elements."""

import itertools
import random

import numpy as np
import pytest
import torch

from ema_optim._shadow.memory import shared_memory

BASE = torch.arange(24.0)
GRID = BASE.view(4, 6)
BYTES = torch.zeros(8, dtype=torch.float8_e5m2)


def span(tensor):
    """First and last byte, found by looking at the address of every element."""
    # One corner is enough for the first: torch knows no negative strides.
    corners = itertools.product(*({0, size - 1} for size in tensor.shape))
    addresses = [tensor[corner].data_ptr() for corner in corners]
    return min(addresses), max(addresses) + tensor.itemsize - 1


def overlapping(tensors):
    spans = {id(t): span(t) for t in tensors if t.numel()}
    pairs = itertools.combinations(spans.items(), 2)
    met = [(a, b) for (a, one), (b, two) in pairs if one[0] <= two[1] and two[0] <= one[1]]
    return set(itertools.chain.from_iterable(met))


@pytest.mark.parametrize(
    ("tensors", "shared"),
    [
        ([], []),
        ([BASE], []),
        ([torch.ones(3), torch.ones(3)], []),
        ([BASE[:3], BASE[3:]], []),
        ([BASE[:4], BASE[3:]], [0, 1]),
        ([BASE[3:], BASE[:4]], [0, 1]),
        ([BASE, BASE.view(4, 6)], [0, 1]),
        ([BASE, torch.ones(2), BASE[5]], [0, 2]),
        ([BASE, BASE[2:4], BASE[8:9], torch.ones(1)], [0, 1, 2]),
        ([BASE[:4], BASE[2:6], BASE[6:], BASE[5]], [0, 1, 3]),
        ([GRID[:2], GRID[2:]], []),
        ([GRID[0], GRID[1], GRID], [0, 1, 2]),
        ([GRID.t(), BASE[23]], [0, 1]),
        ([GRID[:, :3], GRID[3, 3:]], []),
        ([BASE[0].expand(5), BASE[1:]], []),
        ([BASE[:0], BASE[3:3], BASE], []),
        ([torch.empty(0), torch.empty(0)], []),
        ([torch.empty(0, 5), torch.empty(3, 0, 2), torch.ones(())], []),
        ([torch.empty(3, 0, 2), torch.empty(2, 0, 3)], []),
        ([BYTES[:4], BYTES[3:]], [0, 1]),
        ([BYTES[:4], BYTES[4:]], []),
    ],
)
def test_tensors_with_overlapping_memory_are_found(tensors, shared):
    assert shared_memory(tensors) == {tensors[i] for i in shared}


@pytest.mark.parametrize("seed", range(20))
def test_any_views_of_one_buffer_agree_with_their_addresses(seed):
    pick = random.Random(seed)
    buffer, views = torch.zeros(400), [torch.ones(3)]
    for _ in range(pick.randint(2, 7)):
        shape = pick.choice([(), (1,), (4,), (2, 3), (3, 2, 2)])
        strides = [pick.randint(0, 6) for _ in shape]
        views.append(buffer.as_strided(shape, strides, pick.randint(0, 300)))
    assert {id(tensor) for tensor in shared_memory(views)} == overlapping(views)


@pytest.mark.parametrize(
    ("wide", "narrow", "shared"),
    [
        (slice(0, 6), slice(10, 16), True),
        (slice(0, 6), slice(12, 16), False),
        (slice(2, 4), slice(0, 4), False),
        (slice(2, 4), slice(0, 5), True),
        (slice(0, 1), slice(1, 2), True),
    ],
)
def test_views_of_two_dtypes_are_compared_by_bytes(wide, narrow, shared):
    # Offsets and strides count elements of the view's own dtype.
    base = torch.zeros(8, dtype=torch.complex64)
    views = [base[wide], torch.view_as_real(base).view(-1)[narrow]]
    assert shared_memory(views) == (set(views) if shared else set())


def test_two_storages_over_one_buffer_are_found():
    # from_numpy makes a storage that begins where the array does, so the two have no storage in
    # common.
    array = np.zeros(10, dtype=np.float32)
    views = [torch.from_numpy(array), torch.from_numpy(array[2:])]
    assert shared_memory(views) == set(views)


def test_equal_values_are_not_shared_memory():
    assert shared_memory([torch.zeros(2), torch.zeros(2), torch.zeros(2)]) == set()


def test_parameters_of_a_module_are_told_apart_by_identity():
    layer = torch.nn.Linear(3, 3)
    view = torch.nn.Parameter(layer.weight.detach()[1:])
    assert shared_memory([layer.bias, layer.weight, view]) == {layer.weight, view}
