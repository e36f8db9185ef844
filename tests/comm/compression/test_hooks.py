"""Compressors in plain PyTorch: DistributedDataParallel and FSDP2 over gloo."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shoal.comm
from shoal.comm.compression.compressor import COMPRESSORS
from shoal.comm.native import build
from shoal.errors import RunFailed

NAMES = list(COMPRESSORS)
OPTIONS = {"topk": {"share": 0.25}, "powersgd": {"rank": 8}}


def model() -> nn.Module:
    torch.manual_seed(1)
    return nn.Sequential(nn.Linear(64, 128), nn.Tanh(), nn.Linear(128, 128), nn.Tanh(), nn.Linear(128, 8))


def batch(rank: int, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(1000 * step + rank)
    inputs = torch.randn(32, 64, generator=generator)
    return inputs, inputs[:, :8].sign() * 0.5


def step_of(net: nn.Module, rank: int, step: int, parameters: list[torch.Tensor], lr: float = 0.2) -> float:
    inputs, targets = batch(rank, step)
    loss = (net(inputs) - targets).square().mean()
    for parameter in parameters:
        parameter.grad = None
    loss.backward()
    with torch.no_grad():
        for parameter in parameters:
            parameter -= lr * parameter.grad
    return float(loss.detach())


def trained(rank: int, world: int, name: str, steps: int, options: dict) -> tuple[list[float], list[float], int]:
    """(losses, flat weights, bytes sent). Buckets of 16 KiB: DDP sorts them anew after the first step."""
    net = DistributedDataParallel(model(), bucket_cap_mb=16 / 1024)
    compressor = None
    if name != "none":
        compressor = COMPRESSORS[name](**options)
        net.register_comm_hook(compressor, shoal.comm.hook)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns of a bucket view's strides
        losses = [step_of(net, rank, step, list(net.parameters())) for step in range(steps)]
    weights = torch.cat([p.detach().view(-1) for p in net.parameters()]).tolist()
    return losses, weights, compressor.buckets.sent_bytes if compressor else 0


@pytest.mark.parametrize("name", NAMES)
def test_ddp_learns_as_it_does_uncompressed_and_all_ranks_stay_equal(name: str, over_gloo) -> None:
    options = {"force": True, "min_bytes": 0, **OPTIONS.get(name, {})}
    plain = over_gloo(2, trained, "none", 25, {})
    hooked = over_gloo(2, trained, name, 25, options)
    assert hooked[0][1] == hooked[1][1]
    assert hooked[0][1] != plain[0][1]  # lossy, so it did something
    losses = [sum(rank[0][step] for rank in hooked) / 2 for step in (0, 24)]
    wanted = [sum(rank[0][step] for rank in plain) / 2 for step in (0, 24)]
    assert losses[0] == pytest.approx(wanted[0], rel=1e-5)
    assert losses[1] < wanted[1] + 0.15 * (wanted[0] - wanted[1])  # it learns at least 85% of what the plain one does


@pytest.mark.parametrize("kind", ["shm", "hier"])
def test_the_same_bits_over_shoals_own_backends(kind: str, over_gloo) -> None:
    if build.backend() is None:  # asked here, and not as the file is read: it may have to be compiled
        pytest.skip(f"no backend: {build.why_not(['backend'])}")
    for name in ("int8", "powersgd"):
        options = {"force": True, "min_bytes": 0, **OPTIONS.get(name, {})}
        assert over_gloo(2, trained, name, 4, options, kind=kind)[0][1] == over_gloo(2, trained, name, 4, options)[0][1]


def exact(rank: int, world: int) -> tuple[bool, int]:
    """Buckets below min_bytes are averaged as DDP does it, to the bit."""
    plain = trained(rank, world, "none", 4, {})
    hooked = trained(rank, world, "int8", 4, {"force": True, "min_bytes": 1 << 30})
    return plain[1] == hooked[1], hooked[2]


def test_small_buckets_go_uncompressed_to_the_bit(over_gloo) -> None:
    assert [same for same, _ in over_gloo(2, exact)] == [True, True]


def refused(rank: int, world: int) -> tuple[bool, list[str], float]:
    """A link so fast that nothing pays: planted in the place of the measurement."""
    import shoal.comm.compression.worth as worth

    worth.measured_link = lambda links, device: 2.0**40
    net = DistributedDataParallel(model())
    state = shoal.comm.compress(net, shoal.comm.Int8(min_bytes=0))
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        step_of(net, rank, 0, list(net.parameters()))
    lines = [str(w.message) for w in told if "uncompressed" in str(w.message)]
    return bool(state.buckets.verdict), lines, state.buckets.verdict.break_even_bytes_per_s


def test_a_link_too_fast_to_gain_from_it_is_told_once_with_the_numbers(over_gloo) -> None:
    first, second = over_gloo(2, refused)
    assert first[0] is second[0] is False
    assert first[2] == second[2]
    assert len(first[1]) == 1
    assert "does not pay: over a link of 1099.51 GB/s" in first[1][0]
    assert "force=True" in first[1][0]
    assert second[1] == []


def measured(rank: int, world: int) -> tuple[bool, float]:
    """A link of 1 MB/s: planted."""
    import shoal.comm.compression.worth as worth

    worth.measured_link = lambda links, device: 1e6
    net = DistributedDataParallel(model())
    state = shoal.comm.compress(net, shoal.comm.Int8(min_bytes=0))
    step_of(net, rank, 0, list(net.parameters()))
    return bool(state.buckets.verdict), state.buckets.sent_bytes / sum(p.nbytes for p in net.parameters())


def test_over_a_slow_link_it_compresses_by_itself(over_gloo) -> None:
    for verdict, share in over_gloo(2, measured):
        assert verdict
        assert 0.25 < share < 0.27  # int8: a quarter of the bytes, there and back


def errors_by_parameter(rank: int, world: int, bucket_mb: float, saved: dict | None) -> dict:
    net = DistributedDataParallel(model(), bucket_cap_mb=bucket_mb)
    state = shoal.comm.compress(net, shoal.comm.Int8(min_bytes=0, force=True))
    if saved:
        state.load_state_dict(saved)
        return state.state_dict()["parameters"]
    step_of(net, rank, 0, list(net.parameters()), lr=0.0)
    return state.state_dict()


def test_errors_are_saved_by_the_names_of_parameters_whatever_the_buckets(over_gloo) -> None:
    saved = over_gloo(2, errors_by_parameter, 25.0, None)[0]
    assert set(saved["parameters"]) == {name for name, _ in model().named_parameters()}
    assert any(bool(error.any()) for error in saved["parameters"].values())
    loaded = over_gloo(2, errors_by_parameter, 0.01, saved)[0]
    assert all(torch.equal(loaded[name], saved["parameters"][name]) for name in saved["parameters"])


def conserved(rank: int, world: int) -> tuple[list[float], bool]:
    """With weights held still, what was told plus what is pending is what was to be told: also over new buckets."""
    net = DistributedDataParallel(model(), bucket_cap_mb=16 / 1024)
    state = shoal.comm.compress(net, shoal.comm.TopK(0.1, min_bytes=0, force=True))
    plain = DistributedDataParallel(model())
    told = {name: torch.zeros_like(p) for name, p in net.module.named_parameters()}
    wanted = {name: torch.zeros_like(p) for name, p in net.module.named_parameters()}
    for step in range(4):
        for module, sums in ((net, told), (plain, wanted)):
            step_of(module, rank, step, list(module.parameters()), lr=0.0)
            for name, parameter in module.module.named_parameters():
                sums[name] += parameter.grad
        if step == 0:
            first = set(state.buckets._buckets)
    anew = set(state.buckets._buckets) != first
    apart = []
    for name, error in state.state_dict()["parameters"].items():
        pending = error.view(told[name].shape).clone()
        dist.all_reduce(pending)
        apart.append(float((told[name] + pending / world - wanted[name]).abs().max() / wanted[name].abs().max()))
    return apart, anew


def test_no_gradient_is_lost_when_ddp_sorts_its_buckets_anew(over_gloo) -> None:
    for apart, anew in over_gloo(2, conserved):
        assert anew
        assert len(apart) == 6
        assert max(apart) < 1e-5  # float32, eight additions


def half_precision(rank: int, world: int) -> tuple[str, float]:
    """A bfloat16 model, whose buckets are bfloat16; the stock hook refuses CPUs."""
    net = DistributedDataParallel(model().bfloat16())
    shoal.comm.compress(net, shoal.comm.BF16(force=True, min_bytes=0))
    inputs, targets = batch(rank, 0)
    (net(inputs.bfloat16()) - targets.bfloat16()).float().square().mean().backward()
    gradient = net.module[0].weight.grad
    both = gradient.float().clone()
    dist.broadcast(both, 0)
    return str(gradient.dtype), float((both - gradient.float()).abs().max())


def test_models_of_half_precision_are_compressed_too(over_gloo) -> None:
    assert over_gloo(2, half_precision) == [("torch.bfloat16", 0.0)] * 2


def sharded(rank: int, world: int, name: str | None) -> tuple[list[float], float, float]:
    """FSDP2: losses, and how far the own shards' gradients of the first step are from the plain ones'."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh("cpu", (world,))
    net, plain = model(), model()
    for module in (net, plain):
        fully_shard(module[2], mesh=mesh)
        fully_shard(module, mesh=mesh)
    state = shoal.comm.compress(net, COMPRESSORS[name](min_bytes=0, force=True, **OPTIONS.get(name, {})))
    losses, apart = [], 0.0
    for step in range(15):
        inputs, targets = batch(rank, step)
        for module in (net, plain):
            loss = (module(inputs) - targets).square().mean()
            module.zero_grad()
            loss.backward()
            if module is net:
                losses.append(float(loss.detach()))
        if step == 0:
            pairs = list(zip(net.parameters(), plain.parameters(), strict=True))
            largest = max(float(p.grad.to_local().abs().max()) for _, p in pairs)
            apart = max(float((a.grad.to_local() - b.grad.to_local()).abs().max()) for a, b in pairs) / largest
        with torch.no_grad():
            for module in (net, plain):
                for parameter in module.parameters():
                    parameter -= 0.2 * parameter.grad
    errors = state.state_dict()["tensors"]
    return losses, apart, sum(float(t["worker"].abs().sum()) for t in errors.values())


@pytest.mark.parametrize("name", ["int8", "1bit", "topk"])
def test_fsdp2_is_compressed_with_feedback(name: str, over_gloo) -> None:
    for losses, apart, pending in over_gloo(2, sharded, name):
        assert losses[-1] < 0.6 * losses[0]
        assert 0 < apart < (0.01 if name == "int8" else 1.5)
        assert pending > 0


def test_fsdp2_with_powersgd_is_refused(over_gloo) -> None:
    from shoal.errors import UserError

    with pytest.raises((RunFailed, UserError), match="whole matrices"):
        over_gloo(2, sharded, "powersgd")
