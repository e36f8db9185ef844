"""Pictures of a program: a timeline as text; as SVG, its rounds with an arrow for each message, and who talks to whom.

The SVGs stand alone: no script, no font, nothing fetched; colours that tell apart in print and for the colour-blind.
"""

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import cos, hypot, pi, sin

from shoal.comm.collectives.actions import ROOTED, Action, Add, Copy, Program, Reduce, Send
from shoal.comm.collectives.traffic import traffic

_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#b8860b", "#7a5195", "#5b6770")
_GREY, _PALE = "#5b6770", "#f4f6f8"
_LABELLED = 300  # arrows: where there are more, numbers would hide them
_COLUMN, _ROW, _LEFT, _TOP = 84, 64, 56, 70


def timeline(program: Program) -> str:
    """A line a rank, a column a round: > it sends, < it receives, x both, + after it: it adds; . nothing."""
    cells = [[_cell(actions) for actions in rounds] for rounds in program.rounds]
    width = max((len(cell) for row in cells for cell in row), default=1)
    name = len(f"rank {program.ranks - 1}")
    lines = [program.headline()]
    for rank, row in enumerate(cells):
        lines.append(f"{f'rank {rank}':<{name}}  {' '.join(cell.ljust(width) for cell in row)}".rstrip())
    return "\n".join(lines)


def _cell(actions: Sequence[Action]) -> str:
    sends = any(isinstance(action, Send) for action in actions)
    receives = any(not isinstance(action, Send | Add | Copy) for action in actions)
    adds = any(isinstance(action, Add | Reduce) for action in actions)
    moves = ("x" if receives else ">") if sends else "<" if receives else ""
    return (moves + "+" * adds) or ("=" if actions else ".")


@dataclass(frozen=True)
class Arrow:
    """The chunks that go from a round of one rank to a round of another, on a lane."""

    sent: int  # round of the sender
    origin: int
    received: int  # round of the receiver
    to: int
    lane: int
    added: bool  # to what is there; else they replace it
    chunks: tuple[int, ...]  # as the sender numbers them; scratch by what it is like


def arrows(program: Program) -> list[Arrow]:
    queues: defaultdict[tuple[int, int, int], deque[tuple[int, int]]] = defaultdict(deque)
    for rank, number, action in program:
        if isinstance(action, Send):
            queues[rank, action.to, action.lane].append((number, program.like(action.chunk)))
    found: defaultdict[tuple[int, int, int, int, int, bool], list[int]] = defaultdict(list)
    for rank, number, action in program:
        if not isinstance(action, Send | Add | Copy):
            queue = queues[action.origin, rank, action.lane]
            if queue:
                sent, chunk = queue.popleft()
                added = isinstance(action, Reduce)
                found[sent, action.origin, number, rank, action.lane, added].append(chunk)
    return [Arrow(*key, tuple(chunks)) for key, chunks in sorted(found.items())]


def rounds_svg(program: Program) -> str:
    """Ranks from left to right, rounds from top to bottom, an arrow for each message in the colour of its first chunk.

    A full head: it is added to what is there. An open one: it replaces it. Dashed: on another lane than 0."""
    found = arrows(program)
    width = _LEFT + _COLUMN * program.ranks
    height = _TOP + _ROW * max(1, program.length) + 14
    parts = []
    for number in range(program.length):
        y = _TOP + number * _ROW
        if number % 2 == 0:
            parts.append(f'<rect x="0" y="{y}" width="{width}" height="{_ROW}" fill="{_PALE}"/>')
        parts.append(f'<text x="10" y="{y + _ROW / 2 + 4:g}" fill="{_GREY}">{number}</text>')
    parts.append(f'<text x="10" y="{_TOP - 14}" fill="{_GREY}">round</text>')
    for rank in range(program.ranks):
        x = _x(rank)
        parts.append(f'<line x1="{x:g}" y1="{_TOP - 6}" x2="{x:g}" y2="{height - 8}" stroke="#c8ccd0"/>')
        parts.append(f'<text x="{x:g}" y="{_TOP - 14}" text-anchor="middle">rank {rank}</text>')
    for arrow in found:
        start = _x(arrow.origin), _TOP + arrow.sent * _ROW + 8
        end = _x(arrow.to), _TOP + arrow.received * _ROW + _ROW - 10
        colour = _colour(arrow.chunks[0])
        parts.append(_line(start, end, colour, full=arrow.added, dashed=arrow.lane > 0))
        if len(found) <= _LABELLED:
            share = min(0.24, 26 / hypot(end[0] - start[0], end[1] - start[1]))
            near_x, near_y = (a + (b - a) * share for a, b in zip(start, end, strict=True))
            parts.append(_label(near_x, near_y, _listed(arrow.chunks), colour))
    for rank, number, action in program:
        if isinstance(action, Add):
            at = f'cx="{_x(rank):g}" cy="{_TOP + number * _ROW + _ROW - 5:g}"'
            parts.append(f'<circle {at} r="3" fill="{_colour(program.like(action.into))}"/>')
    return _svg(width, height, _caption(program), parts)


def links_svg(program: Program, hosts: Sequence[object] | None = None) -> str:
    """Ranks on a circle (those of a host side by side), a line for every pair that talks, as wide as its bytes.

    The colour is the lane's. ``hosts[rank]`` names a rank's host."""
    per_block = 840 * program.segments  # divides well: shares show as they are
    moved = traffic(program, per_block * program.ranks)
    most = max(moved.by_line.values(), default=1)
    radius = max(90.0, program.ranks * 9.0)
    size, centre = 2 * radius + 150, radius + 75
    names: list[object] = [0] * program.ranks if hosts is None else list(hosts)
    order = sorted(range(program.ranks), key=lambda rank: (names.index(names[rank]), rank))
    turn = {rank: 2 * pi * place / program.ranks - pi / 2 for place, rank in enumerate(order)}
    at = {rank: (centre + radius * cos(a), centre + 20 + radius * sin(a)) for rank, a in turn.items()}
    parts = []
    for (origin, to, lane), count in sorted(moved.by_line.items()):
        start, end = _beside(at[origin], at[to], 14, 3.5 if (to, origin, lane) in moved.by_line else 0)
        colour = _COLOURS[lane % len(_COLOURS)]
        parts.append(_line(start, end, colour, full=True, dashed=False, width=1 + 3 * count / most))
    colours = {name: _COLOURS[-1 - place % 3] for place, name in enumerate(dict.fromkeys(names))}
    for rank in order:
        x, y = at[rank]
        parts.append(
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="13" fill="#fff" stroke="{colours[names[rank]]}" stroke-width="2"/>'
        )
        parts.append(f'<text x="{x:.1f}" y="{y + 4:.1f}" text-anchor="middle">{rank}</text>')
        if hosts is not None:
            away = centre + (radius + 32) * cos(turn[rank]), centre + 24 + (radius + 32) * sin(turn[rank])
            name = escape(str(names[rank]))
            parts.append(f'<text x="{away[0]:.1f}" y="{away[1]:.1f}" text-anchor="middle" fill="{_GREY}">{name}</text>')
    return _svg(size, size + 30, _caption(program), parts)


def _caption(program: Program) -> str:
    rooted = f", root {program.root}" if program.collective in ROOTED else ""
    return f"{program.name}: {program.ranks} ranks{rooted}, {program.chunks} chunks, {program.length} rounds"


def _x(rank: int) -> float:
    return _LEFT + _COLUMN * (rank + 0.5)


def _colour(chunk: int) -> str:
    return _COLOURS[chunk % len(_COLOURS)]


def _listed(chunks: Sequence[int]) -> str:
    """0-3, 8, ...: runs in short, and no more than fits."""
    runs: list[list[int]] = []
    for chunk in chunks:
        if runs and chunk == runs[-1][1] + 1:
            runs[-1][1] = chunk
        else:
            runs.append([chunk, chunk])
    told = [str(a) if a == b else f"{a}-{b}" for a, b in runs]
    return ", ".join(told[:2]) + ("…" if len(told) > 2 else "")


def _beside(
    a: tuple[float, float], b: tuple[float, float], gap: float, shift: float
) -> tuple[tuple[float, float], ...]:
    """The line from a to b without its ends, moved to the right so that the way back has room."""
    long = hypot(b[0] - a[0], b[1] - a[1])
    x, y = (b[0] - a[0]) / long, (b[1] - a[1]) / long
    return tuple((p[0] + s * gap * x - shift * y, p[1] + s * gap * y + shift * x) for p, s in ((a, 1), (b, -1)))


def _line(
    start: tuple[float, float],
    end: tuple[float, float],
    colour: str,
    *,
    full: bool,
    dashed: bool,
    width: float = 1.6,
) -> str:
    long = hypot(end[0] - start[0], end[1] - start[1]) or 1.0
    x, y = (end[0] - start[0]) / long, (end[1] - start[1]) / long
    back, side = 6 + 1.5 * width, 2.5 + width
    left, right = ((end[0] - back * x + s * side * y, end[1] - back * y - s * side * x) for s in (1, -1))
    inside = colour if full else "none"
    head = f"M{left[0]:.1f} {left[1]:.1f}L{end[0]:.1f} {end[1]:.1f}L{right[0]:.1f} {right[1]:.1f}"
    dash = ' stroke-dasharray="6 4"' if dashed else ""
    stop = (end[0] - back * x * full, end[1] - back * y * full)
    return (
        f'<path d="M{start[0]:.1f} {start[1]:.1f}L{stop[0]:.1f} {stop[1]:.1f}" stroke="{colour}" '
        f'stroke-width="{width:.2g}" fill="none"{dash}/>'
        f'<path d="{head}{"Z" if full else ""}" stroke="{colour}" stroke-width="1" fill="{inside}"/>'
    )


def _label(x: float, y: float, text: str, colour: str) -> str:
    halo = 'stroke="#fff" stroke-width="3" paint-order="stroke"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="middle" font-size="11" fill="{colour}" {halo}>{text}</text>'


def _svg(width: float, height: float, title: str, parts: Sequence[str]) -> str:
    width = max(width, 20 + 8 * len(title))
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{width:g}" height="{height:g}" '
        f'viewBox="0 0 {width:g} {height:g}" font-family="sans-serif" font-size="12" role="img">'
        f"<title>{escape(title)}</title>"
        f'<rect width="100%" height="100%" fill="#fff"/>'
        f'<text x="10" y="22" font-size="14" font-weight="bold">{escape(title)}</text>' + "".join(parts) + "</svg>\n"
    )
