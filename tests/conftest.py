"""Fixtures shared by all tests."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def shared_data() -> Path:
    """Real data sets that stand beside the checkout; a clone elsewhere may point SHOAL_TEST_DATA at its own copy."""
    folder = Path(os.environ.get("SHOAL_TEST_DATA", Path(__file__).parents[2] / "shared" / "data"))
    if not (folder / "mnist").exists():
        pytest.skip(f"no real data sets at {folder}; set SHOAL_TEST_DATA to a folder with mnist/")
    return folder
