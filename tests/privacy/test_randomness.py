"""
Secret randomness: its keystream, the law of its noise and masks, and that nothing outside can steer or repeat it.

Draws are fresh in every run. Each statistical comparison raises a false alarm with probability `ALPHA` (there are
about a hundred), names the smallest fault that it catches 99.9 % of the time, and must reject broken twins.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from scipy import stats

from dp_curriculum.privacy import randomness
from dp_curriculum.privacy.randomness import SecretGenerator


ALPHA = 1e-6
Z = stats.norm.isf(ALPHA / 2)
MODES = ("secure", "fast")


class FixedKey(SecretGenerator):
    """The broken twin of most tests: one key for all calls."""

    def _fresh_key(self, num_bytes: int) -> bytes:
        return bytes(range(num_bytes))


class FixedWords:
    """A keystream of words that a test chooses, over and over."""

    def __init__(self, *words: int) -> None:
        self.words = np.array(words, dtype="<u8")

    def update_into(self, data: Any, buf: Any) -> int:
        buf[:] = memoryview(np.resize(self.words, len(buf) // 8)).cast("B")
        return len(buf)


# Keystream


def keystream(key: bytes, nonce: bytes, count: int) -> bytes:
    return randomness._read_words(randomness._open_chacha20(key, nonce), count // 8).tobytes()


def test_keystream_is_that_of_rfc_8439() -> None:
    """Section 2.3.2: counter 1 and a nonce. Appendix A.1, vectors 1 and 2: the first two blocks of the zero key."""
    nonce = (1).to_bytes(4, "little") + bytes.fromhex("000000090000004a00000000")
    assert keystream(bytes(range(32)), nonce, 64) == bytes.fromhex(
        "10f1e7e4d13b5915500fdd1fa32071c4c7d1f4c733c068030422aa9ac3d46c4e"
        "d2826446079faa0914c2d705d98b02a2b5129cd1de164eb9cbd083e8a2503c4e"
    )
    assert keystream(bytes(32), bytes(16), 128) == bytes.fromhex(
        "76b8e0ada0f13d90405d6ae55386bd28bdd219b8a08ded1aa836efcc8b770dc7"
        "da41597c5157488d7724e03fb8d84a376a43b8f41518a11cc387b669b2ee6586"
        "9f07e7be5551387a98ba977c732d080dcb0f29a048e3656912c6533e32ee7aed"
        "29b721769ce64e43d57133b074d839d531ed1f28510afb45ace10a1f4b794d6f"
    )


def test_masks_are_the_words_of_that_keystream_below_the_rate() -> None:
    words = np.frombuffer(keystream(bytes(range(32)), bytes(16), 8 * 1000), "<u8")
    assert FixedKey().poisson_sample(1000, 0.25).tolist() == np.flatnonzero(words < 2**62).tolist()


@pytest.mark.parametrize("mode", MODES)
def test_every_call_asks_the_operating_system_for_a_key(mode: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []
    urandom = os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: asked.append(count) or urandom(count))
    generator = SecretGenerator(mode)
    assert asked == []
    generator.gaussian(5, 1.0)
    generator.gaussian(5, 1.0)
    assert sum(asked) == 2 * {"secure": 32, "fast": 48}[mode]
    asked.clear()
    generator.poisson_sample(10, 0.5)
    assert asked == [32]


def test_no_key_is_used_for_longer_than_its_block_counter_lasts(monkeypatch: pytest.MonkeyPatch) -> None:
    assert randomness._BYTES_PER_KEY <= 2**32 * 64
    keys: list[bytes] = []
    urandom = os.urandom
    monkeypatch.setattr(os, "urandom", lambda count: keys.append(urandom(count)) or keys[-1])
    monkeypatch.setattr(randomness, "_BYTES_PER_KEY", 32 * 1000)
    draws = SecretGenerator().gaussian(3500, 1.0)
    assert len(set(keys)) == 4 and len(set(draws.tolist())) > 3490


# The law of the noise


def variance_is_right(draws: np.ndarray, std: float) -> bool:
    """Chi-square approximation. With 2 million draws: catches a variance 0.8 % off."""
    return abs(np.mean((draws / std) ** 2) - 1) < Z * math.sqrt(2 / draws.size)


def shape_is_right(draws: np.ndarray, std: float) -> bool:
    """Kolmogorov-Smirnov. With 100,000 draws: catches a distribution function off by 0.014, a scale 6 % off."""
    return stats.kstest(draws, "norm", args=(0, std)).pvalue > ALPHA


def tails_are_right(draws: np.ndarray, std: float) -> bool:
    """Mean, skewness and kurtosis. With 2 million draws: catches 0.006, 0.014 and 0.028."""
    x, n = draws / std, draws.size
    square = x * x
    moments = (x.mean(), (x * (square - 3)).mean(), (square * (square - 6) + 3).mean())
    return all(abs(moment) < Z * math.sqrt(order / n) for moment, order in zip(moments, (1, 6, 24)))


def is_uncorrelated(x: np.ndarray, y: np.ndarray) -> bool:
    """Of values and of squares. With a million pairs: catches a correlation of 0.008."""
    pairs = ((x, y), (x**2, y**2), (x, y**2))
    return all(abs(np.corrcoef(a, b)[0, 1]) < Z / math.sqrt(x.size) for a, b in pairs)


@pytest.fixture(scope="module", params=MODES)
def noise(request: pytest.FixtureRequest) -> np.ndarray:
    """2 million draws of standard deviation 0.37."""
    return SecretGenerator(request.param).gaussian(2_000_000, 0.37).double().numpy()


@pytest.mark.statistical
def test_noise_has_the_variance_that_was_asked_for_to_one_percent(noise: np.ndarray) -> None:
    assert variance_is_right(noise, 0.37)
    assert not variance_is_right(noise * 0.995, 0.37) and not variance_is_right(noise * 1.005, 0.37)
    assert not variance_is_right(noise, 0.37**2)


@pytest.mark.statistical
def test_noise_has_the_shape_of_a_gaussian(noise: np.ndarray) -> None:
    part, laplace = noise[:100_000], np.random.default_rng().laplace(0, 0.37 / math.sqrt(2), 2_000_000)
    assert shape_is_right(part, 0.37) and tails_are_right(noise, 0.37)
    assert not shape_is_right(part * 0.9, 0.37) and not shape_is_right(part * 1.1, 0.37)
    assert not shape_is_right(laplace[:100_000], 0.37) and not tails_are_right(laplace, 0.37)
    assert not tails_are_right(np.clip(noise, -1.0, 1.0), 0.37)  # cut at 2.7 standard deviations
    assert not tails_are_right(noise + 0.0037, 0.37)


@pytest.mark.statistical
def test_neighbouring_draws_are_independent(noise: np.ndarray) -> None:
    """At lag 1, and at the distance of the two normals that one Box-Muller pair gives."""
    for lag in (1, 2, randomness._CHUNK, 2 * randomness._CHUNK):
        assert is_uncorrelated(noise[:-lag][:1_000_000], noise[lag:][:1_000_000])
    assert not is_uncorrelated(noise[:-1], noise[1:] + 0.01 * noise[:-1])
    assert not is_uncorrelated(noise, np.sign(np.roll(noise, 1)) * np.abs(noise))  # equal sizes, other signs


@pytest.mark.statistical
@pytest.mark.parametrize("mode", MODES)
def test_draws_of_two_calls_and_of_two_generators_are_independent(mode: Any) -> None:
    first, second = SecretGenerator(mode), SecretGenerator(mode)
    x, y, z = (g.gaussian(1_000_000, 1.0).double().numpy() for g in (first, first, second))
    assert is_uncorrelated(x, y) and is_uncorrelated(x, z)
    twin = FixedKey(mode)
    assert not is_uncorrelated(*(twin.gaussian(1_000_000, 1.0).double().numpy() for _ in range(2)))


@pytest.mark.parametrize("mode", MODES)
def test_no_two_draws_are_equal(mode: Any) -> None:
    generator = SecretGenerator(mode)
    seen = {tuple(generator.gaussian(8, 1.0).tolist()) for _ in range(200)}
    seen |= {tuple(SecretGenerator(mode).gaussian(8, 1.0).tolist()) for _ in range(200)}
    assert len(seen) == 400
    twin = FixedKey(mode)
    assert twin.gaussian(8, 1.0).equal(twin.gaussian(8, 1.0))


@pytest.mark.parametrize("word", [0, 1, 2**64 - 1, 2**63])
def test_every_word_of_the_keystream_makes_a_finite_normal(word: int) -> None:
    out = np.empty(101)
    randomness._fill_normals(out, FixedWords(word))
    assert np.isfinite(out).all() and np.abs(out).max() < 2 * 8.58


def test_noise_is_rounded_once_from_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    """A draw is the halved sum of four, whose float64 values are then scaled and rounded to float32."""
    twin, words = FixedKey(), np.empty(10)
    randomness._fill_normals(words, randomness._open_chacha20(bytes(range(32))))
    assert twin.gaussian(10, 3.0).equal(torch.from_numpy(words * 3.0).float())
    assert not np.array_equal(words, words.astype(np.float32))


def test_noise_is_four_box_muller_draws_of_the_keystream_halved() -> None:
    """Word by word: per round, as many radii as angles; cosines first, then sines."""
    key, count = bytes(range(32)), 6
    words = np.frombuffer(keystream(key, bytes(16), 8 * 4 * count), "<u8").reshape(4, 2, count // 2)
    radii = np.sqrt(-2 * np.log(((words[:, 0] >> np.uint64(11)) + np.uint64(1)) * 2.0**-53))
    angles = (words[:, 1] >> np.uint64(11)) * 2.0**-53 * 2 * math.pi
    expected = np.concatenate([(radii * np.cos(angles)).sum(0), (radii * np.sin(angles)).sum(0)]) / 2
    found = FixedKey().gaussian(count, 1.0, dtype=torch.float64).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12)


@pytest.mark.statistical
def test_the_code_of_the_gpu_draws_normals_from_fresh_keys_wherever_it_runs() -> None:
    """The same lines on the CPU's generator: 100,000 draws, a variance off by 4 % is caught; keys are 64 bits."""
    draws = SecretGenerator("fast")._device_normals(100_000).numpy()
    assert abs(draws.var() - 1) < Z * math.sqrt(2 / draws.size) and abs(draws.mean()) < Z / math.sqrt(draws.size)
    assert stats.kstest(draws, "norm").pvalue > ALPHA
    assert abs(np.mean(draws[1:] * draws[:-1])) < Z / math.sqrt(draws.size)
    assert FixedKey("fast")._device_normals(8).equal(FixedKey("fast")._device_normals(8))
    assert not SecretGenerator("fast")._device_normals(8).equal(SecretGenerator("fast")._device_normals(8))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("shape", "expected"), [(7, (7,)), ((2, 3), (2, 3)), ((), ()), ((0, 4), (0, 4)), ([5], (5,))])
def test_noise_has_the_shape_that_was_asked_for(mode: Any, shape: Any, expected: tuple[int, ...]) -> None:
    draws = SecretGenerator(mode).gaussian(shape, 1.0)
    assert (draws.shape, draws.dtype, draws.device.type) == (torch.Size(expected), torch.float32, "cpu")


def test_an_odd_number_of_draws_across_chunks_leaves_none_out() -> None:
    draws = SecretGenerator().gaussian(2 * randomness._CHUNK + 3, 1.0)
    assert draws.isfinite().all() and (draws == 0).sum() == 0


@pytest.mark.parametrize("mode", MODES)
def test_no_noise_is_zeros(mode: Any) -> None:
    assert SecretGenerator(mode).gaussian(100, 0.0).equal(torch.zeros(100))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.statistical
def test_noise_of_the_gpu_has_the_right_law_and_place() -> None:
    generator = SecretGenerator("fast", device="cuda")
    draws = generator.gaussian(2_000_000, 0.37)
    assert draws.device.type == "cuda" and generator.describe()["generator"] == "torch-philox"
    on_cpu = draws.double().cpu().numpy()
    assert variance_is_right(on_cpu, 0.37) and shape_is_right(on_cpu[:100_000], 0.37)
    assert is_uncorrelated(on_cpu[:1_000_000], generator.gaussian(1_000_000, 1.0).double().cpu().numpy())


# The law of the masks


def sizes_vary_like_poisson_samples(sizes: np.ndarray, rows: int, rate: float) -> bool:
    """Variance N q (1 - q). With 3000 draws: catches one 22 % off; batches of a fixed size have none at all."""
    expected = rows * rate * (1 - rate)
    return abs(sizes.var(ddof=1) / expected - 1) < Z * math.sqrt(2 / sizes.size) * 1.05


def counts_are_binomial(masks: np.ndarray, rate: float) -> bool:
    """Rows enter equally often, at the rate: chi-square over rows, and all together (catches a rate 2.3 % off)."""
    draws, rows = masks.shape
    expected, variance = draws * rate, draws * rate * (1 - rate)
    spread = ((masks.sum(0) - expected) ** 2 / variance).sum()
    even = stats.chi2.sf(spread, rows) > ALPHA / 2 and stats.chi2.cdf(spread, rows) > ALPHA / 2
    return bool(even and abs(masks.sum() - rows * expected) < Z * math.sqrt(rows * variance))


def successive_masks_are_independent(masks: np.ndarray, rate: float) -> bool:
    """Rows in two draws in a row. With 1.2 million pairs: catches a correlation of 0.01."""
    both, pairs = (masks[1:] & masks[:-1]).sum(), masks[1:].size
    return abs(both - pairs * rate**2) < Z * math.sqrt(pairs * rate**2 * (1 - rate**2) * 1.3)


ROWS, RATE, DRAWS = 400, 0.1, 3000


@pytest.fixture(scope="module")
def masks() -> np.ndarray:
    generator, drawn = SecretGenerator(), np.zeros((DRAWS, ROWS), dtype=bool)
    for mask in drawn:
        mask[generator.poisson_sample(ROWS, RATE).numpy()] = True
    return drawn


@pytest.mark.statistical
def test_batch_sizes_vary_as_those_of_poisson_samples_do(masks: np.ndarray) -> None:
    assert sizes_vary_like_poisson_samples(masks.sum(1), ROWS, RATE)
    assert not sizes_vary_like_poisson_samples(_shuffled().sum(1), ROWS, RATE)


@pytest.mark.statistical
def test_each_row_enters_with_its_rate_and_independently_of_the_draw_before(masks: np.ndarray) -> None:
    assert counts_are_binomial(masks, RATE) and successive_masks_are_independent(masks, RATE)
    assert not counts_are_binomial(masks, 0.97 * RATE)
    assert not counts_are_binomial(_shuffled(), RATE)  # every row exactly once an epoch
    assert not successive_masks_are_independent(_shuffled(), RATE)
    assert not successive_masks_are_independent(np.repeat(masks[:30], 100, axis=0), RATE)  # a mask kept for 100 steps


def _shuffled() -> np.ndarray:
    """The broken twin: epochs of batches of a fixed size."""
    rng, epochs = np.random.default_rng(), int(DRAWS * RATE)
    order = [rng.permutation(ROWS).reshape(-1, int(ROWS * RATE)) for _ in range(epochs)]
    drawn = np.zeros((DRAWS, ROWS), dtype=bool)
    np.put_along_axis(drawn, np.concatenate(order), True, axis=1)
    return drawn


@pytest.mark.parametrize("rate", [2.0**-12, 1 / 15, 0.1, 1 / 3, 0.5, 1 - 2**-53])
def test_a_row_enters_with_exactly_its_rate(rate: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the 2^64 words, those below rate 2^64 enter; the product is a whole number for rates from 2^-12 up."""
    numerator, denominator = rate.as_integer_ratio()
    count = numerator * 2**64 // denominator
    assert count * denominator == numerator * 2**64
    generator = SecretGenerator()
    monkeypatch.setattr(generator, "_open_keystream", lambda: FixedWords(0, count - 1, count, 2**64 - 1))
    assert generator.poisson_sample(4, rate).tolist() == [0, 1]


def test_a_tiny_rate_is_rounded_down() -> None:
    assert SecretGenerator().poisson_sample(100_000, 1e-25).tolist() == []


def test_empty_draws_are_draws() -> None:
    """Half an image a step: 61 % of 2000 draws are empty, give or take 5 %."""
    generator = SecretGenerator()
    sizes = np.array([len(generator.poisson_sample(100, 0.005)) for _ in range(2000)])
    assert abs((sizes == 0).mean() - 0.995**100) < Z * math.sqrt(0.24 / 2000)
    empty = generator.poisson_sample(10, 0.0)
    assert (empty.shape, empty.dtype) == (torch.Size([0]), torch.int64)
    assert generator.poisson_sample(0, 0.5).tolist() == generator.poisson_sample(0, 1.0).tolist() == []


def test_a_rate_of_one_draws_every_row() -> None:
    assert SecretGenerator().poisson_sample(5, 1.0).tolist() == [0, 1, 2, 3, 4]


def test_rows_of_every_part_of_a_large_dataset_are_drawn_in_order() -> None:
    rows = 2 * randomness._MASK_CHUNK + 1000
    drawn = SecretGenerator().poisson_sample(rows, 0.5)
    assert drawn.dtype == torch.int64 and bool((drawn.diff() > 0).all()) and drawn[0] >= 0 and drawn[-1] < rows
    edges = np.arange(0, rows + 1, rows / 8)
    parts = np.histogram(drawn.numpy(), edges)[0]
    assert np.abs(parts - rows / 16).max() < Z * math.sqrt(rows / 32)


# Nothing outside can steer or repeat it


@pytest.mark.parametrize("mode", MODES)
def test_global_seeds_neither_steer_the_draws_nor_are_used_up(mode: Any) -> None:
    generator, draws = SecretGenerator(mode), []
    with torch.random.fork_rng():
        for _ in range(2):
            torch.manual_seed(0)
            np.random.seed(0)
            torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
            draws.append((generator.gaussian(20, 1.0), generator.poisson_sample(500, 0.5).tolist()))
            assert torch.get_rng_state().equal(torch_state)
            assert np.array_equal(np.random.get_state()[1], numpy_state)
    assert not draws[0][0].equal(draws[1][0]) and draws[0][1] != draws[1][1]


@pytest.mark.parametrize(
    "duplicate",
    [copy.copy, copy.deepcopy, pickle.dumps, lambda g: pickle.dumps({"state": [g]}), lambda g: g.__getstate__()],
    ids=["copy", "deepcopy", "pickle", "nested pickle", "getstate"],
)
def test_a_generator_cannot_be_copied_or_saved(duplicate: Callable[[SecretGenerator], object]) -> None:
    with pytest.raises(TypeError, match="Refusing to copy a SecretGenerator"):
        duplicate(SecretGenerator())


def test_a_generator_holds_no_state_that_could_leak() -> None:
    generator = SecretGenerator()
    before = dict(vars(generator))
    generator.gaussian(10, 1.0)
    generator.poisson_sample(10, 0.5)
    assert vars(generator) == before == {"_mode": "secure", "_device": torch.device("cpu")}
    assert repr(generator) == "SecretGenerator(mode='secure', device='cpu')"


@pytest.mark.parametrize("mode", MODES)
def test_forked_processes_draw_different_noise(mode: Any) -> None:
    generator = SecretGenerator(mode)
    generator.gaussian(4, 1.0)
    reader, writer = os.pipe()
    children = []
    for _ in range(2):
        children.append(os.fork())
        if children[-1] == 0:
            os.write(writer, (",".join(map(str, generator.gaussian(4, 1.0).tolist())) + "\n").encode())
            os._exit(0)
    os.close(writer)
    for child in children:
        os.waitpid(child, 0)
    with os.fdopen(reader) as pipe:
        drawn = pipe.read().split()
    assert len({*drawn, ",".join(map(str, generator.gaussian(4, 1.0).tolist()))}) == 3


# Facts and bad arguments


def test_a_generator_tells_its_source() -> None:
    assert SecretGenerator().describe() == {
        "generator": "chacha20",
        "mask_generator": "chacha20",
        "seed_source": "os-entropy",
        "mode": "secure",
        "secure_rng": True,
        "floating_point_defence": "sum of 4 float64 draws",
        "secret": True,
    }
    fast = SecretGenerator("fast").describe()
    assert (fast["generator"], fast["mask_generator"], fast["secure_rng"]) == ("numpy-philox", "chacha20", False)
    there = SecretGenerator("fast", device="cuda")  # nothing is drawn: no GPU is needed
    assert there.describe()["generator"] == "torch-philox" and there.device == torch.device("cuda")
    assert SecretGenerator().is_private


def _bad_calls() -> Iterator[Any]:
    generator = SecretGenerator()
    yield pytest.param(lambda: SecretGenerator("safe"), "mode='safe'", id="mode")  # type: ignore[arg-type]
    yield pytest.param(lambda: SecretGenerator("fast", device="meta"), "device='meta'", id="device")
    for std in (-1.0, math.nan, math.inf):
        yield pytest.param(lambda std=std: generator.gaussian(3, std), f"std={std}", id=f"std {std}")
    yield pytest.param(lambda: generator.gaussian((2, -1), 1.0), r"shape=\(2, -1\)", id="shape")
    for rate in (-0.1, 1.1, math.nan):
        yield pytest.param(lambda rate=rate: generator.poisson_sample(3, rate), f"sample_rate={rate}", id=f"{rate}")


@pytest.mark.parametrize(("call", "message"), list(_bad_calls()))
def test_bad_arguments_are_named(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=f"Expected {message}"):
        call()
