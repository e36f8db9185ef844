"""Serving: HTTP in one process, models in others. ``shoal.serve(...)`` is `api.serve`."""

from shoal.verb import make_verb

make_verb(__name__)
