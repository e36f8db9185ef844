"""The exit codes of every verb."""

DONE = 0
FAILED = 1
BAD_INPUT = 2
INTERRUPTED = 130  # after saving
