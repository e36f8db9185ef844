"""The batch that makes the most progress per second: found near the optimum of the formula, and in the same words."""

import json
import math
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from shoal.train.goodput import LONGEST_REST, Decision, Goodput, Took
from shoal.train.noise import LEAST_SEEN, NoiseScale, PassSquares

UNIT, BASE = 8, 32


def noise_of(scale: float) -> NoiseScale:
    """As measured, without error, on gradients with this noise scale."""
    found = NoiseScale()
    for _ in range(LEAST_SEEN):
        found.add(small=1 + scale / (BASE / UNIT), big=1 + scale / BASE, passes=UNIT, batch=BASE)
    return found


@dataclass(frozen=True)
class Host:
    """A pass of b samples takes ``fixed + a * b``, and a step ``rest`` beside those of its fullest worker."""

    fixed: float
    a: float
    rest: float

    def took(self, batch: int, workers: int, load: float = 1.0) -> Took:
        passes = -(-UNIT // workers)
        compute = passes * (self.fixed + self.a * batch / UNIT) * load
        return Took(batch, workers, passes, compute, compute + self.rest * load)

    def goodput(self, batch: int, workers: int, scale: float) -> float:
        return batch / self.took(batch, workers).seconds * (scale + BASE) / (scale + batch)


def settled(policy: Goodput, host: Host, scale: float, batch: int = BASE, workers: int = 2, steps: int = 2000) -> int:
    """The batch after so many steps."""
    noise = noise_of(scale)
    for _ in range(steps):
        decided = policy.committed(host.took(batch, workers), noise)
        batch = decided.batch if decided else batch
    return batch


hosts = st.builds(Host, st.floats(1e-4, 0.1), st.floats(1e-5, 0.01), st.floats(0, 0.2))


@given(hosts, st.floats(1, 1e5), st.integers(1, 8))
@settings(max_examples=40)
def test_the_batch_that_it_settles_at_has_nearly_the_goodput_of_the_formulas_optimum(host, scale, workers):
    policy = Goodput(BASE, 2048, UNIT, window=3)
    chosen = settled(policy, host, scale, workers=workers, steps=300)
    best = max(range(BASE, 2048 + 1, UNIT), key=lambda batch: host.goodput(batch, workers, scale))
    assert host.goodput(chosen, workers, scale) >= host.goodput(best, workers, scale) / (1 + policy.least_gain) * 0.97


def test_without_rests_the_optimum_of_the_sqrt_formula_is_found():
    """With all time fixed but for samples, T = c + a b, goodput is highest at sqrt(c * scale / a)."""
    host = Host(fixed=0.01, a=0.0005, rest=0.0)
    scale = 500.0
    best = math.sqrt(host.fixed * UNIT / host.a * scale)
    assert settled(Goodput(BASE, 4096, UNIT, window=3), host, scale) == pytest.approx(best, rel=0.6)


def test_more_noise_and_more_workers_mean_larger_batches():
    host = Host(fixed=0.01, a=0.0005, rest=0.02)
    by_noise = [settled(Goodput(BASE, 4096, UNIT, window=3), host, scale) for scale in (10, 100, 1000, 10_000)]
    assert by_noise == sorted(by_noise)
    assert by_noise[0] < by_noise[-1]
    by_workers = [settled(Goodput(BASE, 4096, UNIT, window=3), host, 1000, workers=n) for n in (1, 8)]
    assert by_workers[0] < by_workers[1], "the rest is shared by more samples"


def test_a_gradient_without_noise_keeps_the_recipes_batch():
    assert settled(Goodput(BASE, 4096, UNIT, window=3), Host(0.0, 0.001, 0.0), scale=0.0) == BASE


def test_the_batch_goes_back_when_workers_leave_and_never_beyond_its_limits():
    host, policy, noise = Host(fixed=0.0005, a=0.0005, rest=0.1), Goodput(BASE, 1024, UNIT, window=3), noise_of(300)
    large = settled(policy, host, 300, workers=8, steps=200)
    assert BASE < large <= 1024
    small = settled(policy, host, 300, batch=large, workers=1, steps=400)
    assert BASE <= small < large
    slow = Host(fixed=10.0, a=0.0, rest=10.0)
    assert settled(Goodput(BASE, 100, UNIT, window=3), slow, 1e9) == 96, "a multiple of shards x micro-batches"
    assert noise.known


def test_one_change_is_at_most_twofold_and_a_way_back_rests_longer_each_time():
    """The load of the host goes up and down, so that each window tells another optimum."""
    calm, busy = Host(fixed=0.02, a=0.0001, rest=0.1), Host(fixed=0.0, a=0.004, rest=0.0)
    policy, noise, batch, seen = Goodput(BASE, 1024, UNIT, window=3), noise_of(100), BASE, []
    for step in range(3000):
        decided = policy.committed((calm if step // 30 % 2 else busy).took(batch, 2), noise)
        if decided:
            assert 0.5 <= decided.batch / batch <= 2
            seen.append((step, decided.batch > batch))
            batch = decided.batch
    turns = [step for (_, before), (step, now) in pairwise(seen) if before != now]
    assert 3 < len(turns) < 30, "of 100 changes of the load"
    gaps = [b - a for a, b in pairwise(turns)]
    assert min(gaps[-3:]) >= LONGEST_REST * policy.window > max(gaps[:2])


def test_the_same_facts_give_the_same_decisions_also_to_one_who_takes_over_in_between():
    host, noise = Host(fixed=0.01, a=0.0005, rest=0.02), noise_of(1000)

    def decisions(hand_over_at: int) -> list[tuple[int, int, str]]:
        policy, batch, seen = Goodput(BASE, 1024, UNIT, window=5), BASE, []
        for step in range(400):
            if step == hand_over_at:
                told = json.loads(json.dumps(policy.state()))
                policy = Goodput(BASE, 1024, UNIT, window=5)
                policy.take(told)
            decided = policy.committed(host.took(batch, 2, load=1 + 0.05 * math.sin(step)), noise)
            if decided:
                batch = decided.batch
                seen.append((step, batch, decided.why))
        return seen

    alone = decisions(-1)
    assert alone
    for at in (1, 7, 23, 40, 41):
        assert decisions(at) == alone


def test_a_decision_says_what_it_was_made_of():
    policy, noise = Goodput(BASE, 1024, UNIT, window=3), noise_of(1000)
    decided: list[Decision] = []
    batch = BASE
    for _ in range(20):
        found = policy.committed(Host(0.01, 0.0005, 0.02).took(batch, 1), noise)
        if found:
            decided.append(found)
            batch = found.batch
    assert decided[0].batch == 64, "the farthest one that may be tried"
    assert decided[0].why.startswith("noise scale 1e+03 samples, 116 ms a step of 32 with 1 worker, 116 ms of 64 ")
    assert decided[0].why.endswith("one batch does not say what of a pass is fixed, so this one is tried")
    assert "tried" not in decided[1].why
    assert decided[0].goodput is not None
    assert decided[0].goodput[1] > decided[0].goodput[0] * 1.1


# --- noise ----------------------------------------------------------------------------------------------------------


def test_the_noise_scale_of_made_gradients_is_found():
    """Gradients g + noise in 200 dimensions, whose scale is known: the estimate is within a quarter of it."""
    rng, dims, scale, signal = np.random.default_rng(0), 200, 400.0, 2.0
    gradient = np.full(dims, math.sqrt(signal / dims))
    spread = math.sqrt(scale * signal / dims)  # of each dimension of one sample's: tr(Sigma) = scale * |G|^2
    found = NoiseScale()
    for _ in range(400):
        means = gradient + rng.normal(size=(UNIT, dims)) * spread / math.sqrt(BASE / UNIT)
        small = float((means**2).sum(axis=1).mean())
        found.add(small, float((means.mean(axis=0) ** 2).sum()), UNIT, BASE)
    assert found.samples == pytest.approx(scale, rel=0.25)


def test_efficiency_and_gain_have_the_limits_of_the_papers():
    still, wild = noise_of(0.0), noise_of(1e12)
    assert still.efficiency(64, BASE) == pytest.approx(0.5)
    assert still.gain(64, BASE) == pytest.approx(1.0)
    assert wild.efficiency(64, BASE) == pytest.approx(1.0)
    assert wild.gain(64, BASE) == pytest.approx(2.0)
    assert noise_of(32.0).gain(64, BASE) == pytest.approx(4 / 3)
    hidden = NoiseScale()
    hidden.add(small=10.0, big=0.1, passes=UNIT, batch=BASE)
    assert math.isinf(hidden.samples)
    assert hidden.gain(64, BASE) == 2.0


def test_a_step_of_one_pass_or_without_finite_gradient_says_nothing():
    found = NoiseScale()
    found.add(1.0, 1.0, passes=1, batch=BASE)
    found.add(math.nan, 1.0, passes=8, batch=BASE)
    found.add(1.0, math.inf, passes=8, batch=BASE)
    assert found == NoiseScale()


def test_rows_of_workers_tell_the_mean_square_of_all_passes():
    gradients = torch.randn(4, 10, generator=torch.Generator().manual_seed(0))
    counts = (2.0, 3.0, 2.0, 1.0)
    rows = torch.zeros(2, 3 + 4 + 2, dtype=torch.float64)
    for worker, own in enumerate(((0, 1, 2), (3,))):
        squares = PassSquares(3, 4, measures=True)
        squares.took = (0.5 + worker, 1.0 + worker)
        for leaf in own:
            squares.opens(leaf, counts[leaf])
            squares.saw(gradients[leaf, :6])
            squares.saw(gradients[leaf, 6:])
            squares.fold(rows[worker])
            squares.fold(rows[worker])  # again changes nothing
    means = gradients / torch.tensor(counts)[:, None]
    wanted = (means.double() ** 2).sum(dim=1).mean()
    small, compute, seconds = squares.read(rows, (1, 1, 1, 1))
    assert small == pytest.approx(float(wanted), rel=1e-6)
    assert (compute, seconds) == (1.5, 2.0)
    assert rows[:, :3].sum() == 0
    assert PassSquares(3, 4, measures=False).width == 0
