"""Which arm of a spiral does a point lie on? On any number of workers, with the same bits."""

import sys

import torch
import torch.nn.functional as F
from torch.utils.data import TensorDataset

import shoal


def spirals(samples=2048):
    generator = torch.Generator().manual_seed(0)
    arm = torch.randint(3, (samples,), generator=generator)
    radius = torch.rand(samples, generator=generator)
    angle = 4 * radius + arm * 2 * torch.pi / 3 + 0.1 * torch.randn(samples, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm)


def main(worker, batch=64, epochs=4, checkpoints=None):
    model = worker.model(torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3)))
    worker.optimizer(torch.optim.AdamW(model.parameters(), lr=1e-2))
    if checkpoints:
        worker.resume(checkpoints)
    for step in worker.steps(spirals(), batch=batch, epochs=epochs):
        for part in step:
            loss = F.cross_entropy(model(part["input"]), part["target"], reduction="sum")
            step.backward(loss, count=len(part["target"]))
        step.commit()
        if checkpoints and step.last_of_epoch:
            worker.save(checkpoints)
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    weights = shoal.launch(main, *map(int, sys.argv[2:]), workers=int(sys.argv[1]))
    print("weights", sum(tensor.double().sum().item() for tensor in weights.values()))
