"""Swin-T on two photographs and a small Swin on handwritten digits, as it is and accelerated, side by side.

    python examples/demo.py [--out demo-output] [--device cpu]

Needs vicinal, scikit-learn and matplotlib; downloads nothing. Prints what `vicinal.accelerate` did, how far
outputs and gradients moved, time, peak memory, and which backend ran and why; saves a picture.
"""

from __future__ import annotations

import argparse
import copy
import multiprocessing
import os
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

# threads that wait for each other sleep instead of spinning: a busy machine stays usable; torch reads it once
os.environ["OMP_WAIT_POLICY"] = os.environ.get("OMP_WAIT_POLICY", "passive")

import matplotlib
import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits, load_sample_images
from torch import Tensor, nn

import vicinal
from vicinal.models import SwinTransformer, swin_tiny

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.axes import Axes
from matplotlib.patches import Rectangle

RUNS = 5
EPOCHS = 6
BLUE, ORANGE = "#1f5fa8", "#e8871e"


def load_photographs(size: int = 224) -> Tensor:
    """[2, 3, size, size] the middle of scikit-learn's two photographs, values in [0, 1]."""
    photographs = []
    for image in load_sample_images().images:
        x = torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255
        side = min(x.shape[1:])
        top, left = (x.shape[1] - side) // 2, (x.shape[2] - side) // 2
        x = x[None, :, top : top + side, left : left + side]
        photographs.append(F.interpolate(x, size=(size, size), mode="bilinear", antialias=True).clamp(0, 1))
    return torch.cat(photographs)


def make_swin() -> nn.Module:
    """Swin-T with random weights, the same in every call; bias tables large enough to matter."""
    torch.manual_seed(0)
    model = SwinTransformer(swin_tiny())
    for name, parameter in model.named_parameters():
        if name.endswith("relative_position_bias_table"):
            nn.init.normal_(parameter)
    return model


def training_step(model: nn.Module, x: Tensor) -> Tensor:
    """Loss, gradients and an update of one batch; returns the logits."""
    optimiser = torch.optim.SGD(model.parameters(), lr=0.0)  # no change, so that every run does the same work
    optimiser.zero_grad()
    logits = model(x)
    F.cross_entropy(logits, torch.arange(len(x), device=x.device)).backward()
    optimiser.step()
    return logits.detach()


def forward(model: nn.Module, x: Tensor) -> Tensor:
    """Logits without gradients."""
    with torch.no_grad():
        return model(x)


def differences(reference: nn.Module, fast: nn.Module, x: Tensor) -> list[tuple[str, str, str]]:
    """Largest absolute difference of the logits and of the gradients, each beside the largest value."""
    pairs = [("logits", training_step(reference, x), training_step(fast, x))]
    ours = dict(fast.named_parameters())
    for name, parameter in reference.named_parameters():
        assert parameter.grad is not None
        gradient = ours[name].grad
        assert gradient is not None
        pairs.append((name, parameter.grad, gradient))
    rows = [(n, float((a - b).abs().max()), float(a.abs().max())) for n, a, b in pairs]
    worst = max(rows[1:], key=lambda row: row[1] / row[2])
    lines = [("logits", f"{rows[0][1]:.1e}", f"{rows[0][2]:.1e}")]
    lines.append((f"gradients of all {len(rows) - 1} parameters", f"{max(r[1] for r in rows[1:]):.1e}", ""))
    lines.append((f"  relatively worst: {worst[0]}", f"{worst[1]:.1e}", f"{worst[2]:.1e}"))
    return lines


def interleaved(runs: Mapping[str, Callable[[], object]], device: str) -> dict[str, float]:
    """Median seconds of each run, taken in turns so that a busy machine disturbs all alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for i in range(RUNS + 1):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if device == "cuda":
                torch.cuda.synchronize()
            if i > 0:  # the first round warms up
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def peak_memory(accelerated: bool, training: bool, device: str, threads: int) -> float:
    """MiB that one step adds to what the model and its input hold; meant for a fresh process."""
    torch.set_num_threads(threads)
    model, x = make_swin().to(device), load_photographs().to(device)
    if accelerated:
        vicinal.accelerate(model)
    step = training_step if training else forward
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        step(model, x)
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # forget the peak so far
    before = resident("VmRSS")
    step(model, x)
    return resident("VmHWM") - before


def resident(field: str) -> float:
    """MiB of this process's memory that is in use ("VmRSS") or was at its peak ("VmHWM"); Linux."""
    line = next(li for li in Path("/proc/self/status").read_text().splitlines() if li.startswith(field))
    return int(line.split()[1]) / 2**10


def measure_memory(device: str) -> dict[tuple[bool, bool], float]:
    """`peak_memory` of (accelerated, training), each in a fresh process: allocators keep what they had."""
    cases = [(accelerated, training) for training in (False, True) for accelerated in (False, True)]
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        threads = torch.get_num_threads()
        return {case: pool.apply(peak_memory, (*case, device, threads)) for case in cases}


def digits_model(accelerated: bool) -> nn.Module:
    """A small Swin for 32 x 32 images, the same weights in every call."""
    torch.manual_seed(0)
    sizes = {"image_size": 32, "embed_dim": 32, "depths": (2, 2), "num_heads": (2, 4), "window_size": 4}
    model = SwinTransformer(swin_tiny(in_channels=1, num_classes=10, **sizes))
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)  # learns within a few epochs
    if accelerated:
        vicinal.accelerate(model)
    return model


def train_digits(accelerated: bool, device: str) -> tuple[list[float], float, float]:
    """Train on four fifths of scikit-learn's digits; losses per step, accuracy on the rest, seconds."""
    digits = load_digits()
    images = torch.from_numpy(digits.images).float()[:, None].to(device) / 16
    images = F.interpolate(images, scale_factor=4, mode="bilinear")
    labels = torch.from_numpy(digits.target).to(device)
    model = digits_model(accelerated).to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(0)
    order = torch.randperm(len(labels), generator=generator)
    train, test = order[: len(order) * 4 // 5], order[len(order) * 4 // 5 :]
    batches = [
        b for _ in range(EPOCHS) for b in train[torch.randperm(len(train), generator=generator)].split(64)
    ]
    losses = []
    start = time.perf_counter()
    for step, batch in enumerate(batches):
        optimiser.zero_grad()
        loss = F.cross_entropy(model(images[batch]), labels[batch])
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        progress("accelerated" if accelerated else "reference", step + 1, len(batches), losses[-1])
    seconds = time.perf_counter() - start
    correct = forward(model, images[test]).argmax(-1) == labels[test]
    return losses, float(correct.float().mean()), seconds


def progress(name: str, step: int, total: int, loss: float) -> None:
    """A bar that redraws itself on a terminal, and ten lines elsewhere."""
    terminal = sys.stdout.isatty()
    if not terminal and step % max(total // 10, 1) and step != total:
        return
    bar = "#" * (30 * step // total)
    print(
        f"  {name:<12}[{bar:<30}] {step:>3}/{total}  loss {loss:.4f}",
        end="\r" if terminal else "\n",
        flush=True,
    )
    if terminal and step == total:
        print()


def print_table(header: tuple[str, ...], rows: Sequence[tuple[str, ...]]) -> None:
    """Columns as wide as their widest cell, the first one left aligned."""
    widths = [max(len(row[i]) for row in [header, *rows]) for i in range(len(header))]
    for row in [header, tuple("-" * w for w in widths), *rows]:
        print(
            "  "
            + "  ".join(c.ljust(w) if i == 0 else c.rjust(w) for i, (c, w) in enumerate(zip(row, widths)))
        )
    print()


def draw_windows(axes: Axes, photograph: Tensor, shift: int, window: int = 28) -> None:
    """The windows of the first stage, 7 tokens of 4 pixels each, shifted by `shift` pixels."""
    size = photograph.shape[-1]
    axes.imshow(photograph.permute(1, 2, 0).numpy(), extent=(0, size, size, 0))
    for edge in range(shift, size + 1, window):
        axes.axhline(edge, color="white", lw=1)
        axes.axvline(edge, color="white", lw=1)
    axes.set(xlim=(0, size), ylim=(size, 0), xticks=[], yticks=[])
    if shift:
        last, rest = size - window + shift, window - shift
        corners = [
            (last, last, rest, rest),
            (0, last, shift, rest),
            (last, 0, rest, shift),
            (0, 0, shift, shift),
        ]
        for x, y, width, height in corners:
            axes.add_patch(Rectangle((x, y), width, height, color=ORANGE, alpha=0.75, lw=0))
        axes.set_title(
            "second block: shifted by 3 tokens. The orange corners are\none window of four regions"
        )
    else:
        axes.add_patch(Rectangle((4 * window, 3 * window), window, window, color=BLUE, alpha=0.6, lw=0))
        axes.set_title("first block: attention inside windows\nof 7 x 7 tokens (blue: one of them)")


def draw(path: Path, photographs: Tensor, curves: dict[str, list[float]]) -> None:
    """Windows on a photograph, the loss curves, and the difference between them."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 10), layout="constrained")
    draw_windows(axes[0, 0], photographs[0], 0)
    draw_windows(axes[0, 1], photographs[0], 12)
    reference, fast = np.array(curves["reference"]), np.array(curves["accelerated"])
    axes[1, 0].plot(reference, color=BLUE, lw=4, alpha=0.45, label="reference")
    axes[1, 0].plot(fast, color=ORANGE, lw=1.2, label="accelerated")
    axes[1, 0].set(title="training on digits", xlabel="step", ylabel="cross entropy")
    axes[1, 0].legend()
    gap = np.abs(reference - fast) / reference
    axes[1, 1].semilogy(np.where(gap > 0, gap, np.nan), ".", color=BLUE)
    axes[1, 1].set(
        title="relative difference of the two losses\n(no point: equal to the last bit)", xlabel="step"
    )
    for plot in axes[1]:
        plot.grid(alpha=0.3)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)


def photographs_part(device: str) -> Tensor:
    """Swin-T on the photographs, as it is and accelerated."""
    photographs = load_photographs()
    x = photographs.to(device)
    reference = make_swin().to(device)
    fast = copy.deepcopy(reference)
    print("Swin-T, random weights, two photographs of 224 x 224 pixels\n")
    report = vicinal.accelerate(fast)
    print(f"accelerate(model): {len(report.replaced)} modules replaced, {len(report.left_alone)} left alone")
    print(f"  e.g. {report.rows[1].name}: {report.rows[1].module.__name__} -> {report.rows[1].note}\n")
    print_table(("float32", "largest difference", "largest value"), differences(reference, fast, x))

    memory = measure_memory(device)
    rows = []
    for training, (name, step) in enumerate({"forward": forward, "training step": training_step}.items()):
        runs = {"reference": partial(step, reference, x), "accelerated": partial(step, fast, x)}
        seconds = interleaved(runs, device)
        for accelerated, (which, value) in enumerate(seconds.items()):
            ratio = f"{seconds['reference'] / value:.2f}x"
            peak = f"{memory[bool(accelerated), bool(training)]:.0f} MiB"
            rows.append((f"{name}, {which}", f"{value * 1e3:.0f} ms", ratio, peak))
    print_table(("", "time", "speed", "peak memory"), rows)

    q = torch.randn(2, 56, 56, 3, 32, device=device)
    print("the first layer's call, explained:")
    print(vicinal.explain(vicinal.windowed_attention, q, q, q, vicinal.Windows(7, shift=3)), "\n")
    return photographs


def main() -> None:
    parser = argparse.ArgumentParser(description="Swin as it is and accelerated, side by side")
    parser.add_argument("--out", type=Path, default=Path("demo-output"))
    parser.add_argument(
        "--device", default="cuda" if torch.cuda.is_available() else "cpu", choices=["cpu", "cuda"]
    )
    options = parser.parse_args()
    start = time.perf_counter()
    photographs = photographs_part(options.device)

    print(f"a small Swin on scikit-learn's digits, {EPOCHS} epochs of AdamW, both ways from the same seed")
    curves, rows = {}, []
    for accelerated, name in enumerate(("reference", "accelerated")):
        losses, accuracy, seconds = train_digits(bool(accelerated), options.device)
        curves[name] = losses
        rows.append((name, f"{losses[-1]:.4f}", f"{accuracy:.1%}", f"{seconds:.1f} s"))
    print()
    print_table(("digits", "last loss", "test accuracy", "time"), rows)
    picture = options.out / "demo.png"
    draw(picture, photographs, curves)
    print(f"saved {picture}; {time.perf_counter() - start:.0f} s in all")


if __name__ == "__main__":
    main()
