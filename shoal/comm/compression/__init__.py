"""Gradients sent in fewer bytes. Lossy: what a step leaves unsent is fed back into the next one."""
