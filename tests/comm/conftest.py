"""Workers of one agent for all tests of this folder."""

from worker_fixtures import on_group, on_workers, under_torchrun

__all__ = ["on_group", "on_workers", "under_torchrun"]
