"""Workers of one agent for all tests of this folder."""

from worker_fixtures import on_workers

__all__ = ["on_workers"]
