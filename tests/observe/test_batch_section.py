"""What a report says of a batch that changed."""

from shoal.observe.batch_section import read_batches, section


def change(step, before, batch, **more):
    event = {"event": "rebatched", "step": step, "before": before, "batch": batch, "lr_before": 1e-3, "lr": 1.414e-3}
    return {**event, "noise_scale": 303.0, "goodput": [214.1, 243.7], "why": "a <larger> one", **more}


def test_every_change_has_a_row_and_the_whole_a_sentence():
    page = section([("run", read_batches([change(20, 32, 64), change(40, 64, 128), change(90, 128, 64)]))])
    assert "changed 3 times: 32 samples at first, 128 at most, 64 in the end" in page
    assert page.count("<tr>") == 1 + 3
    assert "0.001 → 0.001414" in page
    assert "214.1 → 243.7" in page
    assert "a &lt;larger&gt; one" in page


def test_a_replayed_change_has_no_goodput_and_noise_may_hide_the_gradient():
    page = section(
        [("run", read_batches([change(20, 32, 64, goodput=None, noise_scale="inf", why="as the recipe says")]))]
    )
    assert '<td class="value">inf</td>' in page
    assert '<td class="value">–</td>' in page


def test_changes_that_were_taken_back_are_left_out_and_a_fixed_batch_has_no_section():
    events = [change(20, 32, 64), change(40, 64, 128), {"event": "resumed", "step": 30}, change(50, 64, 32)]
    assert [each.step for each in read_batches(events)] == [20, 50]
    assert section([("run", read_batches([{"event": "committed", "step": 1}]))]) == ""
