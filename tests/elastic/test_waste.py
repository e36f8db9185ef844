"""What a lost worker is said to have cost."""

from shoal.elastic.waste import Waste


def test_a_loss_costs_what_was_worked_since_the_last_committed_step():
    waste = Waste((0, 1), 4, 9.0)
    waste.committed(5, 10.0)
    assert waste.told(lambda: 6, 10.5) == {"cost_s": 0.5, "steps": 1}


def test_work_ends_when_survivors_notice_not_when_the_agent_does():
    waste = Waste((0, 1), 4, 9.0)
    waste.committed(5, 10.0)
    waste.broke(6, 10.25)
    assert waste.told(lambda: 9, 11.0) == {"cost_s": 0.25, "steps": 1}


def test_a_second_loss_costs_nothing_more():
    waste = Waste((0, 1), 4, 9.0)
    waste.committed(5, 10.0)
    waste.told(lambda: 6, 10.5)
    assert waste.told(lambda: 6, 10.6) == {"cost_s": 0.0, "steps": 0}
