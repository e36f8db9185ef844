"""The event log mirrored into TensorBoard: which scalars an event holds, and the writer that takes them."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

from shoal.errors import UserError


class ScalarWriter(Protocol):
    """The part of ``torch.utils.tensorboard.SummaryWriter`` that is used here."""

    def add_scalar(self, tag: str, scalar_value: float, global_step: int, walltime: float) -> None: ...

    def add_text(self, tag: str, text_string: str, global_step: int, walltime: float) -> None: ...

    def close(self) -> None: ...


def scalars(event: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    """The (tag, value) pairs of one event; none for events without figures. NaN may come as a number or as text."""
    if event["event"] == "committed":
        for tag, key in (("train/loss", "loss"), ("train/grad_norm", "grad_norm"), ("train/lr", "lr")):
            if event.get(key) is not None:
                yield tag, float(event[key])
        seconds = float(event.get("seconds") or 0.0)
        if seconds > 0:
            yield "speed/seconds_per_step", seconds
            for unit in ("samples", "targets"):
                if event.get(unit) is not None:
                    yield f"speed/{unit}_per_second", float(event[unit]) / seconds
            for rank, waited in (event.get("waited") or {}).items():
                yield f"data_wait_share/rank_{rank}", float(waited) / seconds
        for part, took in (event.get("parts") or {}).items():
            yield f"seconds/{part}", float(took)
    elif event["event"] == "evaluated":
        for figure, value in (event.get("figures") or {}).items():
            yield f"{event.get('split', 'held-out')}/{figure}", float(value)
    elif event["event"] == "checkpointed":
        for tag in ("stall_s", "write_s", "bytes"):
            if event.get(tag) is not None:
                yield f"checkpoint/{tag}", float(event[tag])


def mirror(event: Mapping[str, Any], writer: ScalarWriter) -> None:
    """Write the scalars and the sampled text of one event; an event without a step has none."""
    step = event.get("step")
    if step is None:
        return
    when = float(event["time"])
    for tag, value in scalars(event):
        writer.add_scalar(tag, value, int(step), when)
    if event["event"] == "sampled":
        indented = "\n".join(f"    {line}" for line in str(event.get("text", "")).splitlines())
        writer.add_text("samples", indented, int(step), when)  # indented: Markdown shows it as it is


def open_writer(path: Path) -> ScalarWriter:
    """A SummaryWriter on the folder ``path``. Raises UserError when TensorBoard is not installed."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise UserError("writing TensorBoard files needs tensorboard: pip install 'shoal[tensorboard]'") from None
    writer: ScalarWriter = SummaryWriter(str(path))
    return writer


class TensorBoardLog:
    """Takes events as `EventLog` writes them (with ``time``, ``event``, ``step``) and mirrors them into a folder."""

    def __init__(self, path: Path) -> None:
        self._writer = open_writer(path)

    def write(self, event: Mapping[str, Any]) -> None:
        mirror(event, self._writer)

    def close(self) -> None:
        self._writer.close()
