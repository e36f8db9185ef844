"""Context parallelism: each worker holds a slice of every sequence, and attention goes round in a ring."""
