"""A layout carried out: modules that hold a part of their weights and talk to the workers that hold the others."""
