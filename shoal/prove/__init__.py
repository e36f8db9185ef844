"""The equivalence prover. ``shoal.prove(...)`` is `api.prove`."""

from shoal.verb import make_verb

make_verb(__name__)
