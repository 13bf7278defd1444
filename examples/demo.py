"""A Swin Transformer trained twice on made-up pictures: as published, and accelerated by vicinal.

Both start from the same weights and see the same batches in turn, so their losses have to agree while their
times differ. Then a picture of the tokens that one token sees under three ways to cut a grid. Nothing is
downloaded and no GPU is needed:

    python examples/demo.py [--steps 40] [--device cpu] [--out demo-output]
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from pathlib import Path

import matplotlib
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import vicinal
from vicinal import Windows
from vicinal.drop_in import accelerate
from vicinal.models import SwinTransformer, swin_test

matplotlib.use("agg")
from matplotlib import pyplot as plt

CLASSES = 10
CUTS = {
    "Windows(7)": Windows(7),
    "Windows(7, shift=3)": Windows(7, shift=3, mask_value=-math.inf),
    'Windows(7, partition="grid")': Windows(7, partition="grid"),
}


def stripes(count: int, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Noisy stripes [count, 3, size, size] and which of ten directions they run in [count]."""
    label = torch.randint(CLASSES, (count,), generator=generator)
    angle = (label * math.pi / CLASSES).view(-1, 1, 1)
    phase = torch.rand(count, 1, 1, generator=generator) * 2 * math.pi
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    wave = torch.sin(0.7 * (x * angle.cos() + y * angle.sin()) + phase)
    noise = torch.randn(count, 3, size, size, generator=generator)
    return wave[:, None] + 0.5 * noise, label


class Training:
    """A model with its optimiser, its losses and the seconds that its steps took."""

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
        self.losses: list[float] = []
        self.seconds: list[float] = []

    def step(self, images: Tensor, labels: Tensor) -> None:
        begin = time.perf_counter()
        loss = F.cross_entropy(self.model(images), labels)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.losses.append(loss.item())  # waits for the device
        self.seconds.append(time.perf_counter() - begin)


def train(steps: int, device: str) -> None:
    torch.manual_seed(0)
    plain = SwinTransformer(swin_test(num_classes=CLASSES)).to(device)
    fused = copy.deepcopy(plain)
    print(accelerate(fused), end="\n\n")
    published, accelerated = Training(plain), Training(fused)
    generator = torch.Generator().manual_seed(1)
    print(f"{'step':>6}{'loss, published':>18}{'loss, vicinal':>16}")
    for step in range(steps):
        images, labels = (t.to(device) for t in stripes(16, 56, generator))
        for training in (published, accelerated):
            training.step(images, labels)
        if step % 10 == 9 or step == 0:
            print(f"{step + 1:>6}{published.losses[-1]:>18.5f}{accelerated.losses[-1]:>16.5f}")
    apart = max(abs(a - b) for a, b in zip(published.losses, accelerated.losses))
    ratio = sorted(b / a for a, b in zip(published.seconds, accelerated.seconds))[steps // 2]
    print(f"\nlosses differ by at most {apart:.1e}")
    print(f"a training step with vicinal took {ratio:.2f} times as long as the published one (median)\n")


def tokens_seen(windows: Windows, side: int, token: tuple[int, int]) -> Tensor:
    """[side, side], the weight of each token in the output of one: that output's gradient by the values."""
    q = torch.zeros(1, side, side, 1, 8)
    v = torch.zeros(1, side, side, 1, 1, requires_grad=True)
    out = vicinal.windowed_attention(q, q, v, windows)
    assert isinstance(out, Tensor)
    out[0, token[0], token[1]].sum().backward()
    assert v.grad is not None
    return v.grad.view(side, side)


def draw(folder: Path) -> Path:
    side, token = 21, (9, 12)
    figure, axes = plt.subplots(1, len(CUTS), figsize=(4 * len(CUTS), 4.4), layout="constrained")
    for ax, (name, windows) in zip(axes, CUTS.items()):
        ax.imshow(tokens_seen(windows, side, token) > 0, cmap="Blues", vmin=0, vmax=1.5)
        ax.plot(token[1], token[0], "o", color="tab:red")
        ax.set_xticks([edge - 0.5 for edge in range(side + 1)], [])
        ax.set_yticks([edge - 0.5 for edge in range(side + 1)], [])
        ax.grid(color="0.85")
        ax.tick_params(length=0)
        ax.set_title(name)
    figure.suptitle("Tokens that the red one sees, on a grid of 21 x 21")
    folder.mkdir(parents=True, exist_ok=True)
    figure.savefig(folder / "windows.png", dpi=110)
    return folder / "windows.png"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    arguments = parser.parse_args()
    q, k, v = torch.randn(3, 1, 56, 56, 3, 32, device=arguments.device).unbind(0)
    print(vicinal.explain(vicinal.windowed_attention, q, k, v, Windows(7, shift=3)), end="\n\n")
    train(arguments.steps, arguments.device)
    print(f"wrote {draw(arguments.out)}")


if __name__ == "__main__":
    main()
