"""The arithmetic on lists of tensors against float64, torch.lerp and numpy."""

import math

import numpy as np
import pytest
import torch
from interrupts import Interrupt, failing_copy
from measured import peak_allocation

from ema_optim._arithmetic.average import (
    Casts,
    copy_,
    ema_update_,
    non_finite,
    relative_distance,
    squared_norms,
)
from ema_optim._arithmetic.exchange import Exchange
from ema_optim._arithmetic.scratch import CHUNK

SIZES = [0, *range(1, 70), 1023, 1024, 4097, 65537, 3 * CHUNK + 5]
SAME = [torch.float32, torch.float64, torch.complex64, torch.complex128]
WIDER = [
    (torch.bfloat16, torch.float32),
    (torch.float16, torch.float32),
    (torch.bfloat16, torch.float64),
    (torch.float32, torch.float64),
    (torch.float64, torch.float32),
    (torch.complex64, torch.complex128),
]
PAIRS = [(dtype, dtype) for dtype in SAME] + WIDER
each_pair = pytest.mark.parametrize(("weights", "ema"), PAIRS, ids=str)
MIB = 2**20


def tensors(sizes, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = torch.complex128 if dtype.is_complex else torch.float64
    return [torch.randn(size, dtype=wide, generator=generator).to(dtype) for size in sizes]


def clones(originals):
    return [tensor.clone() for tensor in originals]


def bits(tensor):
    """Every bit of the values, so that NaN payloads and the sign of zero count."""
    real = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return real.view({2: torch.int16, 4: torch.int32, 8: torch.int64}[real.itemsize])


def same_bits(lefts, rights):
    return all(torch.equal(bits(a), bits(b)) for a, b in zip(lefts, rights, strict=True))


def exact(tensor):
    return tensor.to(torch.complex128 if tensor.is_complex() else torch.float64)


@each_pair
@pytest.mark.parametrize("decay", [0.3, 0.999, 0.999999])
def test_update_is_the_formula_in_double_precision(weights, ema, decay):
    params, emas = tensors(SIZES, weights), tensors(SIZES, ema, seed=1)
    before = clones(emas)
    ema_update_(emas, params, decay)
    for new, old, param in zip(emas, before, params, strict=True):
        expected = decay * exact(old) + (1 - decay) * exact(param)
        room = 2 * torch.finfo(ema).eps * (exact(old).abs() + exact(param).abs())
        assert bool(((exact(new) - expected).abs() <= room).all())


@each_pair
@pytest.mark.parametrize("decay", [0.3, 0.5, 0.999])
def test_update_is_bit_equal_to_lerp_per_tensor(weights, ema, decay):
    params, emas = tensors(SIZES, weights), tensors(SIZES, ema, seed=1)
    expected = [torch.lerp(e, p.to(ema), 1 - decay) for e, p in zip(emas, params, strict=True)]
    ema_update_(emas, params, decay)
    assert same_bits(emas, expected)


@each_pair
def test_decay_0_copies_the_weights_also_over_nan(weights, ema):
    params = tensors(SIZES, weights)
    emas = [torch.full_like(param, math.nan, dtype=ema) for param in params]
    ema_update_(emas, params, 0.0)
    assert same_bits(emas, [param.to(ema) for param in params])


@each_pair
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_decay_1_does_nothing_also_for_non_finite_weights(weights, ema, bad):
    emas = tensors(SIZES[:9], ema)
    before = clones(emas)
    ema_update_(emas, [torch.full_like(e, bad, dtype=weights) for e in emas], 1.0)
    assert same_bits(emas, before)


@each_pair
@pytest.mark.parametrize("decay", [0.4, 0.9999])
def test_constant_weights_are_a_fixed_point_bit_for_bit(weights, ema, decay):
    # The form ema * decay + weights * (1 - decay) is off by 1.7e-4 here after enough updates:
    # rounded separately, its two factors do not sum to one.
    params = [t.to(weights) for t in tensors([1, 8, 67, 4097], torch.float16)]
    emas = [param.to(ema) for param in params]
    for _ in range(1000):
        ema_update_(emas, params, decay)
    assert same_bits(emas, [param.to(ema) for param in params])


def test_fp32_ema_of_bf16_weights_moves_where_bf16_would_not():
    params, emas = [torch.full((3,), 1.0625, dtype=torch.bfloat16)], [torch.ones(3)]
    for _ in range(1000):
        ema_update_(emas, params, 0.99)
    expected = 1.0625 - 0.0625 * 0.99**1000
    torch.testing.assert_close(emas[0], torch.full((3,), expected), rtol=0, atol=1e-5)


@pytest.mark.parametrize("decay", [0.0, 0.5, 1.0])
def test_nothing_to_update_is_no_error(decay):
    ema_update_([], [], decay)
    copy_([], [])
    Exchange([], []).run()


def transposed(values):
    return values.transpose(0, -1).contiguous().transpose(0, -1)


def strided(values):
    base = torch.full((*values.shape[:-1], 2 * values.shape[-1]), 7.0, dtype=values.dtype)
    return base[..., ::2].copy_(values)


def columns(values):
    base = torch.full((*values.shape[:-1], values.shape[-1] + 3), 7.0, dtype=values.dtype)
    return base[..., 2:-1].copy_(values)


LAYOUTS = {
    "contiguous": torch.clone,
    "channels_last": lambda values: values.clone(memory_format=torch.channels_last),
    "transposed": transposed,
    "permuted": lambda values: values.permute(2, 0, 3, 1).contiguous().permute(1, 3, 0, 2),
    "strided": strided,
    "columns": columns,
    "columns_transposed": lambda values: columns(values.transpose(0, -1)).transpose(0, -1),
}
each_layout = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
SHAPES = [(2, 3, 4, 5), (1, 6, 1, 7), (64, 32, 13, 11), (0, 3, 4, 5), (1, 1, 1, 1)]


@each_layout
@pytest.mark.parametrize("other", LAYOUTS.values(), ids=LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_follows_the_shape_whatever_the_strides(layout, other, dtype):
    params = [layout(torch.randn(shape, dtype=dtype)) for shape in SHAPES]
    emas = [other(torch.randn(shape)) for shape in SHAPES]
    expected = [torch.lerp(e, p.float(), 0.1) for e, p in zip(emas, params, strict=True)]
    ema_update_(emas, params, 0.9)
    torch.testing.assert_close(emas, expected, rtol=1e-6, atol=1e-7)


@each_layout
@pytest.mark.parametrize("other", LAYOUTS.values(), ids=LAYOUTS)
def test_exchange_follows_the_shape_whatever_the_strides(layout, other):
    lefts = [layout(torch.randn(shape)) for shape in SHAPES]
    rights = [other(torch.randn(shape)) for shape in SHAPES]
    before = clones(lefts), clones(rights)
    Exchange(lefts, rights).run()
    assert same_bits(lefts, before[1])
    assert same_bits(rights, before[0])


BIG_VIEWS = {
    "flat with a step": lambda: torch.full((2 * CHUNK + 9,), 7.0)[::2][: CHUNK + 3],
    "rows longer than the scratch": lambda: torch.full((3, CHUNK + 9), 7.0)[:, 1:-1],
    "many short rows": lambda: torch.full((CHUNK // 4, 9), 7.0)[:, 2:8],
    "its transpose": lambda: torch.full((CHUNK // 4, 9), 7.0)[:, 2:8].t(),
    "one long row": lambda: torch.full((1, CHUNK + 9), 7.0)[:, 1:-1],
    "a block of a block": lambda: torch.full((5, 300, 400), 7.0)[1:4, 7:, ::2],
}


@pytest.mark.parametrize("make", BIG_VIEWS.values(), ids=BIG_VIEWS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_update_of_a_large_view_leaves_its_gaps_alone(make, dtype):
    ema = make()
    ema.fill_(1.0)
    params = [torch.full(ema.shape, 2.0, dtype=dtype)]
    ema_update_([ema], params, 0.5)
    assert bool((ema == 1.5).all())
    assert int((ema._base == 7.0).sum()) == ema._base.numel() - ema.numel()


@pytest.mark.parametrize("make", BIG_VIEWS.values(), ids=BIG_VIEWS)
def test_exchange_of_a_large_view_leaves_its_gaps_alone(make):
    left = make()
    values = torch.randn(left.shape)
    right = values.clone()
    Exchange([left], [right]).run()
    assert torch.equal(left, values)
    assert bool((right == 7.0).all())
    assert int((left._base != 7.0).sum()) == values.numel()


COPIES = 18  # three for each batch of the tensors below


def mixed(seed):
    """Six batches: small tensors, a scratch buffer's fill, its rest, and three more dtypes."""
    sizes = {
        torch.float32: [3, CHUNK + 11, 0, 40],
        torch.float64: [17, CHUNK // 2],
        torch.half: [5],
    }
    made = [t for dtype, rows in sizes.items() for t in tensors(rows, dtype, seed)]
    specials = torch.tensor([math.nan, -0.0, 0.0, math.inf, -math.inf, 1e-45])
    payload = torch.tensor([0x7FC12345, 0x7F800001], dtype=torch.int32).view(torch.float32)
    return [*made, specials, payload, torch.tensor(float(seed)), torch.empty(0, 3)]


def test_exchange_twice_is_the_identity_bit_for_bit():
    lefts, rights = mixed(1), mixed(2)
    before, addresses = (clones(lefts), clones(rights)), [t.data_ptr() for t in lefts + rights]
    Exchange(lefts, rights).run()
    assert same_bits(lefts, before[1])
    assert same_bits(rights, before[0])
    Exchange(lefts, rights).run()
    assert same_bits(lefts, before[0])
    assert same_bits(rights, before[1])
    assert [t.data_ptr() for t in lefts + rights] == addresses


def test_undo_before_run_and_after_a_complete_run_puts_everything_back():
    lefts, rights = mixed(1), mixed(2)
    before = clones(lefts + rights)
    exchange = Exchange(lefts, rights)
    exchange.undo()
    assert same_bits(lefts + rights, before)
    exchange = Exchange(lefts, rights)
    exchange.run()
    exchange.undo()
    assert same_bits(lefts + rights, before)


def large(seed, dtype):
    """Two pieces and a half of a scratch buffer, NaN and infinity among them."""
    random = torch.Generator().manual_seed(seed)
    tensor = torch.randn(5 * CHUNK // 2, dtype=torch.float32, generator=random).to(dtype)
    tensor[:: CHUNK // 3] = math.nan
    tensor[1 :: CHUNK // 3] = math.inf
    return [tensor]


EVERY_SIZE = [*range(1, 70), 1023, 1024, 4097, 65537]


@pytest.mark.parametrize("layout", [torch.clone, transposed, strided, columns])
@pytest.mark.parametrize("dtype", [*SAME, torch.float16, torch.bfloat16], ids=str)
def test_one_tensor_alone_is_exchanged_bit_for_bit_at_every_size(layout, dtype):
    for size in EVERY_SIZE:
        (left,), (right,) = tensors([(2, size)], dtype, 1), tensors([(2, size)], dtype, 2)
        ours, theirs = layout(left.clone()), right.clone()
        Exchange([ours], [theirs]).run()
        assert same_bits([ours, theirs], [right, left]), size


@pytest.mark.parametrize(("weights", "ema"), WIDER, ids=str)
def test_prepared_casts_average_bit_for_bit_as_fresh_ones_and_follow_the_data(weights, ema):
    sizes = [*EVERY_SIZE, 0, CHUNK + 5, 3]
    emas, params = tensors(sizes, ema), [torch.nn.Parameter(p) for p in tensors(sizes, weights, 1)]
    fresh, casts = clones(emas), Casts(emas)
    for seed in (2, 3):
        with torch.no_grad():
            ema_update_(emas, params, 0.9, casts)
            ema_update_(fresh, params, 0.9)
        assert same_bits(emas, fresh)
        for param, values in zip(params, tensors(sizes, weights, seed), strict=True):
            param.data = values


LARGE = [torch.float32, torch.float64, torch.bfloat16, torch.complex64]


@pytest.mark.parametrize("dtype", [*LARGE, torch.complex128, torch.float16], ids=str)
def test_large_tensors_are_exchanged_bit_for_bit(dtype):
    lefts, rights = large(1, dtype), large(2, dtype)
    before = clones(lefts), clones(rights)
    Exchange(lefts, rights).run()
    assert same_bits(lefts, before[1])
    assert same_bits(rights, before[0])


@pytest.mark.parametrize("size", [7, CHUNK, 5 * CHUNK // 2])
@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("at", [0, -1])
def test_a_watched_exchange_doubts_what_is_not_finite(size, value, at):
    lefts, rights = [torch.ones(size), torch.ones(3)], [torch.zeros(size), torch.zeros(3)]
    for bad in (False, True):
        lefts[0][at] = value if bad else 1.0
        exchange = Exchange(lefts, rights, watched=True)
        exchange.run()
        assert exchange.doubtful() == bad
        exchange.undo()


@pytest.mark.parametrize("done", [0.0, 0.5, 1.0], ids=["before", "half-way", "after"])
@pytest.mark.parametrize("nth", range(COPIES))
def test_undo_restores_both_sides_after_a_failure_of_any_copy(monkeypatch, nth, done):
    lefts, rights = mixed(1), mixed(2)
    before = clones(lefts + rights)
    exchange = Exchange(lefts, rights)
    with monkeypatch.context() as patch:
        patch.setattr(torch, "_foreach_copy_", failing_copy(nth, done))
        with pytest.raises(Interrupt):
            exchange.run()
    exchange.undo()
    assert same_bits(lefts + rights, before)


def test_the_failures_above_cover_every_copy_of_the_exchange(monkeypatch):
    monkeypatch.setattr(torch, "_foreach_copy_", failing_copy(COPIES, 0.0))
    Exchange(mixed(1), mixed(2)).run()


def large_model(dtype, layout=torch.clone):
    shapes = [(1024, 1024), (1000, 1200), (300, 900), *[(64,)] * 50, (1_500_000,)]
    return [layout(torch.ones(shape, dtype=dtype)) for shape in shapes]


def test_allocations_are_seen_where_they_are_made():
    emas = large_model(torch.float32)
    size = sum(ema.numel() for ema in emas) * 4
    assert size > 10 * MIB
    assert peak_allocation(lambda: clones(emas)) >= size


@pytest.mark.parametrize("layout", [torch.clone, transposed, strided, columns])
@pytest.mark.parametrize(("weights", "ema"), [(torch.float32, torch.float32), *WIDER], ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.9])
def test_scratch_of_an_update_stays_below_4_mib(layout, weights, ema, decay):
    emas, params = large_model(ema), large_model(weights, layout)
    assert peak_allocation(lambda: ema_update_(emas, params, decay)) <= 4 * MIB


@pytest.mark.parametrize("layout", [torch.clone, transposed, strided, columns])
def test_scratch_of_an_exchange_and_its_undo_stays_below_4_mib(layout):
    lefts, rights = large_model(torch.float32, layout), large_model(torch.float32)

    def there_and_back():
        exchange = Exchange(lefts, rights)
        exchange.run()
        exchange.undo()

    assert peak_allocation(there_and_back) <= 4 * MIB


def distance(emas, weights):
    parts = [(ema, weight, 1.0) for ema, weight in zip(emas, weights, strict=True)]
    return relative_distance([norms.tolist() for norms in squared_norms(parts)])


def test_scratch_of_the_distance_stays_below_4_mib():
    emas, params = large_model(torch.float32), large_model(torch.bfloat16)
    assert peak_allocation(lambda: distance(emas, params)) <= 4 * MIB
    assert peak_allocation(lambda: non_finite(emas)) <= 4 * MIB


@pytest.mark.parametrize(
    ("weights", "ema"),
    [(torch.float32, torch.float32), (torch.float64, torch.float64), *WIDER],
    ids=str,
)
@pytest.mark.parametrize("scale", [1e-3, 1.0])
def test_distance_is_that_of_numpy_in_double_precision(weights, ema, scale):
    sizes = [0, 1, 7, 4097, CHUNK + 5]
    params = tensors(sizes, weights)
    emas = [param.to(ema) * (1 + scale) for param in params]
    flat_ema, flat = (np.concatenate([exact(t).numpy() for t in side]) for side in (emas, params))
    expected = np.linalg.norm(flat_ema - flat) / np.linalg.norm(flat)
    assert distance(emas, params) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("size", [1e-30, 1e30])
def test_distance_has_no_overflow_of_squares(size):
    weights = torch.full((CHUNK + 1,), size)
    assert distance([weights * 1.5], [weights]) == pytest.approx(0.5, rel=1e-6)


@pytest.mark.parametrize(
    ("emas", "weights", "expected"),
    [
        ([], [], 0.0),
        ([torch.empty(0)], [torch.empty(0)], 0.0),
        ([torch.zeros(2)], [torch.zeros(2)], 0.0),
        ([torch.ones(2)], [torch.zeros(2)], math.inf),
        ([torch.zeros(2)], [torch.ones(2)], 1.0),
        ([torch.tensor(4.0), torch.zeros(2)], [torch.tensor(3.0), torch.zeros(2)], 1 / 3),
        ([torch.tensor([3j])], [torch.tensor([4j])], 0.25),
        ([torch.tensor([math.nan])], [torch.ones(1)], math.nan),
        ([torch.ones(1)], [torch.tensor([math.nan])], math.nan),
        ([torch.tensor([math.inf])], [torch.ones(1)], math.inf),
    ],
)
def test_distance_at_its_edges(emas, weights, expected):
    assert distance(emas, weights) == pytest.approx(expected, rel=1e-12, nan_ok=True)


NAN, INF, ONES = torch.tensor([1.0, math.nan]), torch.tensor([[-math.inf]]), torch.ones(3)
BIGGEST = {dtype: torch.finfo(dtype).max for dtype in (torch.float16, torch.bfloat16, *SAME[:2])}


@pytest.mark.parametrize(
    ("made", "expected"),
    [
        ([], []),
        ([torch.empty(0)], []),
        ([ONES], []),
        ([ONES, NAN, ONES, INF, torch.tensor(math.inf)], [1, 3, 4]),
        ([torch.empty(0), NAN, torch.empty(2, 0), INF, ONES.double(), NAN.double()], [1, 3, 5]),
        ([NAN.bfloat16(), ONES, INF.half(), ONES.half(), NAN.double(), INF], [0, 2, 4, 5]),
        ([torch.tensor([complex(1, math.nan)]), torch.tensor([1j])], [0]),
        ([torch.tensor([complex(math.inf, 0)]), torch.tensor(1j)], [0]),
        ([torch.cat([torch.ones(CHUNK), NAN])], [0]),
        ([torch.ones(4, 4)[:, 1], torch.full((4, 4), math.nan).t()[1:]], [1]),
        *[([torch.full((2,), big, dtype=dtype)], []) for dtype, big in BIGGEST.items()],
        ([torch.full((2,), complex(3e38, -3e38))], []),
    ],
)
def test_non_finite_names_the_tensors_that_hold_nan_or_infinity(made, expected):
    assert non_finite(made) == expected
