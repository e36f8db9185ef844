"""The program on the page about communication, as torchrun starts it."""

from pathlib import Path

from torchrun_programs import outputs

EXAMPLE = Path(__file__).parents[3] / "examples" / "ddp_over_shm.py"


def test_the_example_learns_the_same_on_any_number_of_ranks_and_says_nothing_else(warm):
    losses = set()
    for ranks, total in ((1, 0), (2, 1)):
        (first, *others), complaints = outputs(EXAMPLE.read_text(encoding="utf-8"), ranks, warm)
        assert [*others, *complaints] == [""] * (2 * ranks - 1)
        loss, _, said = first.strip().partition(", ")
        assert said == f"sum of ranks {total}"
        losses.add(loss)
    assert len(losses) == 1
