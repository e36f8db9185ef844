"""What waits elsewhere comes back as it was, whatever the place does, and the memory is free meanwhile."""

import errno
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from forked_programs import Program, run
from torch import nn

from shoal.errors import RunFailed, UserError
from shoal.memory.apply import set_up
from shoal.memory.away import Away
from shoal.memory.extents import ExtentFile
from shoal.memory.meter import Meter
from shoal.memory.places import Host
from shoal.recipe.memory_plan import MemoryPlan

CPU = torch.device("cpu")


class Layer(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        one, two = self.up(self.norm(x)).chunk(2, -1)  # views of one memory
        return x + self.down(torch.cat([one.sin(), two.cos()], -1))


def made(width: int = 64, layers: int = 6) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(*[Layer(width) for _ in range(layers)])


def gradients(model: nn.Module, passes: int = 2, rows: int = 256) -> list[torch.Tensor]:
    for number in range(passes):
        torch.manual_seed(number)
        x = torch.randn(rows, 64, requires_grad=True)
        model(x).square().sum().backward()
    assert x.grad is not None
    return [x.grad, *(p.grad for p in model.parameters())]


def equal(these: list[torch.Tensor], those: list[torch.Tensor]) -> bool:
    return all(torch.equal(a, b) for a, b in zip(these, those, strict=True))


@pytest.mark.parametrize("recompute", ["none", "full", "every", "selective"])
def test_gradients_with_activations_on_disk_have_the_same_bits(tmp_path, recompute):
    plain = gradients(made())
    model = made()
    blocks = set_up(model, MemoryPlan(recompute=recompute, offload_activations="disk", offload_dir=str(tmp_path)))
    blocks[0].store._most_leaving = 0  # one at a time, or all might be asked for before the thread has come to it
    assert equal(gradients(model), plain)
    assert blocks[0].store.moved > 0
    assert list(tmp_path.iterdir()) == []


class Slow:
    """A place in memory that waits for leave before it moves anything."""

    name = "test"

    def __init__(self) -> None:
        self.go = threading.Semaphore(0)
        self.held: dict[int, torch.Tensor] = {}
        self.put_count = self.taken = 0

    def put(self, raw: torch.Tensor) -> int:
        assert self.go.acquire(timeout=20)
        self.put_count += 1
        self.held[self.put_count] = raw.clone()
        return self.put_count

    def take(self, where: int, into: torch.Tensor) -> None:
        self.taken += 1
        into.copy_(self.held[where])

    def drop(self, where: int) -> None:
        del self.held[where]


def wait_until_moved(away: Away, size: int) -> None:
    with away._change:
        assert away._change.wait_for(lambda: away.moved >= size, timeout=20)


def test_memory_is_free_while_a_tensor_is_away_and_whole_again_afterwards():
    meter, place = Meter(), Slow()
    away = Away(meter, place, print)
    tensor = torch.randn(512, 64)
    wanted, part = tensor.clone(), tensor[3:70:2, 1::3]
    kept = [away.keep(tensor.t()), away.keep(part)]
    form = (part.shape, part.stride(), part.storage_offset())
    assert meter.live == tensor.nbytes, "two views are one memory"
    del tensor, part
    place.go.release()
    wait_until_moved(away, wanted.nbytes)
    assert meter.live == 0
    whole, back = kept[0].get(), kept[1].get()
    assert torch.equal(whole, wanted.t())
    assert whole.stride() == wanted.t().stride()
    assert torch.equal(back, wanted[3:70:2, 1::3])
    assert (back.shape, back.stride(), back.storage_offset()) == form
    assert place.taken == 1
    assert torch.equal(kept[0].get(), wanted.t()), "a graph that is kept asks twice"
    del kept, whole, back
    away.keep(torch.ones(1))  # who computes next tidies up
    assert not place.held
    away.close()


def test_what_is_asked_for_before_it_has_left_never_leaves():
    place = Slow()
    away = Away(Meter(), place, print)
    first, second = torch.randn(4096), torch.randn(4096)
    kept = [away.keep(first), away.keep(second)]  # the thread is at the first one, or has not begun
    assert kept[1].get().data_ptr() == second.data_ptr()
    place.go.release()
    assert torch.equal(kept[0].get(), first)
    assert place.put_count <= 1
    away.close()


def test_what_comes_next_is_brought_back_ahead_but_no_more_than_there_is_room_for():
    place, size = Slow(), 4096 * 4
    away = Away(Meter(), place, print, returning=2 * size)
    tensors = [torch.randn(4096) for _ in range(6)]
    kept = [away.keep(tensor) for tensor in tensors]
    place.go.release(6)
    wait_until_moved(away, 6 * size)
    assert torch.equal(kept[5].get(), tensors[5])
    with away._change:
        assert away._change.wait_for(lambda: place.taken == 3 and not away._inward, timeout=20)
    assert torch.equal(kept[4].get(), tensors[4])
    assert away._returning <= 2 * size
    away.close()


def test_the_forward_pass_waits_when_too_much_is_on_its_way_out():
    place, size = Slow(), 4096 * 4
    meter = Meter()
    away = Away(meter, place, print, leaving=2 * size)
    done = threading.Event()

    def forward() -> None:
        kept = [away.keep(torch.randn(4096)) for _ in range(4)]
        done.set()
        del kept

    thread = threading.Thread(target=forward)
    thread.start()
    while len(away._records) < 3:
        time.sleep(0.001)
    assert not done.is_set()
    assert meter.live <= 3 * size
    place.go.release(4)
    thread.join(20)
    assert done.is_set()
    away.close()


def test_a_tensor_that_is_written_to_after_it_was_kept_is_told():
    place = Slow()
    away = Away(Meter(), place, print)
    tensor = torch.randn(4096)
    kept = away.keep(tensor)
    tensor.add_(1)
    place.go.release()
    with pytest.raises(RunFailed, match="written to after the forward pass"):
        kept.get()
    away.close()


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO])
def test_a_place_that_takes_no_more_costs_memory_and_one_line(number):
    class Broken(Slow):
        def put(self, raw: torch.Tensor) -> int:
            if self.put_count == 3:
                raise OSError(number, os.strerror(number))
            self.go.release()
            return super().put(raw)

    plain, model, said = gradients(made()), made(), []
    blocks = set_up(model, MemoryPlan(offload_activations="disk"))
    away = Away(blocks[0].store.meter, Broken(), said.append)
    for block in blocks:
        block.store = away
    assert equal(gradients(model), plain)
    assert said == [
        f"offload to test takes no more ({os.strerror(number)}): what is left of the activations stays in memory, "
        f"and training goes on."
    ]
    away.close()


def test_a_full_disk_is_said_once_and_ends_nothing(tmp_path, warm):
    program = f"""
import resource, sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_offload as t
resource.setrlimit(resource.RLIMIT_FSIZE, (400_000, 400_000))
plain, model = t.gradients(t.made()), t.made()
blocks = t.set_up(model, t.MemoryPlan(offload_activations="disk", offload_dir={str(tmp_path)!r}), print)
blocks[0].store._most_leaving = 0
assert t.equal(t.gradients(model), plain)
print("moved", blocks[0].store.moved > 0)
"""
    done = run([sys.executable, "-c", program], warm)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("takes no more (File too large)") == 1
    assert "moved True" in done.stdout


def test_a_disk_that_cannot_be_read_back_fails_the_run_in_one_line():
    class Lost(Slow):
        def take(self, where: int, into: torch.Tensor) -> None:
            raise OSError(errno.EIO, "Input/output error")

    place = Lost()
    away = Away(Meter(), place, print)
    kept, size = away.keep(torch.randn(4096)), 4096 * 4
    place.go.release()
    wait_until_moved(away, size)
    with pytest.raises(RunFailed, match="cannot be read back"):
        kept.get()
    away.close()


def test_no_file_is_left_whatever_is_killed(tmp_path, warm):
    program = f"""
import sys, torch
from shoal.memory.extents import ExtentFile
file = ExtentFile({str(tmp_path)!r})
file.write(file.reserve(100_000), memoryview(bytes(100_000)))
print("written", flush=True)
sys.stdin.read()
"""
    process = Program(
        [sys.executable, "-c", program], source=warm, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    with process.stdin:
        assert process.stdout.readline() == "written\n"
        assert list(tmp_path.iterdir()) == []
        process.send_signal(signal.SIGKILL)
        process.communicate(timeout=60)
    assert list(tmp_path.iterdir()) == []


def test_places_in_a_file_are_used_again(tmp_path):
    file = ExtentFile(tmp_path)
    first = file.reserve(5000)
    file.write(first, memoryview(b"a" * 5000))
    second = file.reserve(5000)
    assert second.start >= first.start + 5000
    file.release(first)
    assert file.reserve(5001) == first, "whole pages"
    into = bytearray(5000)
    file.read(first, memoryview(into))
    assert bytes(into) == b"a" * 5000
    file.close()


def test_room_is_asked_for_before_anything_is_written(tmp_path, monkeypatch):
    file = ExtentFile(tmp_path)
    monkeypatch.setattr(ExtentFile, "free_bytes", property(lambda self: 1000 + self._room - self._end))
    with pytest.raises(OSError, match="No space left"):
        file.reserve(5000)
    assert os.fstat(file._file).st_size == 0
    file.close()


def test_a_folder_that_cannot_be_written_to_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"memory.offload_dir = .*nowhere.* cannot hold what is offloaded"):
        set_up(made(), MemoryPlan(offload_activations="disk", offload_dir=str(tmp_path / "nowhere")))


def test_offload_to_the_host_moves_nothing_on_the_host_and_says_so():
    said: list[str] = []
    blocks = set_up(made(), MemoryPlan(offload_activations="host"), say=said.append)
    assert said == [
        "memory.offload_activations = 'host' moves nothing: the worker's device is the host's own processor."
    ]
    assert not any(block.store.moves for block in blocks)


def test_the_host_tier_gives_back_what_it_was_given_and_uses_its_memory_again():
    host = Host(CPU)
    data = torch.arange(5000) % 251
    where = host.put(data.to(torch.uint8))
    into = torch.empty(5000, dtype=torch.uint8)
    host.take(where, into)
    assert torch.equal(into, data.to(torch.uint8))
    host.drop(where)
    assert host.put(into).data_ptr() == where.data_ptr()
