"""Workers of one agent for all tests of this folder."""

from worker_fixtures import agent, on_workers

__all__ = ["agent", "on_workers"]
