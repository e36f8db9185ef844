"""The pictures show every message, and stand alone."""

import xml.etree.ElementTree as ElementTree

import pytest
from collective_cases import PAIRS

from shoal.comm.collectives.actions import Send
from shoal.comm.collectives.draw import arrows, links_svg, rounds_svg, timeline
from shoal.comm.collectives.registry import build
from shoal.comm.collectives.traffic import traffic

SVG = "{http://www.w3.org/2000/svg}"


def paths(svg):
    return [path for path in ElementTree.fromstring(svg).iter(f"{SVG}path") if path.get("fill") == "none"]


@pytest.mark.parametrize(("collective", "name"), PAIRS)
def test_every_message_is_an_arrow_of_its_chunks(collective, name):
    program = build(collective, name, 5, hosts=[0, 0, 1, 1, 1], target=3)
    sent = sum(isinstance(action, Send) for _, _, action in program)
    found = arrows(program)
    assert sum(len(arrow.chunks) for arrow in found) == sent
    root = ElementTree.fromstring(rounds_svg(program))
    assert len([p for p in root.iter(f"{SVG}path") if p.get("stroke-width") != "1"]) == len(found)
    assert root.find(f"{SVG}title").text.startswith(program.name)


def test_every_link_is_a_line_as_wide_as_its_bytes():
    hosts = ["left <a>", "left <a>", "right"]
    program = build("all_reduce", "two_level", 3, hosts=hosts)
    svg = links_svg(program, hosts)
    lines = [p for p in ElementTree.fromstring(svg).iter(f"{SVG}path") if p.get("stroke-width") != "1"]
    assert len(lines) == len(traffic(program, 1200).by_line)
    assert "left &lt;a&gt;" in svg
    assert max(float(line.get("stroke-width")) for line in lines) == 4.0


@pytest.mark.parametrize("draw", [rounds_svg, links_svg])
def test_a_picture_fetches_nothing(draw):
    svg = draw(build("all_reduce", "double_tree", 7))
    assert svg.count("http") == 1  # the name of the format
    assert not [word for word in ("<script", "<image", "@import", "url(", "href") if word in svg]


def test_a_program_of_one_rank_has_a_picture():
    for draw in (rounds_svg, links_svg):
        ElementTree.fromstring(draw(build("all_reduce", "ring", 1)))


def test_the_timeline_says_who_does_what_when():
    assert timeline(build("reduce", "binomial", 3)).splitlines() == [
        "reduce by binomial: 3 ranks, root 0, 1 chunks, 2 rounds",
        "rank 0  <+ <+",
        "rank 1  >  .",
        "rank 2  .  >",
    ]
    assert timeline(build("all_reduce", "ring", 3)).splitlines()[1] == "rank 0  x+ x+ x  x"
