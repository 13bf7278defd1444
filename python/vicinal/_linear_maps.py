"""Feature maps of linear attention.

Maps that act on each element (identity, elu1, relu, relu2, exp) run inside the kernels: value and derivative
are two lines a language. softmax, focused and favor look at whole rows, all tokens or a projection; they are
differentiable PyTorch code before the kernel, which then gets features (map identity). Fusing them would
bring little: softmax over tokens and favor's maximum need a pass over all keys of their own before any sum
can start, favor is a matrix product that a library does better, and focused may take its norms over all
heads, which no kernel with a head per program sees.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .reference_linear import MOST_EXPONENT, elementwise

ELEMENTWISE = ("identity", "elu1", "relu", "relu2", "exp")
NAMES = (*ELEMENTWISE, "softmax", "focused", "favor")
NORM_SCOPES = ("head", "all")


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """A feature map with its parameters; `feature_map="elu1"` is short for `FeatureMap("elu1")`.

    ==========  ==============================================================================================
    identity    x: the features are applied already
    elu1        x + 1 where x >= 0, otherwise exp(x); not elu(x) + 1, which is 0 below -8 in bfloat16
    relu        max(x, 0) + param
    relu2       max(x, 0)^2
    exp         exp(min(x - param, 32))
    softmax     queries: softmax over the head dim; keys: over the tokens. Rows sum to 1: normalize=False
    focused     u = (relu(x) + 1e-6) / c, y = u^power, phi = y |u| / |y|, c = softplus(scale) or 1
    favor       x' = dk^-1/4 x, phi = m^-1/2 (exp(t - |x'|^2 / 2 - max t) + 1e-4), t = projection x'
    ==========  ==============================================================================================

    Args:
        name: one of the above.
        param: relu: what is added. exp: what is subtracted.
        power: of focused.
        scale: of focused, a tensor that broadcasts against [B, N, H, dk], e.g. [dk] or [H, dk]; trainable.
        norm_scope: focused takes both norms over the head dim ("head") or over all heads ("all").
        projection: of favor, [m, dk]; `favor_projection` makes one.

    favor's maximum is over the features of a query, and over all keys of a batch (or packed sequence) and
    head that are not ignored; with is_causal or a state keys have none, which would see other tokens, and the
    exponent is at most 32.
    """

    name: str
    param: float = 0.0
    power: float = 3.0
    scale: Tensor | None = field(default=None, repr=False)
    norm_scope: str = "head"
    projection: Tensor | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        from ._linear_check import check_feature_map

        check_feature_map(self)

    def __call__(
        self,
        x: Tensor,
        *,
        keys: bool = False,
        ignored: Tensor | None = None,
        streaming: bool = False,
        ends: Tensor | None = None,
    ) -> Tensor:
        """Features of x [B, N, H, dk] in plain PyTorch: [B, N, H, K], float32 (float64 for float64).

        keys: x are keys, not queries; ignored: bool [B, N], keys to leave out of sums and maxima; streaming:
        features of a key may not depend on other keys; ends: [S + 1], those of packed sequences, which may
        not depend on each other.
        """
        x = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
        if self.name == "softmax":
            return softmax(x, keys, ignored)
        if self.name == "focused":
            return focused(x, self)
        if self.name == "favor":
            assert self.projection is not None
            return favor(x, self.projection.to(x.dtype), keys, ignored, streaming, ends)
        return elementwise(self.name, x, self.param)


def softmax(x: Tensor, keys: bool, ignored: Tensor | None) -> Tensor:
    if not keys:
        return x.softmax(-1)
    if ignored is None:
        return x.softmax(1)
    everything = ignored[..., None, None]
    p = x.masked_fill(everything, -torch.inf).masked_fill(ignored.all(1)[:, None, None, None], 0).softmax(1)
    return p.masked_fill(everything, 0)


def focused(x: Tensor, feature_map: FeatureMap) -> Tensor:
    u = F.relu(x) + 1e-6
    if feature_map.scale is not None:
        u = u / F.softplus(feature_map.scale.to(x.dtype))
    y = u**feature_map.power
    over = (-1,) if feature_map.norm_scope == "head" else (-2, -1)
    norms = [torch.linalg.vector_norm(t, dim=over, keepdim=True) for t in (u, y)]
    return y * (norms[0] / norms[1])


def favor(
    x: Tensor,
    projection: Tensor,
    keys: bool,
    ignored: Tensor | None,
    streaming: bool,
    ends: Tensor | None,
) -> Tensor:
    x = x * x.shape[-1] ** -0.25
    t = x @ projection.t()  # [B, N, H, m], much larger than x: what follows writes it in place
    shift = x.square().sum(-1, keepdim=True) / 2
    if not keys:
        shift = shift + t.detach().amax(-1, keepdim=True)
    elif not streaming and x.shape[1]:
        seen = t.detach()
        if ignored is not None:
            seen = seen.masked_fill(ignored[..., None, None], -torch.inf)
        most = seen.amax((1, 3), keepdim=True) if ends is None else _highest_of_sequence(seen, ends)
        shift = shift + most.masked_fill(most == -torch.inf, 0)
    logits = t.sub_(shift)
    if keys and streaming:
        logits = logits.clamp(max=MOST_EXPONENT)
    elif keys and ignored is not None:
        logits = logits.masked_fill(ignored[..., None, None], 0)
    factor = projection.shape[0] ** -0.5
    return torch.add(logits.new_tensor(1e-4 * factor), logits.exp_(), alpha=factor)


def _highest_of_sequence(x: Tensor, ends: Tensor) -> Tensor:
    """The maximum over the last axis and the tokens of each packed sequence: [1, N, H, m] -> [1, N, H, 1]."""
    high = x[0].amax(-1)  # [N, H]
    places = torch.arange(len(high), device=x.device, dtype=ends.dtype)
    sequence = torch.searchsorted(ends[1:], places, right=True)  # S for tokens after the last
    most = high.new_full((len(ends), high.shape[1]), -torch.inf)
    most = most.scatter_reduce(0, sequence[:, None].expand_as(high), high, "amax")
    return most[sequence][None, ..., None]


def favor_projection(
    dim: int,
    features: int | None = None,
    *,
    scaling: str = "norms",
    generator: torch.Generator | None = None,
    device: torch.device | str | None = None,
) -> Tensor:
    """A random projection for favor: rows orthogonal in blocks of `dim`, float32 [features, dim].

    Args:
        dim: the head dimension.
        features: rows; default int(dim * log(dim)).
        scaling: "norms", lengths of Gaussian vectors, or "regular", all sqrt(dim).
        generator: of the random numbers.

    Example:
        >>> favor_projection(64).shape
        torch.Size([266, 64])

    Source: Choromanski et al., Rethinking Attention with Performers (arXiv 2009.14794).
    """
    from ._linear_check import check_projection

    check_projection(dim, features, scaling)
    count = max(1, int(dim * math.log(dim))) if features is None else features

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=device)

    blocks = [torch.linalg.qr(normal(dim, dim))[0].t() for _ in range(-(-count // dim))]
    rows = torch.cat(blocks)[:count]
    lengths = normal(count, dim).norm(dim=1, keepdim=True) if scaling == "norms" else dim**0.5
    return rows * lengths
