"""Which version of the weights answers which request of a client, as decisions only."""

from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Versions:
    """``current`` answers, and ``canary``, where there is one, a share of the requests instead.

    A request that has begun with a version ends with it. The share is kept to within one request at any time: whose
    turn it is is counted, not drawn."""

    current: int = 0
    canary: int | None = None
    share: float = 0.0  # of the canary
    _owed: float = 0.0  # requests that the canary should have had and has not
    _held: dict[int, int] = field(default_factory=dict)  # version -> requests that have begun and not ended
    _loading: int | None = None

    def begin(self) -> int:
        """The version of a request that comes now. `end` must follow."""
        version = self.current
        if self.canary is not None:
            self._owed += self.share
            if self._owed >= 1.0 - 1e-9:
                self._owed -= 1.0
                version = self.canary
        self._held[version] = self._held.get(version, 0) + 1
        return version

    def end(self, version: int) -> None:
        self._held[version] -= 1
        if not self._held[version]:
            del self._held[version]

    @property
    def loading(self) -> bool:
        return self._loading is not None

    def load(self, version: int) -> None:
        """It is being made ready."""
        self._loading = version

    def loaded(self) -> None:
        """It is ready, or cannot be."""
        self._loading = None

    def replace(self, version: int) -> None:
        """It answers from now on, and there is no canary."""
        self.current, self.canary, self.share, self._owed = version, None, 0.0, 0.0

    def try_out(self, version: int, share: float) -> None:
        self.canary, self.share, self._owed = version, share, 0.0

    def withdraw(self) -> None:
        """The canary gets no more requests."""
        self.canary, self.share, self._owed = None, 0.0, 0.0

    def done(self, known: Iterable[int]) -> list[int]:
        """Those of the known ones that nobody needs any more."""
        needed = {self.current, self.canary, self._loading, *self._held}
        return [version for version in known if version not in needed]
