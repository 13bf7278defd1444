"""A model written for natten 0.17 runs unmodified: vicinal stands in for the package.

    python examples/migrate_natten.py

Needs vicinal, and no natten installed. Trains a small classifier of random images for a few steps on the CPU,
prints the losses, and which backend ran.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vicinal
from vicinal.compat import install_as_natten


def make_model() -> nn.Module:
    """As a file for natten 0.17 has it; the import works after `install_as_natten`."""
    from natten import NeighborhoodAttention2D

    class Block(nn.Module):
        def __init__(self, dim: int, dilation: int) -> None:
            super().__init__()
            self.norm = nn.LayerNorm(dim)
            self.attn = NeighborhoodAttention2D(dim, 4, 7, dilation, rel_pos_bias=True)

        def forward(self, x: Tensor) -> Tensor:
            return x + self.attn(self.norm(x))

    class Classifier(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed = nn.Conv2d(3, 64, 4, stride=4)
            self.blocks = nn.Sequential(Block(64, 1), Block(64, 2))
            self.head = nn.Linear(64, 10)

        def forward(self, images: Tensor) -> Tensor:
            x = self.blocks(self.embed(images).permute(0, 2, 3, 1))
            return self.head(x.mean((1, 2)))

    return Classifier()


def train(steps: int) -> list[float]:
    """Losses of `steps` steps of AdamW on one batch of random images."""
    torch.manual_seed(0)
    model = make_model()
    images, labels = torch.randn(8, 3, 64, 64), torch.randint(10, (8,))
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    losses = []
    for _ in range(steps):
        optimizer.zero_grad()
        loss = F.cross_entropy(model(images), labels)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def main() -> None:
    install_as_natten("0.17.5")
    print("losses:", " ".join(f"{loss:.3f}" for loss in train(10)))
    q = torch.zeros(8, 16, 16, 4, 16)
    print(vicinal.explain(vicinal.neighborhood_attention, q, q, q, 7, dilation=2))


if __name__ == "__main__":
    main()
