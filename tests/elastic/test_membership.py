"""The decider, event by event: no process, no clock."""

from shoal.elastic import membership as m


def begun(wanted: int = 3, least: int = 1, most: int = 8) -> m.Membership:
    """An epoch 1 of seats 0, 1, ... that has committed step 1."""
    made = m.Membership(wanted, least, most)
    assert made.begin(0.0) == [m.Fork(0)], "the first one opens the data, the others only map what it has prepared"
    assert made.on(m.Opened(0), 0.1) == [m.Fork(seat) for seat in range(1, wanted)]
    done = [do for seat in range(wanted) for do in made.on(m.Ready(seat), 0.2)]
    assert done[0] == m.Form(1, tuple(range(wanted)), (m.FRESH,) * wanted, False)
    assert made.on(m.Went(0, 1, 1), 0.3) == []
    return made


def of(kind: type, done: list[m.Instruction]) -> list:
    return [do for do in done if isinstance(do, kind)]


def test_a_death_ends_the_epoch_and_forks_another_worker_at_once():
    done = begun().on(m.Dead(1, "killed"), 1.0)
    assert done == [m.Tell("lost", "killed", 0.0, (1,)), m.Break(1), m.Fork(3)]


def test_survivors_go_on_as_soon_as_all_of_them_have_left_without_waiting_for_the_new_one():
    made = begun()
    made.on(m.Dead(1, "killed"), 1.0)
    assert of(m.Form, made.on(m.Left(0, 4, False), 1.1)) == []
    (form,) = of(m.Form, made.on(m.Left(2, 4, False), 1.2))
    assert (form.epoch, form.seats, form.steps, form.cold) == (2, (0, 2), (4, 4), False)
    (told,) = of(m.Tell, made.on(m.Went(2, 2, 5), 1.5))
    assert (told.event, told.why, told.cost_s, told.seats) == ("recovered", "killed", 0.5, (0, 2))
    assert dict(told.more) == {"workers": 2, "before": 3}


def test_who_was_cut_off_in_the_middle_of_the_others_update_takes_the_newest_step():
    made = begun()
    made.on(m.Dead(1, "killed"), 1.0)
    made.on(m.Left(0, 4, False), 1.1)
    (form,) = of(m.Form, made.on(m.Left(2, 5, True), 1.2))
    assert (form.steps, form.donor, form.due) == ((4, 5), 1, True)


def test_a_new_worker_joins_after_a_step_and_comes_last():
    made = begun()
    made.on(m.Dead(0, "killed"), 1.0)
    made.on(m.Left(1, 4, False), 1.1)
    made.on(m.Left(2, 4, False), 1.1)
    assert made.on(m.Ready(3), 1.4) == [m.Ask(2)]
    made.on(m.Left(1, 6, False), 1.5)
    (form,) = of(m.Form, made.on(m.Left(2, 6, False), 1.5))
    assert (form.seats, form.steps) == ((1, 2, 3), (6, 6, m.FRESH))


def test_a_suspect_is_killed_before_anything_else_happens():
    done = begun().on(m.Suspect(2, "no progress"), 5.0)
    assert done == [m.Tell("suspected", "no progress", 0.0, (2,)), m.Kill(2), m.Break(1), m.Fork(3)]


def test_a_drain_is_planned_and_makes_the_run_smaller_but_not_below_its_minimum():
    assert begun(3).on(m.Drain(0, "asked"), 1.0) == [m.Ask(1)]
    assert begun(3, least=3).on(m.Drain(0, "asked"), 1.0) == [m.Fork(3)], "it stays until another one is there"


def test_below_the_minimum_nobody_goes_on_until_there_are_enough():
    made = begun(3, least=3)
    made.on(m.Dead(1, "killed"), 1.0)
    made.on(m.Left(0, 4, False), 1.1)
    done = made.on(m.Left(2, 4, False), 1.2)
    assert of(m.Form, done) == []
    assert of(m.Tell, done)[0].event == "paused"
    (form,) = of(m.Form, made.on(m.Ready(3), 9.0))
    assert form.steps == (4, 4, m.FRESH)


def test_a_smaller_number_keeps_the_first_ranks_and_releases_the_others():
    made = begun(3)
    assert made.on(m.Resize(1, "asked"), 1.0) == [m.Ask(1)]
    made.on(m.Left(2, 4, False), 1.1)
    made.on(m.Left(1, 4, False), 1.1)
    done = made.on(m.Left(0, 4, False), 1.1)
    assert of(m.Form, done)[0].seats == (0,)
    assert of(m.Release, done) == [m.Release(1), m.Release(2)]
    assert of(m.Tell, made.on(m.Dead(1, ""), 1.2)) == [], "who was released is not lost"


def test_shards_move_between_the_same_workers_after_a_step():
    made = begun(2)
    assert made.on(m.Rebalance(1, "slow"), 1.0) == [m.Ask(1)]
    made.on(m.Left(0, 4, False), 1.1)
    (form,) = of(m.Form, made.on(m.Left(1, 4, False), 1.2))
    assert (form.epoch, form.seats, form.steps) == (2, (0, 1), (4, 4))
    (told,) = of(m.Tell, made.on(m.Went(0, 2, 5), 1.5))
    assert (told.event, told.why) == ("rebalanced", "slow")
    assert made.on(m.Went(1, 2, 5), 1.5) == []


def test_numbers_that_cannot_be_are_refused_and_change_nothing():
    made = begun(3, least=2)
    for workers in (1, 9):
        (told,) = made.on(m.Resize(workers, "asked"), 1.0)
        assert told.event == "refused"
        assert f"{workers} workers cannot be: this run has from 2 to 8" in told.why
    assert made.wanted == 3


def test_a_run_whose_workers_die_without_a_step_gives_up_and_says_of_what():
    made = begun(1, most=2)
    for _ in range(100):
        seat = max(made.seats)
        done = [*made.on(m.Ready(seat), 1.0), *made.on(m.Dead(seat, "killed by SIGSEGV"), 1.0)]
        if of(m.GiveUp, done):
            break
    assert of(m.GiveUp, done)
    assert "killed by SIGSEGV" in of(m.GiveUp, done)[0].why


def test_what_comes_after_the_result_is_only_released():
    made = begun(2)
    assert made.on(m.Done(0), 9.0) == [m.Finish()]
    assert made.on(m.Left(1, 20, False), 9.1) == [m.Release(1)]
    assert made.on(m.Dead(1, ""), 9.2) == []
