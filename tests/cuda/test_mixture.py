"""Mixture-of-experts routing on the emulated device, against NumPy and the CPU backend's rule for ties."""

import numpy as np
import pytest

from backends.cuda import mixture
from backends.cuda.device import Array
from backends.cuda.mixture import RoutingRoom, combine_kernel, mixture_kernels, most_tiles
from engine.errors import StepFailed, UnsupportedModel
from engine.model.spec import Mixture
from tests.cuda.devices import make_device
from tests.cuda.test_elementwise import bf16, close, widened

CASES = [  # tokens, experts, of a token, tile tokens
    (1, 4, 2, 16),
    (1, 128, 8, 16),
    (3, 8, 2, 1),
    (32, 60, 4, 8),
    (33, 60, 4, 16),
    (100, 5, 5, 16),
    (300, 128, 8, 64),
]


def spec_of(experts, each, *, normalize=True):
    return Mixture(experts, each, 32, normalize)


def logits_of(tokens, experts, seed=0):
    """Rounded, so that there are ties."""
    return np.round(np.random.default_rng(seed).normal(0, 2, (tokens, experts)) * 4).astype(np.float32) / 4


def chosen_by(logits, each, *, normalize):
    """Experts ascending, and shares: the greatest first, ties to the lowest, softmax in float64."""
    experts = np.sort(np.argsort(-logits, axis=1, kind="stable")[:, :each], axis=1)
    powers = np.exp(logits.astype(np.float64) - logits.max(axis=1, keepdims=True))
    kept = np.take_along_axis(powers, experts, axis=1)
    return experts, kept / (kept if normalize else powers).sum(axis=1, keepdims=True)


class Bench:
    def __init__(self, spec, tokens, *, least_tile=1, seed=0, edits=None):
        self.device = make_device(seed=seed, edits=edits)
        self.device.prepare(mixture_kernels(spec, 64))
        self.stream = self.device.stream()
        self.room = RoutingRoom.make(self.device, spec, tokens, least_tile)

    def route(self, logits, tile_tokens):
        """Experts, shares, place, source, tiles."""
        r = mixture.route(self.stream, self.device.put(logits), self.room, tile_tokens)
        return [self.device.get(array) for array in (r.experts, r.shares, r.place, r.source, r.tiles)]


def check(got, logits, each, tile_tokens, *, normalize=True):
    experts, shares, place, source, tiles = got
    tokens = len(logits)
    wanted, wanted_shares = chosen_by(logits, each, normalize=normalize)
    assert np.array_equal(experts, wanted)
    close(shares, wanted_shares, exact=True)
    order = np.argsort(wanted.reshape(-1), kind="stable")
    assert np.array_equal(source, order // each)
    assert np.array_equal(place.reshape(-1)[order], np.arange(tokens * each))
    by_expert = wanted.reshape(-1)[order]
    needed = [
        (expert, first, min(tile_tokens, stop - first))
        for expert in np.unique(by_expert).tolist()
        for start, stop in [np.searchsorted(by_expert, [expert, expert + 1]).tolist()]
        for first in range(start, stop, tile_tokens)
    ]
    assert tiles[: len(needed)].tolist() == [list(tile) for tile in needed]
    assert not tiles[len(needed) :].any()


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("tokens", "experts", "each", "tile"), CASES)
def test_tokens_go_to_their_best_experts_and_lie_ordered_by_them(tokens, experts, each, tile, normalize):
    logits = logits_of(tokens, experts)
    for seed in (0, 1, 9) if tokens < 50 else (9,):
        bench = Bench(spec_of(experts, each, normalize=normalize), tokens, seed=seed)
        check(bench.route(logits, tile), logits, each, tile, normalize=normalize)


def test_more_experts_than_a_warp_has_lanes_times_four():
    logits = logits_of(70, 257)
    check(Bench(spec_of(257, 6), 70).route(logits, 16), logits, 6, 16)


@pytest.mark.full
@pytest.mark.parametrize("seed", range(12))
def test_routing_of_many_shapes(seed):
    random = np.random.default_rng(seed)
    experts = int(random.integers(2, 513))
    each, tokens, tile = (int(random.integers(1, most)) for most in (min(experts, 32) + 1, 400, 129))
    logits = logits_of(tokens, experts, seed)
    check(Bench(spec_of(experts, each), tokens, seed=seed).route(logits, tile), logits, each, tile)


@pytest.mark.parametrize("tokens", [20, 90])
def test_tokens_that_all_want_the_same_experts_have_room(tokens):
    logits = np.zeros((tokens, 16), np.float32)
    check(Bench(spec_of(16, 3), tokens).route(logits, 7), logits, 3, 7)


def test_negative_zero_ties_with_zero_and_the_greatest_numbers_are_in_order():
    rows = np.array([[-0.0, 0.0, -0.0, 0.0], [3e38, -3e38, np.inf, 1], [-np.inf, -np.inf, 0, -np.inf]], np.float32)
    experts = Bench(spec_of(4, 2), 3).route(rows, 4)[0]
    assert experts.tolist() == [[0, 1], [0, 2], [0, 2]]


def test_logits_that_are_no_numbers_still_choose_different_experts():
    rows = np.full((2, 8), np.nan, np.float32)
    rows[1, 5] = 1
    experts, _, place, source, _ = Bench(spec_of(8, 3), 2).route(rows, 4)
    assert experts.tolist() == [[0, 1, 2], [0, 1, 5]]
    assert sorted(place.reshape(-1).tolist()) == list(range(6))
    assert sorted(source.tolist()) == [0, 0, 0, 1, 1, 1]


def test_a_token_has_the_same_shares_in_any_company():
    spec, logits = spec_of(60, 4, normalize=False), logits_of(80, 60)
    alone, many = Bench(spec, 80).route(logits[:1], 16), Bench(spec, 80, seed=4).route(logits, 16)
    assert np.array_equal(alone[1][0], many[1][0])


def test_the_most_tiles_are_enough_and_can_be_needed():
    for tokens, experts, each, tile in [(5, 4, 2, 3), (1, 128, 8, 16), (64, 8, 2, 16)]:
        spec = spec_of(experts, each)
        positions = tokens * each
        most = most_tiles(tokens, spec, tile)
        counts = np.full(min(experts, positions), 1)                 # every expert one tile, then whole ones
        counts[0] += positions - counts.sum()
        assert -(-counts // tile).sum() <= most <= positions


def test_a_graph_of_routing_is_replayed_on_other_logits():
    spec = spec_of(16, 2)
    bench = Bench(spec, 40)
    first, second = logits_of(40, 16, 1), logits_of(40, 16, 2)
    there = bench.device.put(first)
    routings = []
    graph = bench.stream.capture(lambda: routings.append(mixture.route(bench.stream, there, bench.room, 16)))
    for logits in (first, second):
        bench.stream.copy_in(there.address, logits)
        bench.stream.replay(graph)
        r = routings[0]
        check([bench.device.get(a) for a in (r.experts, r.shares, r.place, r.source, r.tiles)], logits, 2, 16)


@pytest.mark.parametrize("columns", [1, 12, 64, 2056])
@pytest.mark.parametrize("with_shared", [False, True])
def test_a_tokens_answers_are_weighed_and_added(columns, with_shared):
    tokens, experts, each = 35, 12, 3
    spec, random = spec_of(experts, each, normalize=False), np.random.default_rng(columns)
    bench = Bench(spec, tokens)
    device = bench.device
    device.prepare([combine_kernel(columns)])
    routing = mixture.route(bench.stream, device.put(logits_of(tokens, experts)), bench.room, 16)
    answers = widened(bf16(random.normal(size=(tokens * each, columns))))
    shared = widened(bf16(random.normal(size=(tokens, columns))))
    gates = random.normal(0, 4, (tokens, 1)).astype(np.float32)
    out = Array(device.allocate(tokens * columns * 2), (tokens, columns), "bf16")
    more = (device.put(bf16(shared)), device.put(gates)) if with_shared else ()
    mixture.combine(bench.stream, device.put(bf16(answers)), routing, out, *more)
    shares, place = device.get(routing.shares), device.get(routing.place)
    wanted = (answers[place].astype(np.float64) * shares[:, :, None]).sum(axis=1)
    if with_shared:
        wanted += shared / (1 + np.exp(-gates.astype(np.float64)))
    close(device.get(out), wanted)


def test_what_there_is_no_room_for_is_refused():
    for spec in (spec_of(513, 4), spec_of(64, 33), spec_of(4, 5)):
        with pytest.raises(UnsupportedModel, match="experts"):
            mixture.refuse_mixture(spec)


@pytest.mark.parametrize(
    ("was", "becomes"),
    [
        ("words[e] = 0;\n    __syncthreads();", "words[e] = 0;"),
        ("1u << warp);\n        }\n    }\n    __syncthreads();", "1u << warp);\n        }\n    }"),
        ("before[e] = 0;\n    }\n    __syncthreads();", "before[e] = 0;\n    }"),
        ("atomicAdd(&before[e], earlier);\n        __syncthreads();", "atomicAdd(&before[e], earlier);"),
        ("= tiles_before;\n    }\n    __syncthreads();", "= tiles_before;\n    }"),
        ("if (token < tokens && lane < each)", "if (lane < each)"),
        ("if (c < chunk) earlier += here;", "if (c <= chunk) earlier += here;"),
        ("(1u << warp) - 1", "(2u << warp) - 1"),
        ("key == most ? ~static_cast<u32>(e) : 0", "~static_cast<u32>(e)"),
    ],
)
def test_a_broken_kernel_is_found_out(was, becomes):
    def wrong(seed, tokens):
        logits = logits_of(tokens, 40)
        try:
            bench = Bench(spec_of(40, 4), tokens, seed=seed, edits={"mixture.cu": lambda text: text.replace(was, becomes)})
            check(bench.route(logits, 8), logits, 4, 8)
        except (StepFailed, AssertionError):
            return True
        return False

    assert any(wrong(seed, tokens) for seed in (0, 1, 7) for tokens in (27, 70))
