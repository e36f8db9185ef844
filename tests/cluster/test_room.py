"""How much memory is free, from what the kernel and the control group say."""

import pytest

from shoal.cluster import room


@pytest.fixture
def said(tmp_path):
    def write(available_kb, **files):
        (tmp_path / "meminfo").write_text(f"MemTotal: 99999999 kB\nMemAvailable: {available_kb} kB\n")
        for name, text in files.items():
            place = tmp_path / name.replace("__", "/").replace("_at_", ".")
            place.parent.mkdir(exist_ok=True)
            place.write_text(text)
        return room.free_memory_bytes(tmp_path / "meminfo", tmp_path)

    return write


def test_the_smaller_of_machine_and_control_group_counts(said):
    assert said(1000) == 1000 << 10
    assert said(1000, memory_at_max="max\n", memory_at_current="5\n") == 1000 << 10
    assert said(1000, memory_at_max="600000\n", memory_at_current="100000\n") == 500000
    assert said(100, memory_at_max="600000\n", memory_at_current="100000\n") == 100 << 10
    assert said(1000, memory_at_max="6\n", memory_at_current="100000\n") == 0


def test_the_first_version_of_control_groups_is_read_too(said):
    assert said(1000, memory__memory_at_limit_in_bytes="70000", memory__memory_at_usage_in_bytes="20000") == 50000


def test_without_dev_shm_there_is_none(tmp_path):
    free, all_of_it = room.dev_shm_bytes(tmp_path)
    assert 0 < free <= all_of_it
    assert room.dev_shm_bytes(tmp_path / "nothing") is None
