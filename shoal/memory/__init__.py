"""Recomputation, offload and states in fewer bits: less memory for the same result."""
