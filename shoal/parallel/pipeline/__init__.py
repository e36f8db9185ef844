"""Runs a step of a pipeline: a schedule's actions on the chunks that a worker holds, to the bits of one process."""
