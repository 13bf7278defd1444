"""The text classifier of the Long Range Arena in plain PyTorch, with an attention to choose (Tay et al., Long
Range Arena, arXiv:2011.04006).

========== ===================================================================================================
elu1       linear attention with elu + 1 (Katharopoulos et al., arXiv:2006.16236)
favor      Performer's random features (Choromanski et al., arXiv:2009.14794)
linformer  softmax over keys that are projected to a few (Wang et al., arXiv:2006.04768)
local      softmax inside blocks of neighbouring tokens
longformer softmax over a sliding window and the first token, which itself sees all (arXiv:2004.05150)
hash       linear attention between binary codes (Liu et al., EcoFormer, arXiv:2209.09004)
========== ===================================================================================================

The arena's own "local" groups tokens at a stride; here a block is contiguous. The parameters' names are our
own."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vicinal.linear import favor_projection
from vicinal.models.ecoformer import KernelHash
from vicinal.models.performer import favor_attention

__all__ = ["ATTENTIONS", "ClassifierAttention", "LRAConfig", "TextClassifier"]


@dataclass(frozen=True)
class LRAConfig:
    """Sizes of a text classifier; `attention` is one of `ATTENTIONS`. `max_len` counts bytes, without the
    token that the model puts before them. `window`: tokens of a block of "local", and how far "longformer"
    sees to each side; `projected`: keys of "linformer"; `bits`, `anchors`: of the codes of "hash"."""

    attention: str = "elu1"
    vocab_size: int = 256
    num_classes: int = 2
    dim: int = 256
    depth: int = 4
    num_heads: int = 4
    mlp_ratio: int = 4
    max_len: int = 4096
    window: int = 256
    projected: int = 256
    bits: int = 16
    anchors: int = 25


class ClassifierAttention(nn.Module):
    """An attention with its projections: [B, N, C] -> [B, N, C]; the kind is in the subclass.

    Keys have no bias: a softmax does not see it."""

    def __init__(self, config: LRAConfig) -> None:
        super().__init__()
        dim, heads = config.dim, config.num_heads
        if dim % heads:
            raise ValueError(f"dim is {dim}, which num_heads = {heads} does not divide")
        self.num_heads, self.head_dim = heads, dim // heads
        self.q = nn.Linear(dim, dim)
        self.k = nn.Linear(dim, dim, bias=False)
        self.v = nn.Linear(dim, dim)
        self.out = nn.Linear(dim, dim)

    def forward(self, x: Tensor, ignored: Tensor | None = None) -> Tensor:
        """ignored: [B, N] bool, True = a token that nobody sees."""
        q, k, v = (self.heads(project(x)) for project in (self.q, self.k, self.v))
        return self.out(self.attention(q, k, v, ignored).flatten(-2))

    def heads(self, x: Tensor) -> Tensor:
        """[B, N, C] -> [B, N, h, d]"""
        return x.unflatten(-1, (self.num_heads, self.head_dim))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        """[B, N, h, d] -> [B, N, h, d]"""
        raise NotImplementedError(type(self).__name__)


def softmax_attention(q: Tensor, k: Tensor, v: Tensor, seen: Tensor | None) -> Tensor:
    """softmax(q k^T / sqrt(d)) v over the keys that are `seen`, bool that broadcasts to [B, h, N, M]; 0 where
    there are none. [B, N, h, d], [B, M, h, d] -> [B, N, h, d]."""
    scores = torch.einsum("bihd,bjhd->bhij", q, k) * q.shape[-1] ** -0.5
    if seen is not None:
        scores = scores.masked_fill(~seen, -torch.inf)
        scores = scores.masked_fill(~seen.any(-1, keepdim=True), 0.0)
    weights = scores.softmax(-1)
    if seen is not None:
        weights = weights.masked_fill(~seen, 0.0)
    return torch.einsum("bhij,bjhd->bihd", weights, v)


class EluAttention(ClassifierAttention):
    """Weights phi(q_i) . phi(k_j) over their sum, phi = elu + 1."""

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        f, p = F.elu(q) + 1, F.elu(k) + 1
        if ignored is not None:
            p = p.masked_fill(ignored[..., None, None], 0.0)
        sums = torch.einsum("bjhk,bjhd->bhkd", p, v)
        total = torch.einsum("bihk,bhk->bih", f, p.sum(1)) + 1e-6
        return torch.einsum("bihk,bhkd->bihd", f, sums) / total[..., None]


class FavorAttention(ClassifierAttention):
    """Weights that estimate exp(q_i . k_j / sqrt(d)) by random features."""

    projection: Tensor

    def __init__(self, config: LRAConfig) -> None:
        super().__init__(config)
        self.register_buffer("projection", favor_projection(self.head_dim))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        return favor_attention(q, k, v, self.projection, None if ignored is None else ~ignored)


class LinformerClassifierAttention(ClassifierAttention):
    """softmax(q (E^T k)^T / sqrt(d)) (F^T v) with E and F [tokens, projected] trained."""

    def __init__(self, config: LRAConfig) -> None:
        super().__init__(config)
        reach = config.projected**-0.5
        shape = (config.max_len + 1, config.projected)
        self.proj_k = nn.Parameter(torch.empty(shape).uniform_(-reach, reach))
        self.proj_v = nn.Parameter(torch.empty(shape).uniform_(-reach, reach))

    def projected(self, k: Tensor, v: Tensor, ignored: Tensor | None) -> tuple[Tensor, Tensor]:
        """E^T k and F^T v without ignored tokens: [B, projected, h, d]."""
        if ignored is not None:
            k, v = (x.masked_fill(ignored[..., None, None], 0.0) for x in (k, v))
        parts = ((self.proj_k, k), (self.proj_v, v))
        keys, values = (torch.einsum("nm,bnhd->bmhd", e[: x.shape[1]], x) for e, x in parts)
        return keys, values

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        return softmax_attention(q, *self.projected(k, v, ignored), None)


class LocalAttention(ClassifierAttention):
    """Softmax attention inside blocks of `window` tokens; the last block may be shorter."""

    def __init__(self, config: LRAConfig) -> None:
        super().__init__(config)
        self.window = config.window

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        block = torch.arange(q.shape[1], device=q.device) // self.window
        seen = block[:, None] == block
        if ignored is not None:
            seen = seen & ~ignored[:, None, None]
        return softmax_attention(q, k, v, seen)


class LongformerAttention(ClassifierAttention):
    """Softmax attention to `window` tokens on each side and to the first token.

    The first token sees all, with projections of its own."""

    def __init__(self, config: LRAConfig) -> None:
        super().__init__(config)
        self.window = config.window
        self.q_global = nn.Linear(config.dim, config.dim)
        self.k_global = nn.Linear(config.dim, config.dim, bias=False)
        self.v_global = nn.Linear(config.dim, config.dim)

    def forward(self, x: Tensor, ignored: Tensor | None = None) -> Tensor:
        q, k, v = (self.heads(project(x)) for project in (self.q, self.k, self.v))
        others = self.attention(q, k, v, ignored)[:, 1:]
        q = self.heads(self.q_global(x[:, :1]))
        k, v = self.heads(self.k_global(x)), self.heads(self.v_global(x))
        first = self.of_first(q, k, v, ignored)
        return self.out(torch.cat([first, others], 1).flatten(-2))

    def attention(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        """What every token sees; the first one's is not used."""
        places = torch.arange(q.shape[1], device=q.device)
        seen = (places[:, None] - places).abs() <= self.window
        if ignored is not None:
            seen = seen & ~ignored[:, None, None]
        return softmax_attention(q, k, v, seen | (places == 0))

    def of_first(self, q: Tensor, k: Tensor, v: Tensor, ignored: Tensor | None) -> Tensor:
        """[B, 1, h, d], from q [B, 1, h, d], k and v [B, N, h, d]."""
        return softmax_attention(q, k, v, None if ignored is None else ~ignored[:, None, None])


class HashAttention(ClassifierAttention):
    """Weights code(k_i) . code(k_j) + bits + 1 over their sum; queries are keys, and no token is ignored."""

    def __init__(self, config: LRAConfig) -> None:
        super().__init__(config)
        del self.q
        self.hash = KernelHash(self.num_heads, self.head_dim, config.bits, config.anchors)

    def forward(self, x: Tensor, ignored: Tensor | None = None) -> Tensor:
        if ignored is not None:
            raise NotImplementedError('ignored is given; attention "hash" takes whole batches alone')
        return self.out(self.hashed(self.heads(self.k(x)), self.heads(self.v(x))).flatten(-2))

    def hashed(self, k: Tensor, v: Tensor) -> Tensor:
        """[B, N, h, d] -> [B, N, h, d]"""
        k, v = k.transpose(1, 2), v.transpose(1, 2)
        code = self.hash(F.normalize(k, dim=-1))  # [B, h, N, bits]
        offset = code.shape[-1] + 1
        top = code @ (code.mT @ v) + offset * v.sum(-2, keepdim=True)
        bottom = code @ code.sum(-2).unsqueeze(-1) + offset * v.shape[-2]
        return (top / bottom).transpose(1, 2)

    def calibrate(self, x: Tensor) -> None:
        """Fit the anchors and the mean of the codes to inputs [B, N, C]."""
        self.hash.calibrate(F.normalize(self.heads(self.k(x)).transpose(1, 2), dim=-1))


ATTENTIONS: dict[str, type[ClassifierAttention]] = {
    "elu1": EluAttention,
    "favor": FavorAttention,
    "linformer": LinformerClassifierAttention,
    "local": LocalAttention,
    "longformer": LongformerAttention,
    "hash": HashAttention,
}


class ClassifierBlock(nn.Module):
    """Attention and an MLP, each after a norm and added: [B, N, C] -> [B, N, C]."""

    def __init__(self, config: LRAConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.dim)
        self.attn = ATTENTIONS[config.attention](config)
        self.norm2 = nn.LayerNorm(config.dim)
        self.fc1 = nn.Linear(config.dim, config.mlp_ratio * config.dim)
        self.fc2 = nn.Linear(config.mlp_ratio * config.dim, config.dim)

    def forward(self, x: Tensor, ignored: Tensor | None = None) -> Tensor:
        x = x + self.attn(self.norm1(x), ignored)
        return x + self.fc2(F.gelu(self.fc1(self.norm2(x))))


class TextClassifier(nn.Module):
    """Classes of texts: ids [B, N] -> logits [B, num_classes], from the mean of the last tokens.

    `ignored` [B, N] bool, True = padding. A token of the model's own stands before every text.
    """

    def __init__(self, config: LRAConfig) -> None:
        super().__init__()
        if config.attention not in ATTENTIONS:
            raise ValueError(f"attention is {config.attention!r}; it may be one of {list(ATTENTIONS)}")
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.dim)
        self.first = nn.Parameter(0.02 * torch.randn(config.dim))
        self.positions = nn.Parameter(0.02 * torch.randn(config.max_len + 1, config.dim))
        self.blocks = nn.ModuleList(ClassifierBlock(config) for _ in range(config.depth))
        self.norm = nn.LayerNorm(config.dim)
        self.head = nn.Linear(config.dim, config.num_classes)

    def forward(self, tokens: Tensor, ignored: Tensor | None = None) -> Tensor:
        return self.classify(self.embed(tokens), ignored)

    def classify(self, x: Tensor, ignored: Tensor | None = None) -> Tensor:
        """Logits of embedded texts [B, N, C]."""
        if x.shape[1] > self.config.max_len:
            raise ValueError(f"a text has {x.shape[1]} tokens; max_len is {self.config.max_len}")
        x = torch.cat([self.first.to(x.dtype).expand(len(x), 1, -1), x], 1)
        x = x + self.positions[: x.shape[1]].to(x.dtype)
        if ignored is not None:
            ignored = F.pad(ignored, (1, 0), value=False)
        for block in self.blocks:
            x = block(x, ignored)
        x = self.norm(x)
        if ignored is None:
            return self.head(x.mean(1))
        kept = x.masked_fill(ignored[..., None], 0.0).sum(1)
        return self.head(kept / (~ignored).sum(1, keepdim=True))

    @torch.no_grad()
    def calibrate(self, tokens: Tensor) -> None:
        """Fit the codes of attention "hash" to texts [B, N], first layers first; nothing to do for others."""
        layers = [m for m in self.modules() if isinstance(m, HashAttention)]
        hooks = [m.register_forward_pre_hook(lambda m, inputs: m.calibrate(inputs[0])) for m in layers]
        try:
            self(tokens)
        finally:
            for hook in hooks:
                hook.remove()
