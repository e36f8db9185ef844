"""Training: the worker, its step, the loop of a recipe, checkpoints. ``shoal.train(...)`` is `api.train`."""

from shoal.verb import make_verb

make_verb(__name__)
