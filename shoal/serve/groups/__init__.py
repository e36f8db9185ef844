"""One model served by several processes: a replica is then a group, one process a place of the mesh."""
