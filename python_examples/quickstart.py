"""Level-set samples in a training step: the zero level set of a network becomes a circle."""

import torch

import levelset_ext as ls

torch.manual_seed(0)
net = torch.nn.Sequential(torch.nn.Linear(2, 64), torch.nn.Softplus(10), torch.nn.Linear(64, 1))
optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
for _ in range(300):
    found = ls.project(net, 2 * torch.rand(256, 2) - 1)  # Newton: points with net(x) = 0
    p = ls.sample_network(net, found[found.converged])  # the same points, as functions of theta
    loss = (p.norm(dim=1) - 0.7).abs().sum() / 256
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
found = ls.project(net, 2 * torch.rand(256, 2) - 1)
print(found.counts(), f"mean radius {found.points[found.converged].norm(dim=1).mean():.3f}")
