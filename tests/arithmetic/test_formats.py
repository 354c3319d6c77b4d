"""The storage formats: what a store keeps, and how the EMA moves in them, against float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from measured import peak_allocation

from ema_optim._arithmetic.average import ema_update_
from ema_optim._arithmetic.formats import FORMATS, Update, format_of
from ema_optim._arithmetic.scratch import CHUNK

MIB = 2**20
ROUNDED = ["float24", torch.bfloat16]
each_format = pytest.mark.parametrize("name", FORMATS, ids=str)
each_rounded = pytest.mark.parametrize("name", ROUNDED, ids=str)
CUT = {"float24": 8, torch.bfloat16: 16}  # bits of fp32 that are not kept


def empty(name, params):
    form = FORMATS[name]
    mains = [torch.empty_like(param, dtype=form.main) for param in params]
    lows = [torch.empty_like(param, dtype=form.low) for param in params] if form.low else []
    return mains, lows


def stored(name, params):
    mains, lows = empty(name, params)
    FORMATS[name].encode_(mains, lows, params)
    return mains, lows


def form_of(mains, lows):
    return format_of(mains[0].dtype, lows[0].dtype if lows else None)


def decoded(mains, lows, dtype=torch.float64):
    targets = [torch.empty_like(main, dtype=dtype) for main in mains]
    form_of(mains, lows).decode_(targets, mains, lows)
    return targets


def positions(tensors):
    return list(itertools.accumulate((t.numel() for t in tensors[:-1]), initial=0))


def update(parts, params, decay, stream=1, starts=None):
    starts = positions(params) if starts is None else starts
    form_of(*parts).update_(*parts, params, Update(decay, stream, starts))
    return parts


def normal(*shapes, dtype=torch.float32, seed=0):
    generator = torch.Generator().manual_seed(seed)
    wide = [torch.randn(shape, dtype=torch.float64, generator=generator) for shape in shapes]
    return [tensor.to(dtype) for tensor in wide]


def patterns(integers):
    return torch.from_numpy(np.asarray(integers, dtype=np.uint32).view(np.int32)).view(torch.float)


def same(lefts, rights):
    """Bit equality of lists of tensors."""
    ints = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    pairs = [[t.view(ints[t.element_size()]) for t in p] for p in zip(lefts, rights, strict=True)]
    return all(torch.equal(*pair) for pair in pairs)


def same_parts(left, right):
    return all(same(*lists) for lists in zip(left, right, strict=True))


EVERY_16 = np.arange(2**16, dtype=np.uint32) << 16
EDGES = [0, 2**23 - 2**15, 2**24 - 2**15, 0x7F000000, 0x7F7F8000, 0x7F800000]
EDGES += [2**31 + edge for edge in EDGES]
# A sample of all exponents, and all patterns about the ends of the ranges.
MANY_24 = np.unique(
    np.concatenate(
        [EVERY_16, np.arange(0, 2**32, 256 * 61, dtype=np.uint32)]
        + [np.arange(edge, min(edge + 2**24, 2**32), 256, dtype=np.uint32) for edge in EDGES]
    )
)


@pytest.mark.parametrize(
    ("name", "grid"), [(torch.bfloat16, EVERY_16), ("float24", MANY_24)], ids=["16", "24"]
)
def test_every_pattern_on_the_grid_is_kept(name, grid):
    values = patterns(grid)
    (kept,) = decoded(*stored(name, [values]), dtype=torch.float32)
    numbers = ~values.isnan()
    assert same([kept[numbers]], [values[numbers]])
    assert bool(kept[~numbers].isnan().all())


@each_rounded
@pytest.mark.parametrize("decay", [0.25, 0.999])
def test_an_ema_that_is_at_its_weights_is_left_alone(name, decay):
    values = patterns(MANY_24 if name == "float24" else EVERY_16)
    values = values[values.isfinite()]
    (kept,) = decoded(*update(stored(name, [values]), [values], decay))
    assert torch.equal(kept, values.double())


def test_main_of_float24_is_its_nearest_bfloat16():
    (main,), (low,) = stored("float24", [patterns(MANY_24)])
    (value,) = decoded([main], [low], torch.float32)
    nearest = value.bfloat16()
    tie = low == -128  # rounded away from zero, as an int8 has to have it
    finite = value.isfinite()
    assert same([main[~tie & finite]], [nearest[~tie & finite]])
    gap, other = ((t.double() - value.double()).abs()[tie & finite] for t in (main, nearest))
    assert torch.equal(gap, other)


def nearest(values, cut):
    """Round to nearest, ties to even, in integers."""
    integers = values.view(torch.int32).numpy().view(np.uint32).astype(np.int64)
    half = (1 << (cut - 1)) - 1 + ((integers >> cut) & 1)
    return patterns((integers + half) >> cut << cut)


@each_rounded
def test_a_store_rounds_to_nearest(name):
    generator = np.random.default_rng(0)
    values = patterns(generator.integers(0, 2**32, 300_000, dtype=np.uint32))
    ties = patterns(generator.integers(0, 2**16, 9999, dtype=np.uint32) << 16 | 0x8080)
    values = torch.cat([values, ties])
    values = values[values.isfinite()]
    (kept,) = decoded(*stored(name, [values]), dtype=torch.float32)
    assert same([kept], [nearest(values, CUT[name])])


SPECIAL = [0x7F800000, 0xFF800000, 0x80000000, 0x00000000, 0x00000100, 0x80000100, 0x7F7FFF00]
NANS = [0x7F800001, 0xFF800001, 0x7FFFFFFF, 0xFFFFFFFF, 0x7FC00000, 0x7F8000FF, 0x7FFFFF80]


@each_format
@pytest.mark.parametrize("write", ["store", "update", "weights"])
def test_a_nan_stays_a_nan(name, write):
    values = patterns(NANS * 50)
    if write == "store":
        parts = stored(name, [values])
    elif write == "update":
        parts = update(stored(name, [values]), [torch.ones_like(values)], 0.9)
    else:
        parts = update(stored(name, [torch.ones_like(values)]), [values], 0.9)
    for kept in (*parts[0], *decoded(*parts)):
        assert bool(kept.isnan().all())


@each_rounded
@pytest.mark.parametrize("pattern", [0x7F81, 0x7FFF, 0xFF81, 0xFFFF, 0x7FC0])
def test_a_nan_in_storage_stays_a_nan(name, pattern):
    main = torch.from_numpy(np.full(100, pattern, dtype=np.uint16).view(np.int16))
    lows = [torch.arange(100, dtype=torch.int8)] if name == "float24" else []
    parts = update(([main.view(torch.bfloat16)], lows), [torch.ones(100)], 0.9)
    assert bool(decoded(*parts)[0].isnan().all())


@each_format
def test_infinities_signed_zeros_and_subnormals_are_kept(name):
    values = patterns(SPECIAL) if name != torch.bfloat16 else patterns(SPECIAL).bfloat16().float()
    assert same(decoded(*stored(name, [values]), dtype=torch.float32), [values])


def test_the_largest_numbers_are_kept_where_main_is_infinite():
    values = patterns([0x7F7FFF00, 0xFF7FFF00])
    mains, lows = stored("float24", [values])
    assert mains[0].tolist() == [math.inf, -math.inf]
    assert same(decoded(mains, lows, torch.float32), [values])
    assert same(update((mains, lows), [values], 0.9)[0], stored("float24", [values])[0])


@each_format
def test_an_infinite_weight_makes_the_ema_infinite(name):
    mains, lows = update(stored(name, [torch.zeros(64)]), [torch.full((64,), -math.inf)], 0.9)
    assert mains[0].tolist() == [-math.inf] * 64
    for dtype in (torch.float32, torch.float64):
        assert decoded(mains, lows, dtype)[0].tolist() == [-math.inf] * 64


@each_rounded
def test_an_update_is_one_of_the_two_neighbours_and_right_on_average(name):
    start, target = normal(64, 64, seed=3)
    start = nearest(start, CUT[name])
    emas, params = ([t.repeat(10_000, 1)] for t in (start, target))
    new = decoded(*update(stored(name, emas), params, 0.93))[0]
    exact = torch.lerp(start, target, 1 - 0.93)
    below = patterns(exact.view(torch.int32).numpy().view(np.uint32) >> CUT[name] << CUT[name])
    above = (below.view(torch.int32) + (1 << CUT[name])).view(torch.float).double()
    assert bool(((new == below.double()) | (new == above)).all())
    share = (exact.double() - below.double()) / (above - below.double())
    error = (above - below.double()).abs() * (share * (1 - share) / 10_000).sqrt()
    assert bool(((new.mean(0) - exact.double()).abs() <= 5 * error).all())


@each_rounded
def test_the_stream_decides_the_bits(name):
    emas, params = normal(999), normal(999, seed=1)
    first, again, other = (update(stored(name, emas), params, 0.9, s) for s in (4, 4, 5))
    assert same_parts(first, again)
    assert not same_parts(first, other)


@each_format
def test_cutting_tensors_changes_no_bit(name):
    emas, params = normal(3 * CHUNK + 5), normal(3 * CHUNK + 5, seed=1)
    whole = update(stored(name, emas), params, 0.9, starts=[7])
    cuts = [1, 2, 3, 5000, CHUNK, CHUNK + 1, 0, 4]
    cuts.append(3 * CHUNK + 5 - sum(cuts))
    parts = stored(name, emas)
    pieces = [[piece for t in part for piece in t.split(cuts)] for part in parts]
    params = list(params[0].split(cuts))
    update(pieces, params, 0.9, starts=[7 + start for start in positions(params)])
    assert same_parts(parts, whole)


@each_format
def test_the_order_of_the_list_changes_no_bit(name):
    shapes = [(3, 5), (), (700,), (0, 4), (1,), (CHUNK // 2,), (2, 3, 4), (CHUNK + 9,)]
    emas, params = normal(*shapes), normal(*shapes, seed=1)
    whole, shuffled = update(stored(name, emas), params, 0.9), stored(name, emas)
    order = [5, 0, 7, 3, 1, 6, 2, 4]
    starts = [positions(params)[i] for i in order]
    lists = [[part[i] for i in order] if part else [] for part in (*shuffled, params)]
    FORMATS[name].update_(*lists, Update(0.9, 1, starts))
    assert same_parts(shuffled, whole)


LAYOUTS = {
    "transposed": lambda t: t.transpose(0, -1).contiguous().transpose(0, -1),
    "channels_last": lambda t: t.clone(memory_format=torch.channels_last),
    "strided": lambda t: torch.stack([t, t], dim=-1)[..., 0],
    "columns": lambda t: torch.cat([t, t], dim=1)[:, : t.shape[1]],
}
SHAPES = [(2, 3, 4, 5), (1, 6, 1, 7), (70, 32, 13, 11), (0, 3, 4, 5), (1, 1, 1, 1)]


@each_format
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_weights_of_any_layout_give_the_same_bits(name, layout):
    emas, params = normal(*SHAPES), normal(*SHAPES, seed=1)
    plain = update(stored(name, emas), params, 0.9)
    assert same_parts(update(stored(name, emas), [layout(p) for p in params], 0.9), plain)


def in_memory_order(tensors, mains):
    orders = [sorted(range(4), key=main.stride, reverse=True) for main in mains]
    return [t.permute(o).contiguous() for t, o in zip(tensors, orders, strict=True)]


@each_format
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_elements_count_in_the_order_of_memory(name, layout):
    emas, params = normal(*SHAPES), normal(*SHAPES, seed=1)
    mains, lows = update(stored(name, [layout(e) for e in emas]), params, 0.9)
    ordered = [in_memory_order(tensors, mains) for tensors in (emas, params)]
    flat = update(stored(name, ordered[0]), ordered[1], 0.9)
    assert same(in_memory_order(mains, mains), flat[0])
    assert not lows or same(in_memory_order(lows, mains), flat[1])


@each_format
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_weights_of_any_dtype_are_taken_as_fp32(name, dtype):
    shapes = [(), (5, 7), (3000,), (0,)]
    emas, params = normal(*shapes), normal(*shapes, dtype=dtype, seed=1)
    parts = update(stored(name, emas), params, 0.9)
    assert same_parts(parts, update(stored(name, emas), [p.float() for p in params], 0.9))


@each_format
def test_the_ends_of_the_decay_are_exact(name):
    emas, params = normal((4, 5), ()), normal((4, 5), (), seed=1)
    broken = [torch.full_like(p, math.nan) for p in params]
    assert same_parts(update(stored(name, emas), broken, 1.0), stored(name, emas))
    assert same_parts(update(stored(name, broken), params, 0.0), stored(name, params))


@each_format
@pytest.mark.parametrize("target", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_values_are_read_into_any_dtype(name, target):
    shapes = [(3, 4), (), (0, 2), (CHUNK + 3,)]
    parts = stored(name, normal(*shapes, dtype=torch.float64))
    exact = decoded(*parts, torch.float32)
    if name == "float32_compensated" and target == torch.float64:
        exact = [m.double() + low.double() for m, low in zip(*parts, strict=True)]
    if FORMATS[name].main == target:  # what a swap shows, which exchanges the main tensors
        exact = parts[0]
    assert same(decoded(*parts, target), [value.to(target) for value in exact])


def test_a_compensated_store_keeps_32_bits_of_a_double():
    values = normal(5000, dtype=torch.float64)
    (kept,) = decoded(*stored("float32_compensated", values))
    assert float(((kept - values[0]) / values[0]).abs().max()) < 2**-32
    special = [torch.tensor([math.inf, -math.inf, 0.0, 1e300], dtype=torch.float64)]
    mains, lows = stored("float32_compensated", special)
    (kept,) = decoded(mains, lows)
    assert lows[0].tolist() == [0.0] * 4
    assert kept.tolist() == [math.inf, -math.inf, 0.0, math.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_plain_ema_is_updated_as_one(dtype):
    emas, params = normal((3, 4), (), dtype=dtype), normal((3, 4), (), seed=1)
    expected = [ema.clone() for ema in emas]
    ema_update_(expected, params, 0.9)
    assert same(update((emas, []), params, 0.9)[0], expected)


@pytest.mark.parametrize(
    ("name", "most"), [("float32_compensated", 1e-7), ("float24", 3e-3), (torch.bfloat16, 0.1)]
)
def test_an_ema_follows_a_random_walk_as_in_double_precision(name, most):
    (weights,) = normal(4096, dtype=torch.float64)
    exact, parts = weights.clone(), stored(name, [weights.float()])
    for step in range(1, 401):
        weights += 0.02 * normal(4096, dtype=torch.float64, seed=step)[0]
        exact.lerp_(weights.float().double(), 1 - 0.99)
        update(parts, [weights.float()], 0.99, step)
    error = torch.linalg.vector_norm(decoded(*parts)[0] - exact)
    assert float(error / torch.linalg.vector_norm(weights - exact)) < most


def nearest_update(ema, param, decay):
    """What is never done: round the step to the nearest bfloat16."""
    ema.copy_(torch.lerp(ema.float(), param, 1 - decay))


@each_format
def test_a_small_step_arrives_where_nearest_rounding_stays(name):
    param, stuck = torch.full((20_000,), 1 + 2**-4), torch.ones(20_000, dtype=torch.bfloat16)
    parts = stored(name, [torch.ones(20_000)])
    for step in range(1000):
        update(parts, [param], 0.99, step)
        nearest_update(stuck, param, 0.99)
    assert bool((stuck == 1.0).all())
    assert abs(float(decoded(*parts)[0].mean()) - 1.0625) < 1e-3


def test_a_compensated_ema_travels_where_fp32_stands_still():
    # One step is 5e-8 of the EMA: less than half of the last bit of fp32.
    decay, steps, param = 0.99999, 5000, torch.full((64,), 1.005)
    plain, parts = [torch.ones(64)], stored("float32_compensated", [torch.ones(64)])
    for step in range(steps):
        ema_update_(plain, [param], decay)
        update(parts, [param], decay, step)
    way = (float(param[0]) - 1) * (1 - decay**steps)
    assert bool((plain[0] == 1.0).all())
    assert float((decoded(*parts)[0] - 1 - way).abs().max()) < 1e-5 * way


@each_format
def test_many_tensors_are_one_tensor_cut_in_pieces(name):
    sizes = [1 + i % 7 * 40 for i in range(3000)]
    emas, params = normal(sum(sizes)), normal(sum(sizes), seed=1)
    whole = update(stored(name, emas), params, 0.9)
    parts = stored(name, list(emas[0].split(sizes)))
    update(parts, list(params[0].split(sizes)), 0.9)
    assert same_parts([[torch.cat(part)] if part else [] for part in parts], whole)


@pytest.mark.parametrize(("name", "count"), [("float32_compensated", 6), ("float24", 3)])
def test_bytes_of_a_weight(name, count):
    parts = stored(name, [torch.zeros(10, 10)])
    assert sum(t.nbytes for part in parts for t in part) == count * 100
    assert all(t.shape == (10, 10) and t.layout == torch.strided for part in parts for t in part)


@each_format
@pytest.mark.parametrize("layout", [torch.clone, LAYOUTS["transposed"]])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_scratch_stays_below_4_mib(name, layout, dtype):
    shapes = [(1024, 1024), (1000, 1200), *[(64, 1)] * 50, (1_500_000, 1)]
    params = [layout(torch.ones(shape, dtype=dtype)) for shape in shapes]
    parts, targets = stored(name, [torch.ones(s) for s in shapes]), [p.clone() for p in params]
    assert peak_allocation(lambda: update(parts, params, 0.9)) <= 4 * MIB
    assert peak_allocation(lambda: FORMATS[name].encode_(*parts, params)) <= 4 * MIB
    assert peak_allocation(lambda: FORMATS[name].decode_(targets, *parts)) <= 4 * MIB


@each_format
def test_no_generator_is_touched(name):
    before = torch.get_rng_state()
    update(stored(name, normal(100)), normal(100, seed=1), 0.9)
    assert torch.equal(torch.get_rng_state(), before)


@each_format
def test_nothing_to_do_is_nothing(name):
    for decay in (0.0, 0.9, 1.0):
        FORMATS[name].update_([], [], [], Update(decay, 1, []))
    update(stored(name, [torch.empty(0, 3)]), [torch.empty(0, 3)], 0.9)
    FORMATS[name].decode_([], [], [])
    FORMATS[name].encode_([], [], [])
