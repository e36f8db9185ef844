"""SGD takes one pass over memory, to the bits of torch; on servers the weights lie where their worker reads them."""

import cloudpickle
import pytest
import torch

from shoal.comm import sgd
from shoal.comm.native import build
from shoal.comm.server.api import ParameterServer

compiled = pytest.mark.skipif(
    build.kernels() is None or not sgd.rounds_as_torch(), reason="no compiled kernels, or torch rounds otherwise here"
)
OPTIONS = [
    {"lr": 0.1},
    {"lr": 0.1, "weight_decay": 0.01},
    {"lr": 0.03, "momentum": 0.9},
    {"lr": 0.03, "momentum": 0.9, "dampening": 0.25, "weight_decay": 0.1},
    {"lr": 0.03, "momentum": 0.8, "nesterov": True, "weight_decay": 0.1},
]
SIZES = (1, 17, 1023, 1024, 1025, 5000)


@pytest.fixture(autouse=True)
def sent_whole(request):
    """Workers cannot import the test's module."""
    cloudpickle.register_pickle_by_value(request.module)


def pairs(dtype):
    torch.manual_seed(0)
    ours = [torch.nn.Parameter(torch.randn(size, dtype=dtype)) for size in SIZES]
    return ours, [torch.nn.Parameter(each.detach().clone()) for each in ours]


@compiled
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_every_step_has_the_bits_of_torch_in_weights_momentum_and_copies(options, dtype):
    ours, twins = pairs(dtype)
    mine, theirs = torch.optim.SGD(ours, **options), torch.optim.SGD(twins, **options)
    copies = {each: torch.zeros_like(each) for each in ours}
    for number in range(3):
        for one, twin in zip(ours, twins, strict=True):
            twin.grad = torch.randn_like(twin)
            one.grad = twin.grad.clone()
        if number == 1:  # one that no backward pass has reached
            ours[2].grad = twins[2].grad = None
        assert sgd.usable(mine)
        sgd.step(mine, copies)
        theirs.step()
        for index, (one, twin) in enumerate(zip(ours, twins, strict=True)):
            assert torch.equal(one, twin)
            assert torch.equal(copies[one], one)
            if "momentum" in options:
                buffers = mine.state[one]["momentum_buffer"], theirs.state[twin]["momentum_buffer"]
                assert torch.equal(*buffers), index


@compiled
def test_what_the_kernel_cannot_do_is_left_to_torch():
    def usable(kind=torch.optim.SGD, dtype=torch.float32, **options):
        return sgd.usable(kind([torch.nn.Parameter(torch.zeros(4, dtype=dtype))], lr=0.1, **options))

    assert usable()
    assert not usable(maximize=True)
    assert not usable(foreach=True)
    assert not usable(fused=True)
    assert not usable(dtype=torch.bfloat16)
    assert not usable(torch.optim.Adam)
    assert not sgd.usable(torch.optim.SGD([torch.nn.Parameter(torch.zeros(4, 4).t()[:2])], lr=0.1))
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(4))], lr=0.1, momentum=0.9)
    hook = optimizer.register_step_pre_hook(lambda *given: None)
    assert not sgd.usable(optimizer)
    hook.remove()
    assert sgd.usable(optimizer)
    optimizer.param_groups[0]["params"][0].grad = torch.zeros(4, dtype=torch.float32).to_sparse()
    assert not sgd.usable(optimizer)
    optimizer.step = lambda: None
    optimizer.zero_grad()
    assert not sgd.usable(optimizer)


@compiled
def test_schedulers_and_autograd_see_that_a_step_was_made():
    weights = torch.nn.Parameter(torch.ones(8))
    optimizer = torch.optim.SGD([weights], lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1)
    kept = (weights * weights).sum()
    kept.backward(retain_graph=True)
    assert sgd.usable(optimizer)
    sgd.update(optimizer)
    scheduler.step()  # which would warn, and warnings are errors
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        kept.backward()


@compiled
def test_a_torch_that_rounds_otherwise_is_found_out(monkeypatch):
    monkeypatch.setattr(sgd, "_descend", lambda weights, gradient, *rest, **more: weights.sub_(0.1 * gradient))
    sgd.rounds_as_torch.cache_clear()
    assert not sgd.rounds_as_torch()
    monkeypatch.undo()
    sgd.rounds_as_torch.cache_clear()
    assert sgd.rounds_as_torch()


def in_turns(group, options):
    """Each worker pushes while the other waits: what both then have, beside the same steps of torch."""
    torch.manual_seed(0)
    kind, given = options
    twins = [torch.nn.Parameter(torch.randn(size)) for size in ((300, 200), (7,), (64, 33))]
    served = [torch.nn.Parameter(each.detach().clone()) for each in twins]
    served[2].data = served[2].detach().t().contiguous().t()  # in another order than the servers' own
    optimizer, theirs = kind(served, **given), kind(twins, **given)
    same = []
    with ParameterServer(served, optimizer, group, worker=group.rank, mode="async") as server:
        for number, worker in enumerate((0, 0, 1, 0, 1, 1)):
            gradients = [torch.randn_like(each) if (index + number) % 4 else None for index, each in enumerate(twins)]
            for twin, gradient in zip(twins, gradients, strict=True):
                twin.grad = gradient
            theirs.step()
            if worker == group.rank:
                server.push(gradients)
                server.pull()
                same.append(all(map(torch.equal, served, twins)))
            group.gather(b"")  # it is applied
            if worker != group.rank:
                server.pull()
                same.append(all(map(torch.equal, served, twins)))
            group.gather(b"")  # and seen
    return same


@pytest.mark.parametrize("kind", [torch.optim.SGD, torch.optim.RMSprop], ids=lambda kind: kind.__name__)
def test_a_worker_reads_the_weights_that_its_push_and_those_of_others_have_made(agent, kind):
    options = (kind, {"lr": 0.01, "momentum": 0.9, "weight_decay": 0.01})
    assert agent.run(in_turns, (options,), workers=2, servers=2) == [[True] * 6] * 2


@compiled
def test_the_servers_of_a_host_go_over_memory_once(agent):
    """The guard of the test above: with SGD it is the kernel that is tested."""
    assert agent.run(usable_there, workers=1) == [True]


def usable_there(group):
    return sgd.usable(torch.optim.SGD([torch.nn.Parameter(torch.zeros(8))], lr=0.01, momentum=0.9))
