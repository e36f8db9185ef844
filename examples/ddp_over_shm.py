"""Plain PyTorch over shared memory: two lines differ from the same program over gloo.

torchrun --nproc-per-node 2 examples/ddp_over_shm.py
"""

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import shoal.comm

shoal.comm.install()  # makes "shm" and "hier" known to torch.distributed
dist.init_process_group("shm")  # "hier" over several hosts; "cpu:hier,cuda:nccl" beside GPUs

torch.manual_seed(0)
model = DistributedDataParallel(nn.Linear(64, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
inputs = torch.randn(256, 64).chunk(dist.get_world_size())[dist.get_rank()]
for _ in range(10):
    optimizer.zero_grad()
    loss = (model(inputs) - inputs[:, :8]).square().mean()
    loss.backward()
    optimizer.step()

dist.all_reduce(loss.detach_(), dist.ReduceOp.AVG)
buffer = shoal.comm.symm_empty(1 << 20, torch.float32)  # collectives work on it where it lies
buffer.fill_(dist.get_rank())
dist.all_reduce(buffer)
if dist.get_rank() == 0:
    print(f"loss {loss.item():.4f}, sum of ranks {buffer[0].item():.0f}")
dist.destroy_process_group()
