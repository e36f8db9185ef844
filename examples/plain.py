"""Which arm of a spiral does a point lie on? In plain PyTorch."""

import sys

import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, TensorDataset


def spirals(samples=2048):
    generator = torch.Generator().manual_seed(0)
    arm = torch.randint(3, (samples,), generator=generator)
    radius = torch.rand(samples, generator=generator)
    angle = 4 * radius + arm * 2 * torch.pi / 3 + 0.1 * torch.randn(samples, generator=generator)
    return TensorDataset(torch.stack([radius * angle.cos(), radius * angle.sin()], dim=1), arm)


def main(batch=64, epochs=4):
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Tanh(), torch.nn.Linear(64, 3))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(epochs):
        for point, arm in DataLoader(spirals(), batch_size=batch, shuffle=True):
            loss = F.cross_entropy(model(point), arm)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return {name: tensor.detach() for name, tensor in model.state_dict().items()}


if __name__ == "__main__":
    weights = main(*map(int, sys.argv[1:]))
    print("weights", sum(tensor.double().sum().item() for tensor in weights.values()))
