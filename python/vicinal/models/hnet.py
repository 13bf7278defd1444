"""H-Net in plain PyTorch: a byte-level language model that learns where its chunks begin.

Every stage encodes its tokens, keeps those at which the text turns (routing), hands them to the stage inside,
smooths what comes back (an exponential moving average), spreads it over the tokens and decodes (Hwang et al.,
Dynamic Chunking for End-to-End Hierarchical Sequence Modeling, arXiv:2507.07955). Layers are Mamba-2 mixers
("m") or causal attention with rotary positions ("t"), with a gated MLP where the letter is a capital.

Sequences are packed one after the other, since stages inside see sequences of any length. The smoothing is in
float32. Parameters carry the names of the official release."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.models.causal_lm import rotate, rotation_of
from vicinal.models.mamba2 import Mamba2Config, Mamba2Mixer, Packing

__all__ = ["DeChunkLayer", "HNet", "HNetAttention", "HNetConfig", "Routing", "ratio_loss"]

Layout = tuple[Any, ...]  # (encoder, layout of the stage inside, decoder), innermost: (layers,)
LEAST = 1e-4  # shares of the moving average stay this far from 0 and 1


@dataclass(frozen=True)
class HNetConfig:
    """Sizes of an H-Net; tuples have an entry per stage, outermost first. `windows` is the number of keys
    before its own that a token sees (None: all); `hidden` that of the MLPs, 0 where there is none."""

    vocab_size: int = 256
    layout: Layout = ("m4", ("T1m4", ("T26",), "m4T1"), "m4")
    dims: tuple[int, ...] = (1024, 1024, 1536)
    hidden: tuple[int, ...] = (0, 2816, 4096)
    num_heads: tuple[int, ...] = (16, 16, 16)
    rotary_dims: tuple[int, ...] = (32, 32, 48)
    windows: tuple[int | None, ...] = (1023, 1023, None)
    state: int = 128
    head_dim: int = 64
    chunk: int = 256


@dataclass(frozen=True)
class Routing:
    """What a stage decided: the probability that a token begins a chunk, and whether it does; [T] each."""

    probability: Tensor
    boundary: Tensor


class PassThrough(torch.autograd.Function):
    """1; the gradient passes as if it were x."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return torch.ones_like(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        return grad


class RotaryEmbedding(nn.Module):
    """Turns the first `dim` channels of heads by their positions: [T, h, d] -> [T, h, d]."""

    def __init__(self, dim: int, base: float = 10000.0) -> None:
        super().__init__()
        self.dim, self.base = dim, base

    def forward(self, x: Tensor, position: Tensor) -> Tensor:
        turned = rotate(x[..., : self.dim], rotation_of(position, self.dim, self.base))
        return torch.cat([turned, x[..., self.dim :]], -1)


class HNetAttention(nn.Module):
    """Causal softmax attention to the token itself and `window` tokens before it: [T, C] -> [T, C]."""

    def __init__(self, dim: int, num_heads: int, rotary_dim: int, window: int | None) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.window = num_heads, dim // num_heads, window
        self.Wqkv = nn.Linear(dim, 3 * dim, bias=False)
        self.out_proj = nn.Linear(dim, dim, bias=False)
        self.rotary_emb = RotaryEmbedding(rotary_dim)

    def project(self, x: Tensor, position: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v, [T, h, d] each, q and k turned."""
        q, k, v = self.Wqkv(x).unflatten(-1, (3, self.num_heads, self.head_dim)).unbind(-3)
        return self.rotary_emb(q, position), self.rotary_emb(k, position), v

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        q, k, v = self.project(x, packing.position)
        return self.out_proj(self.attention(q, k, v, packing).flatten(-2))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, packing: Packing) -> Tensor:
        """[T, h, d], sequence by sequence with a dense mask."""
        sizes = packing.ends.diff().tolist()
        parts = zip(q.split(sizes), k.split(sizes), v.split(sizes))
        return torch.cat([self.one_sequence(*part) for part in parts])

    def one_sequence(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Attention of a sequence to itself, [N, h, d]."""
        places = torch.arange(len(q), device=q.device)
        distance = places[:, None] - places
        seen = distance >= 0
        if self.window is not None:
            seen = seen & (distance <= self.window)
        scores = torch.einsum("ihd,jhd->hij", q, k) * self.head_dim**-0.5
        weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
        return torch.einsum("hij,jhd->ihd", weights, v)

    def make_state(self, batch: int, length: int) -> dict[str, Tensor]:
        """A ring of the keys and values that later tokens can see, and how many tokens came, per sample."""
        slots = length if self.window is None else min(length, self.window + 1)
        ring = self.Wqkv.weight.new_zeros(2, batch, slots, self.num_heads, self.head_dim)
        return {"k": ring[0], "v": ring[1], "count": torch.zeros(batch, dtype=torch.long, device=ring.device)}

    def step(self, x: Tensor, state: dict[str, Tensor], rows: Tensor) -> Tensor:
        """One more token for the samples `rows`: [rows, C] -> [rows, C]; their state is updated in place."""
        count = state["count"][rows]
        q, k, v = self.project(x, count)
        slots = state["k"].shape[1]
        slot = count % slots
        state["k"][rows, slot], state["v"][rows, slot], state["count"][rows] = k, v, count + 1
        keys, values = state["k"][rows], state["v"][rows]  # [rows, slots, h, d]
        filled = torch.arange(slots, device=x.device) <= count[:, None]
        scores = torch.einsum("bhd,bjhd->bhj", q, keys) * self.head_dim**-0.5
        weights = scores.masked_fill(~filled[:, None], -torch.inf).softmax(-1)
        return self.out_proj(torch.einsum("bhj,bjhd->bhd", weights, values).flatten(-2))


class SwiGLU(nn.Module):
    """fc2(a silu(b)) with a, b = fc1(x): [..., C] -> [..., C]."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, 2 * hidden, bias=False)
        self.fc2 = nn.Linear(hidden, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        value, gate = self.fc1(x).chunk(2, -1)
        return self.fc2(value * F.silu(gate))


class Layer(nn.Module):
    """A mixer and, under capital letters, an MLP, each after a norm and added: [T, C] -> [T, C]."""

    def __init__(self, kind: str, config: HNetConfig, stage: int) -> None:
        super().__init__()
        dim = config.dims[stage]
        self.norm1 = nn.RMSNorm(dim, eps=1e-5)
        self.mixer: Any
        if kind in "mM":
            self.mixer = Mamba2Mixer(Mamba2Config(dim, config.state, config.head_dim, chunk=config.chunk))
        else:
            sizes = (config.num_heads[stage], config.rotary_dims[stage], config.windows[stage])
            self.mixer = HNetAttention(dim, *sizes)
        self.norm2 = nn.RMSNorm(dim, eps=1e-5) if kind.isupper() else None
        self.mlp = SwiGLU(dim, config.hidden[stage]) if kind.isupper() else None

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        return self.feed(x + self.mixer(self.norm1(x), packing))

    def step(self, x: Tensor, state: dict[str, Tensor], rows: Tensor) -> Tensor:
        return self.feed(x + self.mixer.step(self.norm1(x), state, rows))

    def feed(self, x: Tensor) -> Tensor:
        return x if self.mlp is None or self.norm2 is None else x + self.mlp(self.norm2(x))


class Isotropic(nn.Module):
    """Layers of one width and a norm: [T, C] -> [T, C]."""

    def __init__(self, layers: str, config: HNetConfig, stage: int) -> None:
        super().__init__()
        kinds = [kind for kind, count in re.findall(r"([mMtT])(\d+)", layers) for _ in range(int(count))]
        self.layers = nn.ModuleList(Layer(kind, config, stage) for kind in kinds)
        self.rmsnorm = nn.RMSNorm(config.dims[stage], eps=1e-5)

    def forward(self, x: Tensor, packing: Packing) -> Tensor:
        for layer in self.layers:
            x = layer(x, packing)
        return self.rmsnorm(x)

    def make_state(self, batch: int, length: int) -> list[Any]:
        return [layer.mixer.make_state(batch, length) for layer in self.layers]  # type: ignore[operator, union-attr]

    def step(self, x: Tensor, state: list[Any], rows: Tensor) -> Tensor:
        for layer, own in zip(self.layers, state):
            x = layer.step(x, own, rows)  # type: ignore[operator]
        return self.rmsnorm(x)


class RoutingModule(nn.Module):
    """Whether the text turns at a token: p = (1 - cos(q(x of the token before), k(x))) / 2 is above 1/2."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.q_proj_layer = nn.Linear(dim, dim, bias=False)
        self.k_proj_layer = nn.Linear(dim, dim, bias=False)
        with torch.no_grad():
            for layer in (self.q_proj_layer, self.k_proj_layer):
                nn.init.eye_(layer.weight)

    def forward(self, previous: Tensor, x: Tensor, first: Tensor) -> Routing:
        """previous, x [T, C]; first [T], True = begins its sequence and therefore a chunk."""
        cos = F.cosine_similarity(self.q_proj_layer(previous), self.k_proj_layer(x), dim=-1)
        probability = ((1 - cos) / 2).clamp(0, 1).masked_fill(first, 1.0)
        return Routing(probability, self.decide(probability))

    def decide(self, probability: Tensor) -> Tensor:
        """Which tokens begin a chunk, [T]."""
        return probability > 0.5


class DeChunkLayer(nn.Module):
    """y_t = p_t x_t + (1 - p_t) y_{t-1} over the chunks of each sequence: x [M, C], p [M] -> [M, C]."""

    def forward(self, x: Tensor, probability: Tensor, packing: Packing) -> Tensor:
        wide = torch.promote_types(x.dtype, torch.float32)
        p = probability.to(wide).clamp(LEAST, 1 - LEAST)
        return self.smooth(x.to(wide), p, packing).to(x.dtype)

    def smooth(self, x: Tensor, p: Tensor, packing: Packing) -> Tensor:
        """The moving average, token by token, from 0 in every sequence."""
        last, outs = x.new_zeros(x.shape[1:]), []
        for i, begins in enumerate((packing.position == 0).tolist()):
            last = p[i] * x[i] + (0 if begins else (1 - p[i]) * last)
            outs.append(last)
        return torch.stack(outs) if outs else x


class Stage(nn.Module):
    """A stage with all those inside it: [T, C] -> [T, C], and the routing of each, outermost first."""

    def __init__(self, config: HNetConfig, layout: Layout, stage: int = 0) -> None:
        super().__init__()
        dim = config.dims[stage]
        added = dim - config.dims[stage - 1] if stage else 0
        self.pad_dimension = nn.Parameter(torch.zeros(added)) if added > 0 else None
        self.innermost = len(layout) == 1
        self.main_network: Any
        if self.innermost:
            self.main_network = Isotropic(layout[0], config, stage)
            return
        self.encoder = Isotropic(layout[0], config, stage)
        self.main_network = Stage(config, layout[1], stage + 1)
        self.decoder = Isotropic(layout[2], config, stage)
        self.routing_module = RoutingModule(dim)
        self.dechunk_layer = DeChunkLayer()
        self.residual_proj = nn.Linear(dim, dim)
        nn.init.zeros_(self.residual_proj.weight)

    def widened(self, x: Tensor) -> Tensor:
        """x and the channels that this stage adds."""
        if self.pad_dimension is None:
            return x
        return torch.cat([x, self.pad_dimension.to(x.dtype).expand(len(x), -1)], -1)

    def forward(self, x: Tensor, packing: Packing) -> tuple[Tensor, tuple[Routing, ...]]:
        dim = x.shape[-1]
        x = self.widened(x)
        if self.innermost:
            return self.main_network(x, packing)[..., :dim], ()
        x = self.encoder(x, packing)
        routing = self.routing_module(F.pad(x, (0, 0, 1, -1)), x, packing.position == 0)
        chosen = routing.boundary
        ends = F.pad(chosen.cumsum(0, dtype=torch.int32), (1, 0))[packing.ends]
        inner = Packing.of(ends, int(ends[-1]))
        y, inside = self.main_network(x[chosen], inner)
        y = self.dechunk_layer(y, routing.probability[chosen], inner)
        y = y[chosen.cumsum(0) - 1]  # every token gets its chunk's
        x = self.merge(x, y, routing)
        return self.decoder(x, packing)[..., :dim], (routing, *inside)

    def merge(self, x: Tensor, y: Tensor, routing: Routing) -> Tensor:
        """A projection of x plus the chunks' y; its gradient reaches the probability of what was chosen."""
        selected = torch.where(routing.boundary, routing.probability, 1 - routing.probability)
        return self.residual_proj(x) + y * PassThrough.apply(selected)[:, None].to(y.dtype)

    def make_state(self, batch: int, length: int) -> dict[str, Any]:
        main = self.main_network.make_state(batch, length)
        if self.innermost:
            return {"main": main}
        width, weight = self.residual_proj.in_features, self.residual_proj.weight
        wide = torch.promote_types(weight.dtype, torch.float32)
        return {
            "encoder": self.encoder.make_state(batch, length),
            "main": main,
            "decoder": self.decoder.make_state(batch, length),
            "previous": weight.new_zeros(batch, width),
            "seen": torch.zeros(batch, dtype=torch.bool, device=weight.device),
            "average": weight.new_zeros(batch, width, dtype=wide),
        }

    def step(self, x: Tensor, state: dict[str, Any], rows: Tensor) -> Tensor:
        """One more token for the samples `rows`: [rows, C] -> [rows, C]; their state is updated in place."""
        dim = x.shape[-1]
        x = self.widened(x)
        if self.innermost:
            return self.main_network.step(x, state["main"], rows)[..., :dim]
        x = self.encoder.step(x, state["encoder"], rows)
        routing = self.routing_module(state["previous"][rows], x, ~state["seen"][rows])
        state["previous"][rows], state["seen"][rows] = x, True
        chosen = routing.boundary
        if chosen.any():
            begins = rows[chosen]
            inner = self.main_network.step(x[chosen], state["main"], begins)
            average = state["average"][begins]
            p = routing.probability[chosen, None].to(average.dtype).clamp(LEAST, 1 - LEAST)
            state["average"][begins] = p * inner.to(average.dtype) + (1 - p) * average
        y = state["average"][rows].to(x.dtype)
        return self.decoder.step(self.merge(x, y, routing), state["decoder"], rows)[..., :dim]


class HNet(nn.Module):
    """Logits of the next byte: token ids [T] and the ends of packed sequences [S + 1] -> [T, vocab_size].

    Token ids [B, N] without ends are B sequences: [B, N, vocab_size].
    """

    def __init__(self, config: HNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embeddings = nn.Embedding(config.vocab_size, config.dims[0])
        self.backbone = Stage(config, config.layout)
        self.lm_head = nn.Linear(config.dims[0], config.vocab_size, bias=False)
        for name, parameter in self.named_parameters():
            if parameter.dim() == 2 and "routing" not in name and "residual" not in name:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, tokens: Tensor, ends: Tensor | None = None) -> Tensor:
        return self.route(tokens, ends)[0]

    def route(self, tokens: Tensor, ends: Tensor | None = None) -> tuple[Tensor, tuple[Routing, ...]]:
        """The logits, and what every stage decided, outermost first."""
        if ends is None:
            batch, n = tokens.shape
            ends = torch.arange(batch + 1, dtype=torch.int32, device=tokens.device) * n
        packing = Packing.of(ends, tokens.numel())
        x, routing = self.backbone(self.embeddings(tokens.flatten()), packing)
        return self.lm_head(x).unflatten(0, tokens.shape), routing

    def make_state(self, batch: int, length: int) -> dict[str, Any]:
        """The state of `batch` sequences of at most `length` tokens, before their first."""
        return self.backbone.make_state(batch, length)

    @torch.no_grad()
    def step(self, tokens: Tensor, state: dict[str, Any]) -> Tensor:
        """The next token of every sequence: ids [B] -> logits [B, vocab_size]; updates the state in place."""
        rows = torch.arange(len(tokens), device=tokens.device)
        return self.lm_head(self.backbone.step(self.embeddings(tokens), state, rows))


def ratio_loss(routing: Routing, per_chunk: float) -> Tensor:
    """The loss that keeps chunks at `per_chunk` > 1 tokens on average: with F the share of boundaries and G
    the mean probability, (per_chunk - 1) F G + (1 - F) (1 - G), times per_chunk / (per_chunk - 1)."""
    if per_chunk <= 1:
        raise ValueError(f"per_chunk is {per_chunk}; it must be above 1")
    share = routing.boundary.to(routing.probability.dtype).mean()
    mean = routing.probability.mean()
    both = (per_chunk - 1) * share * mean + (1 - share) * (1 - mean)
    return both * per_chunk / (per_chunk - 1)
