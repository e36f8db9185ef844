"""Load on a server, and what it does under it. The clients are processes of their own that import no torch."""
