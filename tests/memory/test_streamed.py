"""States that are kept elsewhere, or in eight bits, between two updates of torch's own optimisers."""

import errno
import inspect
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from forked_programs import run
from torch import Tensor, nn

from shoal.errors import UserError
from shoal.memory import streamed
from shoal.memory.keeping import KeptParameters, keep_states
from shoal.memory.shelves import OnDisk, file_of
from shoal.memory.streamed import CODES, PIECE, SCALES, Streamed
from shoal.recipe.memory_plan import MemoryPlan
from shoal.train import checkpoint
from shoal.train.optimizers import optimizer_classes
from shoal.train.snapshot import BackgroundWriter

CPU = torch.device("cpu")
NAMES = sorted(optimizer_classes())


def model() -> nn.Module:
    """Parameters below and above what is worth moving, one of them of an odd size."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(80, 67), nn.Tanh(), nn.Linear(67, 97, bias=False), nn.Linear(97, 3, bias=False))


def optimizer_of(name: str, module: nn.Module, **options) -> torch.optim.Optimizer:
    cls = optimizer_classes()[name]
    parameters = [p for p in module.parameters() if p.dim() == 2 or name != "Muon"]
    if "fused" in inspect.signature(cls).parameters:
        options["fused"] = True
    return cls(parameters, lr=0.01, **options)


def kept(optimizer, module: nn.Module, plan: MemoryPlan, said: list[str] | None = None) -> Streamed:
    say = (said if said is not None else []).append
    rest = {"device": CPU, "seed": 0, "step": lambda: 0, "sharing": 1, "say": say, "tell": say}
    found = keep_states(optimizer, module, plan, KeptParameters(), **rest)
    assert isinstance(found, Streamed)
    return found


def updated(module: nn.Module, optimizer: torch.optim.Optimizer, steps: int = 3) -> list[Tensor]:
    """The parameters after updates with gradients that are the same each time this is called."""
    stream = torch.Generator().manual_seed(1)
    for _ in range(steps):
        for parameter in module.parameters():
            parameter.grad = torch.randn(parameter.shape, generator=stream)
        optimizer.step()
    return [parameter.detach() for parameter in module.parameters()]


def equal(these: list[Tensor], those: list[Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


def on_disk(folder: Path) -> MemoryPlan:
    return MemoryPlan(offload_optimizer="disk", offload_dir=str(folder))


@pytest.mark.parametrize("name", NAMES)
def test_every_optimiser_with_its_states_on_disk_gives_the_bits_of_torch(tmp_path, monkeypatch, name):
    monkeypatch.setattr(streamed, "PIECE", 1024)  # so that a parameter has several pieces
    module, plain = model(), model()
    wanted = updated(plain, optimizer_of(name, plain))
    optimizer = kept(optimizer_of(name, module), module, on_disk(tmp_path))
    assert equal(updated(module, optimizer), wanted)
    shelf = optimizer._keeping.shelf
    moved = [t for p in module.parameters() for t in optimizer._tensors(p) if isinstance(t, Tensor) and shelf.holds(t)]
    stateless = name in ("SGD", "Adafactor")  # without momentum; only rows and columns
    assert bool(moved) != stateless


@pytest.mark.parametrize("options", [{"amsgrad": True, "weight_decay": 0.1}, {"maximize": True}])
def test_options_of_the_optimiser_are_kept(tmp_path, options):
    module, plain = model(), model()
    wanted = updated(plain, optimizer_of("AdamW", plain, **options))
    assert equal(updated(module, kept(optimizer_of("AdamW", module, **options), module, on_disk(tmp_path))), wanted)


def test_a_parameter_whose_memory_is_not_in_order_gets_the_same_update(tmp_path):
    def conv() -> nn.Module:
        torch.manual_seed(0)
        return nn.Conv2d(16, 32, 3).to(memory_format=torch.channels_last)

    module, plain = conv(), conv()
    wanted = updated(plain, torch.optim.AdamW(plain.parameters(), lr=0.1))
    optimizer = kept(torch.optim.AdamW(module.parameters(), lr=0.1), module, on_disk(tmp_path))
    assert equal(updated(module, optimizer), wanted)


def test_the_rate_of_a_group_reaches_the_update(tmp_path):
    module, plain = model(), model()
    inner, other = optimizer_of("AdamW", module), optimizer_of("AdamW", plain)
    optimizer = kept(inner, module, on_disk(tmp_path))
    for each in (optimizer, other):
        each.param_groups[0]["lr"] = 0.5
    assert equal(updated(module, optimizer, 1), updated(plain, other, 1))


# --- eight bits -------------------------------------------------------------------------------------------------------


def state_bytes(optimizer: torch.optim.Optimizer) -> int:
    return sum(t.nbytes for state in optimizer.state.values() for t in state.values() if isinstance(t, Tensor))


@pytest.mark.parametrize(("name", "options"), [("AdamW", {}), ("Adam", {"amsgrad": True}), ("SGD", {"momentum": 0.9})])
def test_states_in_eight_bits_take_about_a_quarter_and_the_update_stays_close(tmp_path, name, options):
    module, plain = nn.Linear(300, 200, bias=False), nn.Linear(300, 200, bias=False)
    plain.load_state_dict(module.state_dict())
    begun = module.weight.detach().clone()
    other = optimizer_of(name, plain, **options)
    wanted = updated(plain, other, 20)[0]
    optimizer = kept(optimizer_of(name, module, **options), module, MemoryPlan(optimizer_bits=8))
    found = updated(module, optimizer, 20)[0]
    assert state_bytes(optimizer) < 0.26 * state_bytes(other)
    error = float((found - wanted).norm() / (wanted - begun).norm())
    assert 0 < error < 0.05


def test_small_parameters_keep_states_of_32_bits():
    module = model()
    optimizer = kept(optimizer_of("AdamW", module), module, MemoryPlan(optimizer_bits=8))
    updated(module, optimizer, 1)
    for parameter, state in optimizer.state.items():
        assert ("exp_avg" + CODES in state) == (parameter.numel() >= 4096)
        assert ("exp_avg" in state) == (parameter.numel() < 4096)


def test_pieces_do_not_change_what_is_quantised(monkeypatch):
    module, other = model(), model()
    wanted = updated(other, kept(optimizer_of("AdamW", other), other, MemoryPlan(optimizer_bits=8)))
    monkeypatch.setattr(streamed, "PIECE", 1024)
    assert PIECE > 80 * 67
    assert equal(updated(module, kept(optimizer_of("AdamW", module), module, MemoryPlan(optimizer_bits=8))), wanted)


def test_eight_bits_on_disk_are_the_same_eight_bits(tmp_path):
    plan = MemoryPlan(optimizer_bits=8, offload_optimizer="disk", offload_dir=str(tmp_path))
    module, other = model(), model()
    wanted = updated(other, kept(optimizer_of("AdamW", other), other, MemoryPlan(optimizer_bits=8)))
    optimizer = kept(optimizer_of("AdamW", module), module, plan)
    assert equal(updated(module, optimizer), wanted)
    state = optimizer.state[module[0].weight]
    assert optimizer._keeping.shelf.holds(state["exp_avg" + CODES])
    assert optimizer._keeping.shelf.holds(state["exp_avg_sq" + SCALES])


@pytest.mark.parametrize("name", ["RMSprop", "Adafactor", "Muon"])
def test_an_optimiser_without_an_eight_bit_form_is_refused_in_one_line(name):
    module = model()
    with pytest.raises(UserError, match=rf"optimizer_bits = 8 is for Adam, AdamW and SGD.* {name}") as told:
        kept(optimizer_of(name, module), module, MemoryPlan(optimizer_bits=8))
    assert "\n" not in str(told.value)


class Own(torch.optim.SGD):
    """Somebody's own: what it does between two parameters is not known."""


def test_an_optimiser_that_is_not_of_torch_is_refused(tmp_path):
    module = model()
    with pytest.raises(UserError, match=r"for the optimisers of torch\.optim, and this one is Own"):
        kept(Own(module.parameters()), module, on_disk(tmp_path))


# --- the disk ---------------------------------------------------------------------------------------------------------


def full_after(writes: int) -> Callable[..., None]:
    real, count = OnDisk.write, 0

    def write(shelf: OnDisk, tensor: Tensor, start: int, values: Tensor) -> None:
        nonlocal count
        count += 1
        if count > writes:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(shelf, tensor, start, values)

    return write


@pytest.mark.parametrize("writes", [0, 1, 3, 6, 9, 14, 21])
def test_a_disk_that_fills_up_costs_memory_and_no_bit_and_is_told_once(tmp_path, monkeypatch, writes):
    monkeypatch.setattr(streamed, "PIECE", 1024)
    module, plain, said = model(), model(), list[str]()
    wanted = updated(plain, optimizer_of("AdamW", plain))
    optimizer = kept(optimizer_of("AdamW", module), module, on_disk(tmp_path), said)
    monkeypatch.setattr(OnDisk, "write", full_after(writes))
    assert equal(updated(module, optimizer), wanted)
    assert len(said) == 1
    assert "No space left on device" in said[0]


def test_a_disk_without_room_is_known_before_anything_is_written(tmp_path, monkeypatch):
    monkeypatch.setattr("shoal.memory.extents.ExtentFile.free_bytes", 90_000)
    module, plain, said = model(), model(), list[str]()
    optimizer = kept(optimizer_of("AdamW", module), module, on_disk(tmp_path), said)
    assert said == [
        f"the optimiser states of 1 worker and of a checkpoint take 0.2 MB, and {str(tmp_path)!r} has 0.1 MB to spare: "
        f"they stay in memory. memory.offload_dir names another folder."
    ]
    assert optimizer.expected_bytes() == 8 * (80 * 67 + 67 * 97)
    assert equal(updated(module, optimizer), updated(plain, optimizer_of("AdamW", plain)))
    assert not isinstance(optimizer._keeping.shelf, OnDisk)


def resident_bytes(tensor: Tensor) -> int:
    """How much of a mapped tensor is in this process's memory."""
    maps = Path("/proc/self/smaps").read_text(encoding="utf-8")
    found = re.search(rf"^{tensor.data_ptr():x}-.*?^Rss: +(\d+) kB", maps, re.MULTILINE | re.DOTALL)
    assert found
    return int(found[1]) * 1024


@pytest.mark.skipif(not Path("/proc/self/smaps").exists(), reason="counts pages with Linux's smaps")
def test_states_on_disk_are_not_in_the_process_between_two_updates(tmp_path):
    module = nn.Linear(1024, 1024)
    optimizer = kept(optimizer_of("AdamW", module), module, on_disk(tmp_path))
    updated(module, optimizer, 2)
    state = optimizer.state[module.weight]["exp_avg"]
    assert resident_bytes(state) == 0
    assert state.abs().sum() > 0  # read, and so there
    assert resident_bytes(state) >= state.nbytes
    optimizer._keeping.shelf.done([state])
    assert resident_bytes(state) == 0


@pytest.mark.parametrize("full", [False, True])
def test_a_checkpoint_of_states_on_disk_is_copied_on_disk_and_holds_them(tmp_path, monkeypatch, full):
    module = nn.Linear(512, 512)
    optimizer = kept(optimizer_of("AdamW", module), module, on_disk(tmp_path))
    updated(module, optimizer, 2)
    state = optimizer.state[module.weight]
    tensors = {key: state[key] for key in ("exp_avg", "exp_avg_sq")}
    wanted = {key: value.clone() for key, value in tensors.items()}
    with BackgroundWriter(tmp_path / "checkpoints", tensors) as writer:
        if full:
            monkeypatch.setattr(OnDisk, "write", full_after(0))
        writer.submit(tensors, {"step": 2})
        updated(module, optimizer, 1)  # goes on while it is written
        copies = dict(writer._copies)
    assert all((file_of(copy) is None) == full for copy in copies.values())
    found = checkpoint.newest(tmp_path / "checkpoints")[0].tensors
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
    assert not torch.equal(state["exp_avg"], wanted["exp_avg"])


KILLED = """
import sys, os, signal, torch
from memory.test_streamed import kept, model, on_disk, optimizer_of, updated
module = model()
optimizer = kept(optimizer_of("AdamW", module), module, on_disk(sys.argv[1]))
updated(module, optimizer)
print(os.listdir(sys.argv[1]), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_killed_process_leaves_no_file(tmp_path, warm):
    done = run([sys.executable, "-c", KILLED, str(tmp_path)], warm)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert done.stdout == "[]\n"  # it had no name while it lived
    assert not list(tmp_path.iterdir())
