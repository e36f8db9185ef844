"""A process group over shared memory without compiled parts: for machines that have no compiler."""
