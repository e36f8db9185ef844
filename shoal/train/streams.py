"""Random streams that belong to the work, not to the worker."""

import hashlib

import torch


def stream_seed(seed: int, step: int, shard: int, micro_batch: int) -> int:
    """The seed of one micro-batch's random stream: 63 bits of a hash, so that no two streams are related."""
    words = f"shoal/{seed}/{step}/{shard}/{micro_batch}".encode()
    return int.from_bytes(hashlib.blake2b(words, digest_size=8).digest()) >> 1


def enter_stream(seed: int, step: int, shard: int, micro_batch: int) -> None:
    """Make torch's default generators start at the stream of this micro-batch."""
    number = stream_seed(seed, step, shard, micro_batch)
    if torch.accelerator.is_available():
        torch.manual_seed(number)
    else:  # torch.manual_seed notes down where it was called, for each kind of accelerator that may come yet: 100 times
        torch.default_generator.manual_seed(number)  # the time of seeding
