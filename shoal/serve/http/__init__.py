"""HTTP: connections, routes, what the answers look like. Nothing here imports torch."""
