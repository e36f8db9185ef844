"""How many workers a run should have, decided: step times and free cores in, numbers of workers out.

One size more is tried where cores are free for it, one less where none is. A try is judged by the middle step time of
a window: the larger size is worth its workers when it brings at least a stated share of the speed-up that the shards
allow. What was not worth it is gone back from, and rests; each rest is twice as long as the one before. Only placement
changes, so the bits stay. Only measured step times count: no model of the run is fitted, as Pollux (Qiao et al., 2021)
does it.

A step takes as long as its fullest worker, so of 8 shards 5 workers are no faster than 4: those sizes are not tried."""

import statistics
from dataclasses import dataclass, field

from shoal.cluster.cluster import counted

ROOM = 0.75  # of the cores that new workers use must be idle: what is idle is an average, and never whole
SHORT = 0.25  # idle cores; with fewer, somebody waits for a core
SKIPPED = 2  # steps after a change: caches are cold
REST, LONGEST_REST = 10, 160  # windows


@dataclass(frozen=True, kw_only=True)
class Seen:
    """A committed step."""

    workers: int  # that made it
    wanted: int  # that the run is meant to have: another number while workers are missing, or still building
    seconds: float
    free: float  # idle cores of the host that this run may use


@dataclass(frozen=True)
class Decision:
    workers: int  # from now on; as many as before where a try is kept
    before: int
    why: str


@dataclass
class Autoscale:
    """From ``least`` to ``most`` workers of ``cores`` cores each, over so many ``shards``. ``share``: of the possible
    speed-up, that a larger size has to bring. A window is at least ``window`` steps and ``window_s`` seconds."""

    least: int
    most: int
    shards: int
    cores: int = 1
    share: float = 0.5
    window: int = 20
    window_s: float = 2.0
    at: int = 0
    known: dict[int, float] = field(default_factory=dict)  # size -> middle step time of its last window, s
    _times: list[float] = field(default_factory=list)
    _skip: int = 0
    _from: int = 0  # the size before the try that is under way, 0 when there is none
    _rests: dict[tuple[int, int], int] = field(default_factory=dict)  # (from, to) -> windows left
    _rested: dict[tuple[int, int], int] = field(default_factory=dict)  # (from, to) -> how long the last rest was

    def committed(self, seen: Seen) -> Decision | None:
        """What is to change after this step, or the verdict on what has changed; mostly None."""
        if seen.wanted != self.at:
            self._told(seen.wanted)
        if seen.workers != self.at:
            self._restart()
            return None
        if self._skip:
            self._skip -= 1
            return None
        self._times.append(max(seen.seconds, 1e-9))
        if len(self._times) < self.window or sum(self._times) < self.window_s:
            return None
        self.known[self.at] = statistics.median(self._times)
        self._restart(skip=0)
        self._rests = {pair: left - 1 for pair, left in self._rests.items() if left > 1}
        return self._verdict() if self._from else self._try(seen.free)

    def useful(self) -> list[int]:
        """The sizes that may be tried: each deals fewer shards to the fullest worker than the one before."""
        sizes = range(self.least, self.most + 1)
        return [n for n in sizes if n == self.least or self._fullest(n) < self._fullest(n - 1)]

    def possible(self, small: int, large: int) -> float:
        """The speed-up that the shards allow: 1.0 where steps may take half the time."""
        return self._fullest(small) / self._fullest(large) - 1

    def worth(self, small: int, large: int) -> bool:
        """Whether the larger one of two measured sizes brings enough."""
        possible = self.possible(small, large)
        return possible > 0 and self._gain(small, large) >= self.share * possible

    def _try(self, free: float) -> Decision | None:
        more = [n for n in self.useful() if n > self.at and self._fullest(n) < self._fullest(self.at)]
        if more and (self.at, more[0]) not in self._rests and free >= ROOM * (more[0] - self.at) * self.cores:
            return self._go(more[0], f"{counted(more[0], 'worker')} tried: {free:.1f} idle cores")
        fewer = [n for n in self.useful() if n < self.at]
        if fewer and (self.at, fewer[-1]) not in self._rests and free < SHORT:
            return self._go(fewer[-1], f"{counted(fewer[-1], 'worker')} tried: no core is idle, it may do as well")
        return None

    def _go(self, to: int, why: str) -> Decision:
        before, self._from = self.at, self.at
        self._restart()
        self.at = to
        return Decision(to, before, why)

    def _verdict(self) -> Decision:
        before, tried = self._from, self.at
        small, large = sorted((before, tried))
        worth = self.worth(small, large)
        better = large if worth else small
        self._rest((tried, before) if better == tried else (before, tried))
        self._from, self.at = 0, better
        self._restart(skip=0 if better == tried else SKIPPED)
        gain, possible = self._gain(small, large), self.possible(small, large)
        times = self.known[small] * 1e3, self.known[large] * 1e3
        why = (
            f"{times[0]:.3g} ms a step with {counted(small, 'worker')}, {times[1]:.3g} ms with {large}: "
            f"{gain:+.0%} in speed, where the shards allow {possible:+.0%} and at least "
            f"{self.share * possible:+.0%} is wanted; {better} it is"
        )
        return Decision(better, tried, why)

    def _told(self, wanted: int) -> None:
        """Somebody else has chosen: that stays for a while."""
        if self.at:
            sizes = self.useful()
            for other in (*[n for n in sizes if n > wanted][:1], *[n for n in sizes if n < wanted][-1:]):
                self._rest((wanted, other))
        self.at, self._from = wanted, 0
        self._restart()

    def _rest(self, pair: tuple[int, int]) -> None:
        self._rested[pair] = min(LONGEST_REST, 2 * self._rested.get(pair, REST // 2))
        self._rests[pair] = self._rested[pair]

    def _restart(self, skip: int = SKIPPED) -> None:
        self._times.clear()
        self._skip = skip

    def _fullest(self, workers: int) -> int:
        return -(-self.shards // workers)

    def _gain(self, small: int, large: int) -> float:
        return self.known[small] / self.known[large] - 1
