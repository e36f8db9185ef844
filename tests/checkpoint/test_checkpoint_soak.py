"""Drawn damage, many times over: not one checkpoint that is not whole is loaded, and the newest whole one is."""

import os
import random
import shutil
from collections import Counter
from pathlib import Path

import pytest

from shoal.train.checkpoint import damage, newest, save

STEPS = 4


def tear(file: Path, draw: random.Random) -> None:
    os.truncate(file, draw.randrange(file.stat().st_size))


def flip(file: Path, draw: random.Random) -> None:
    raw = bytearray(file.read_bytes())
    raw[draw.randrange(len(raw))] ^= 1 << draw.randrange(8)
    file.write_bytes(raw)


def swap(file: Path, draw: random.Random) -> None:
    """With another file of this checkpoint, or the same file of another one."""
    others = [f for f in (*file.parent.iterdir(), *file.parent.parent.glob(f"step-*/{file.name}")) if f != file]
    others = [other for other in others if other.read_bytes() != file.read_bytes()]
    other = draw.choice(others)
    mine, its = file.read_bytes(), other.read_bytes()
    file.write_bytes(its)
    if other.parent == file.parent:
        other.write_bytes(mine)


def lose(file: Path, draw: random.Random) -> None:
    file.unlink()


def grow(file: Path, draw: random.Random) -> None:
    with file.open("ab") as stream:
        stream.write(draw.randbytes(1 + draw.randrange(64)))


def zero(file: Path, draw: random.Random) -> None:
    """As a file system does that has made a file long before its data are there."""
    size = file.stat().st_size
    start = draw.randrange(size)
    raw = bytearray(file.read_bytes())
    raw[start:] = bytes(size - start)
    if bytes(raw) == file.read_bytes():
        raw[start] ^= 1
    file.write_bytes(raw)


DAMAGES = (tear, flip, swap, lose, grow, zero)


def storm(folder: Path, checkpoint_of, same, seeds: range) -> Counter[str]:
    """Each seed damages one to all of the newest checkpoints; the kinds that were tried."""
    whole = folder / "whole"
    for step in range(1, STEPS + 1):
        save(checkpoint_of(step), whole, shard_bytes=160, chunk_bytes=64)
    tried: Counter[str] = Counter()
    for seed in seeds:
        draw = random.Random(seed)
        torn = folder / "torn"
        shutil.copytree(whole, torn)
        hit = draw.randrange(1, STEPS + 1)
        for step in range(STEPS, STEPS - hit, -1):
            act = draw.choice(DAMAGES)
            act(draw.choice(sorted((torn / f"step-{step:08d}").iterdir())), draw)
            tried[act.__name__] += 1
        loaded, _, skipped = newest(torn)
        wanted = STEPS - hit
        assert (loaded is None) == (wanted == 0), f"seed {seed}"
        assert loaded is None or same(loaded, wanted), f"seed {seed}: a bad checkpoint was loaded"
        assert len(skipped) == hit, f"seed {seed}"
        assert all(why and "\n" not in why and str(torn) in why for _, why in skipped), f"seed {seed}"
        assert all(damage(where) for where, _ in skipped), f"seed {seed}"
        shutil.rmtree(torn)
    return tried


def test_no_bad_checkpoint_is_loaded_in_500_drawn_tears_flips_and_swaps(tmp_path, checkpoint_of, same):
    tried = storm(tmp_path, checkpoint_of, same, range(240))
    assert sum(tried.values()) >= 500
    assert min(tried[act.__name__] for act in DAMAGES) > 50


@pytest.mark.soak
def test_no_bad_checkpoint_is_loaded_in_20_000_drawn_tears_flips_and_swaps(tmp_path, checkpoint_of, same):
    tried = storm(tmp_path, checkpoint_of, same, range(240, 9000))
    assert sum(tried.values()) >= 20_000
