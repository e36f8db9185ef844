"""A schedule goes out as a CSV file and comes back; its pictures show what it is."""

import xml.etree.ElementTree as ElementTree
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from shoal.errors import UserError
from shoal.parallel.schedules import make_schedule, verify
from shoal.parallel.schedules.csv_file import parse_csv, read_csv, to_csv
from shoal.parallel.schedules.draw import timeline_svg, timeline_text
from shoal.parallel.schedules.registry import MAKERS
from shoal.parallel.schedules.simulation import simulate


@given(name=st.sampled_from(sorted(MAKERS)), p=st.integers(1, 6), m=st.integers(1, 9))
def test_what_goes_out_as_csv_comes_back_as_it_was(name, p, m):
    schedule = make_schedule(name, p, m)
    assert replace(parse_csv(to_csv(schedule), name), name=name) == schedule


def test_the_cells_of_torch_are_read_with_its_overlapped_pairs_and_idle_cells():
    text = "# two workers\n0F0,0F1,,(0F2;0B0)OVERLAP_F_B,0B1,0B2\n,1F0,1I0,1W0,1F1,1B1,1F2,1B2\n"
    schedule = parse_csv(text, "theirs.csv")
    assert [str(a) for a in schedule.actions[0]] == ["F0.0", "F0.1", "F0.2", "B0.0", "B0.1", "B0.2"]
    assert schedule.placement == (0, 1)
    assert schedule.micro_batches == 3
    verify(schedule)


def test_what_torch_writes_is_what_we_read():
    from torch.distributed.pipelining.schedules import _Action

    theirs = ["0F0", "0I0", "0W0", "(0F1;0B1)OVERLAP_F_B"]
    text = ",".join(str(_Action.from_str(cell)) for cell in theirs)
    assert [str(a) for a in parse_csv(text, "theirs.csv").actions[0]] == ["F0.0", "I0.0", "W0.0", "F0.1", "B0.1"]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("F0.0,X0.0\n", "worker 0: cell 'X0.0' is none"),
        ("F0.0,B0.0,0SEND_F0\n", "cell '0SEND_F0' is a message: leave it out"),
        ("F0.0,B0.0\nF0.1,B0.1\n", "chunk 0 is on worker 0 and, with F0.1, on worker 1"),
        ("F0.0,B0.0\nF2.0,B2.0\n", "no pass of chunk 1"),
        ("# nothing\n", "has no pass"),
    ],
)
def test_a_csv_that_says_nothing_we_know_is_refused_with_row_and_cell(text, says):
    with pytest.raises(UserError, match=says):
        parse_csv(text, "mine.csv")


def test_a_csv_file_is_a_schedule_by_its_name_if_it_fits_the_pipe(tmp_path):
    file = tmp_path / "mine.csv"
    file.write_text(to_csv(make_schedule("1f1b", 2, 4)))
    assert make_schedule(str(file), 2, 4).actions == make_schedule("1f1b", 2, 4).actions
    for arguments, says in (
        ((3, 4), "2 workers, and the pipe has 3"),
        ((2, 5), "4 micro-batches"),
        ((2, 4, 2), "chunks"),
    ):
        with pytest.raises(UserError, match=says):
            make_schedule(str(file), *arguments)
    with pytest.raises(UserError, match="cannot be read"):
        read_csv(tmp_path / "none.csv")


def test_the_text_timeline_shows_every_pass_where_it_happens():
    line = simulate(make_schedule("1f1b", 2, 2))
    assert timeline_text(line, 60).splitlines() == [
        "worker 0  F0.0 F0.1 ..........B0.0----- .....B0.1-----",
        "worker 1  .....F1.0 B1.0----- F1.1 B1.1----- ..........",
    ]
    assert timeline_text(line, 40).splitlines() == [
        "worker 0  F0 F1 ......B0--- ...B1---",
        "worker 1  ...F0 B0--- F1 B1--- ......",
    ]


def test_the_shortest_text_has_one_letter_a_pass_small_for_later_chunks_and_says_what_it_left_out():
    line = simulate(make_schedule("zb-v", 2, 8))
    assert timeline_text(line, 60).splitlines()[0].startswith("worker 0  FFFfiwfiwFIWfiw")
    assert timeline_text(line, 40).splitlines()[-1] == "(the first 61%; an SVG shows all)"


@given(name=st.sampled_from(sorted(MAKERS)), p=st.integers(1, 8), m=st.integers(1, 40), width=st.integers(40, 200))
def test_the_text_timeline_never_is_wider_than_the_terminal(name, p, m, width):
    text = timeline_text(simulate(make_schedule(name, p, m)), width)
    assert max(map(len, text.splitlines())) <= width
    assert len(text.splitlines()) in (p, p + 1)


def test_the_svg_stands_alone_and_has_a_box_for_every_pass():
    schedule = make_schedule("zb-v", 3, 5)
    tree = ElementTree.fromstring(timeline_svg(simulate(schedule)))
    titles = [node.text for node in tree.iter("{http://www.w3.org/2000/svg}title")]
    assert sorted(title.split(",")[0] for title in titles) == sorted(str(a) for row in schedule.actions for a in row)
