"""The parts in C++: compiled when there is a compiler, and never needed."""
