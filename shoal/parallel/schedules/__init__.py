"""Pipeline schedules as values: made, verified, simulated and drawn before anything runs. Nothing here needs torch."""

from shoal.parallel.schedules.actions import Action, Kind
from shoal.parallel.schedules.lowering import lower
from shoal.parallel.schedules.registry import make_schedule
from shoal.parallel.schedules.schedule import Schedule
from shoal.parallel.schedules.verification import Verified, verify

__all__ = ["Action", "Kind", "Schedule", "Verified", "lower", "make_schedule", "verify"]
