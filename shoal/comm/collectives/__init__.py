"""Collectives as values: who sends which share of a tensor to whom, in which order, and what is added to what.

`actions` has the values, one file a family has the algorithms, `registry` names them, `check` proves them, `draw` shows
them, `execute` carries them out over any transport. Everything but `execute` goes without torch.
"""
