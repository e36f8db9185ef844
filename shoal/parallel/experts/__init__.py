"""Expert parallelism: each worker holds some of the experts, and tokens travel to them and back."""
