"""Who carries out a group's calls, in which order, and who runs what users hang on their completion."""

import threading
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

MOST_CALLBACKS = 256  # that wait for something at the same time


class CallWork(dist.Work):
    """One call. Its future gives its tensors back."""

    def __init__(self, results: Any, calls: "Calls") -> None:
        super().__init__()
        self._results, self._calls = results, calls
        self._failure: Exception | None = None
        self._over = False
        self._done = threading.Lock()  # held until it is over: an Event takes ten times as long to make
        self._done.acquire()
        self._future: torch.futures.Future[Any] | None = None
        self._lock = threading.Lock()

    def finish(self, failure: Exception | None) -> None:
        with self._lock:
            self._failure = failure
            self._over = True
            self._done.release()
            future = self._future
        if future is not None:
            self._calls.aside(lambda: self._complete(future))

    def _complete(self, future: "torch.futures.Future[Any]") -> None:
        if self._failure is None:
            future.set_result(self._results)
        else:
            future.set_exception(self._failure)

    def wait(self, timeout: timedelta | None = None) -> bool:
        limit = timeout.total_seconds() if timeout is not None and timeout > timedelta(0) else None
        if self._over:
            pass
        elif self._done.acquire(timeout=-1 if limit is None else limit):
            self._done.release()  # for whoever waits too
        else:
            raise dist.DistBackendError(f"the call was not done after {limit:.3g} s")
        if self._failure is not None:
            raise self._failure
        return True

    def get_future(self) -> "torch.futures.Future[Any]":
        with self._lock:
            if self._future is not None:
                return self._future
            future: torch.futures.Future[Any] = torch.futures.Future()
            self._future = future
            over = self._over
        if over:  # nothing hangs on it yet
            self._complete(future)
        return future

    def is_completed(self) -> bool:
        return self._over

    def is_success(self) -> bool:
        return self._over and self._failure is None

    def exception(self) -> Any:
        return self._failure

    def result(self) -> Any:
        self.wait()
        return self._results

    def synchronize(self) -> None:
        self.wait()

    def block_current_stream(self) -> None:
        self.wait()


class Calls:
    """One at a time, first come, first served. A synchronous call runs on its caller's thread when nothing is before
    it; all others run on one thread, which never runs what users hang on them: that may wait for further calls."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._changed = threading.Condition(self._lock)
        self._waiting: deque[tuple[CallWork, Callable[[], None]]] = deque()
        self._running = self._closing = False
        self._thread: threading.Thread | None = None
        self._pool: ThreadPoolExecutor | None = None

    def call(self, results: Any, act: Callable[[], None], now: bool) -> CallWork:
        """``now``: return when it is done, and raise what it raises."""
        work = CallWork(results, self)
        with self._lock:
            here = now and not self._running and not self._waiting
            if here:
                self._running = True
            else:
                self._waiting.append((work, act))
                self._serve()
                self._changed.notify_all()
        if here:
            self._carry_out(work, act)
        if now:
            work.wait()
        return work

    def _serve(self) -> None:
        if self._thread is None:
            self._thread = threading.Thread(target=self._loop, name="shoal-collectives", daemon=True)
            self._thread.start()

    def _loop(self) -> None:
        while True:
            with self._lock:
                self._changed.wait_for(lambda: not self._running if self._waiting else self._closing)
                if not self._waiting:
                    return
                work, act = self._waiting.popleft()
                self._running = True
            self._carry_out(work, act)
            del work, act  # what they hold goes now, not with the next call

    def _carry_out(self, work: CallWork, act: Callable[[], None]) -> None:
        failure: Exception | None = None
        try:
            act()
        except Exception as error:  # told to whoever waits
            failure = error
        with self._lock:
            self._running = False
            if self._waiting or self._closing:
                self._changed.notify_all()
        work.finish(failure)

    def aside(self, task: Callable[[], None]) -> None:
        """Run a task soon, on a thread that may wait in it as long as it likes."""
        with self._lock:
            if self._pool is None:
                self._pool = ThreadPoolExecutor(MOST_CALLBACKS, thread_name_prefix="shoal-callbacks")
            pool = self._pool
        pool.submit(task)

    def close(self) -> None:
        """What was posted is carried out; then the thread ends."""
        with self._lock:
            self._closing = True
            self._changed.notify_all()
            thread, pool = self._thread, self._pool
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        if pool is not None:
            pool.shutdown(wait=False)
