"""Which algorithms the bench of choices goes on measuring after a first look."""

from benches import bench

worth = bench("collective_choice").worth_measuring
LOOK = {"best": 1.0, "near": 1.2, "far": 1.9, "hopeless": 3.0, "chosen": 5.0}


def test_what_may_be_the_best_is_measured_and_the_chosen_one_always():
    assert worth(LOOK, {"chosen"}, turn_s=12.1, share_s=1000.0) == {"best", "near", "far", "chosen"}


def test_less_is_measured_where_the_share_does_not_last():
    enough = 12 * (1.0 + 1.2 + 1.9 + 5.0)  # the fewest turns of those above
    assert "far" in worth(LOOK, {"chosen"}, turn_s=12.1, share_s=enough + 0.1)
    assert worth(LOOK, {"chosen"}, turn_s=12.1, share_s=enough - 0.1) == {"best", "near", "chosen"}
