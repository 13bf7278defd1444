"""nn.MultiheadAttention with torch's contract and parameters, and the attend kernels behind it."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from . import _backends
from . import _check as checks
from . import _multihead_check as check
from ._multihead_attend import Problem, attend, explained
from ._multihead_nested import run_nested

__all__ = ["MultiheadAttention"]

WEIGHTS = ("on_request", "never")


def project(module: Any, query: Tensor, key: Tensor, value: Tensor) -> tuple[Any, ...]:
    """q, k, v [.., heads, head_dim] and the packed tensor [.., 3, heads, head_dim] behind them, or None.

    One product for consecutive arguments that are one tensor.
    """
    heads = (module.num_heads, module.head_dim)
    weight, bias, c = module.in_proj_weight, module.in_proj_bias, module.embed_dim
    inputs = (query, key, value)
    found: list[Tensor] = []
    if weight is None:
        weights = (module.q_proj_weight, module.k_proj_weight, module.v_proj_weight)
        biases = (None,) * 3 if bias is None else bias.chunk(3)
        found = [F.linear(x, w, b).unflatten(-1, heads) for x, w, b in zip(inputs, weights, biases)]
        return (*found, None)
    packed = None
    while len(found) < 3:
        first = len(found)
        last = first + 1
        while last < 3 and inputs[last] is inputs[first]:
            last += 1
        part = slice(first * c, last * c)
        made = F.linear(inputs[first], weight[part], None if bias is None else bias[part])
        made = made.unflatten(-1, (last - first, *heads))
        packed = made if last - first == 3 else None
        found += made.unbind(-3)
    return (*found, packed)


class MultiheadAttention(nn.MultiheadAttention):
    """`torch.nn.MultiheadAttention` with its contract, parameters and state dicts, on vicinal's kernels.

    out = out_proj(concat_h softmax(q_h k_h^T / sqrt(head_dim) + masks) v_h). Rows whose keys are all ignored
    give a context of 0, weights of 0 and no gradient, where torch gives NaN or not, by path. Neither this
    module nor torch's encoder layers around it take torch's fused inference path.

    Args:
        embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim, batch_first, device,
            dtype: as torch.
        weights: "on_request", torch's contract, or "never": the second result is None whatever need_weights
            says, for callers that leave it at True and drop the weights.
        backend: None for the fastest way, SDPA among them, or a backend of vicinal.

    Raises:
        ValueError, AssertionError: as torch; ValueError where weights is neither of its values.

    Example:
        >>> attention = MultiheadAttention(32, 4, batch_first=True)
        >>> x = torch.randn(2, 10, 32)
        >>> out, weights = attention(x, x, x)
        >>> out.shape, weights.shape
        (torch.Size([2, 10, 32]), torch.Size([2, 10, 10]))

    Source: Vaswani et al., Attention Is All You Need (arXiv 1706.03762).
    """

    weights: str = "on_request"
    backend: str | None = None

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        bias: bool = True,
        add_bias_kv: bool = False,
        add_zero_attn: bool = False,
        kdim: int | None = None,
        vdim: int | None = None,
        batch_first: bool = False,
        device: Any = None,
        dtype: Any = None,
        *,
        weights: str = "on_request",
        backend: str | None = None,
    ) -> None:
        checks.one_of("weights", weights, WEIGHTS)
        sizes = (embed_dim, num_heads, dropout, bias, add_bias_kv, add_zero_attn, kdim, vdim)
        super().__init__(*sizes, batch_first, device, dtype)
        self.weights = weights
        self.backend = backend

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """False to torch's encoder layers, which would otherwise take the parameters and never call forward.

        The truth while parameters are made, and in __dict__ for the class that has no such property.
        """
        if "out_proj" not in self._modules or self.__dict__.get("_resetting", False):
            return bool(self.__dict__["_qkv_same_embed_dim"])
        return False

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, value: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = value

    def _reset_parameters(self) -> None:
        self.__dict__["_resetting"] = True
        try:
            super()._reset_parameters()
        finally:
            del self.__dict__["_resetting"]

    def __prepare_scriptable__(self) -> nn.Module:
        """What torch.jit.script takes: torch's own module with the same parameters."""
        check.warn_once("torch.jit.script")
        twin = nn.MultiheadAttention.__new__(nn.MultiheadAttention)
        twin.__dict__ = {k: v for k, v in self.__dict__.items() if k not in ("weights", "backend")}
        return twin

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """Attend.

        Args:
            query: [L, N, embed_dim], with batch_first [N, L, embed_dim], or [L, embed_dim].
            key: [S, N, kdim] likewise. value: [S, N, vdim].
            key_padding_mask: [N, S] or [S], bool (True = ignored) or float (added).
            need_weights: also return the weights.
            attn_mask: [L, S] or [N heads, L, S], bool (True = ignored) or float (added).
            average_attn_weights: weights are the mean over heads.
            is_causal: a hint that attn_mask is causal, which then is not read where that is faster.

        Returns:
            The output in query's shape and layout, contiguous, and None or the weights [N, L, S], per head
            [N, heads, L, S], after dropout.
        """
        masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        return self._run(query, key, value, *masks)

    def _run(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
        **geometry: Any,
    ) -> tuple[Tensor, Tensor | None]:
        """forward, with what a subclass says to its `_attend`."""
        masks = (key_padding_mask, need_weights, attn_mask, average_attn_weights, is_causal)
        if query.is_nested or key.is_nested or value.is_nested:
            return run_nested(self, query, key, value, *masks)
        if self._why_upstream(query, key, value):
            return self._upstream(query, key, value, *masks)
        asked = check.request(query, key, value, key_padding_mask, attn_mask, is_causal, self)
        p = self._problem(asked, need_weights, average_attn_weights)
        context, weights = self._attend(p, **geometry)
        out = F.linear(context.flatten(-2), self.out_proj.weight, self.out_proj.bias).contiguous()
        if not asked.batched:
            out, weights = out[0], None if weights is None else weights[0]
        return out, weights

    def _problem(self, asked: check.Request, need_weights: bool, average: bool) -> Problem:
        q, k, v, packed = project(self, asked.query, asked.key, asked.value)
        return Problem(
            q=q,
            k=k,
            v=v,
            packed=packed,
            batch_dim=asked.batch_dim,
            keys=asked.keys,
            hidden=None,
            pairs=asked.pairs,
            causal=asked.causal,
            dropout_p=float(self.dropout) if self.training else 0.0,
            weights=bool(need_weights) and self.weights != "never",
            average=average,
            backend=self.backend,
        )

    def _attend(self, p: Problem, **geometry: Any) -> tuple[Tensor, Tensor | None]:
        """The context [.., heads, head_dim] in the layout of p.q, and the weights if they are wanted."""
        return attend(self._with_extra_keys(p))

    def _extra_keys(self, p: Problem) -> tuple[Tensor | None, Tensor | None]:
        """Keys and values that every query sees besides, samples first: bias_k and bias_v, then zeros."""
        n = p.q.shape[p.batch_dim]
        shape = (n, 1, self.num_heads, self.head_dim)
        pairs = [(b.to(p.q.dtype).view(1, *shape[1:]).expand(shape)) for b in self._biases()]
        columns = [tuple(pairs)] if pairs else []
        if self.add_zero_attn:
            columns.append((p.q.new_zeros(shape), p.q.new_zeros(shape)))
        if not columns:
            return None, None
        keys, values = zip(*columns)
        return torch.cat(keys, 1), torch.cat(values, 1)

    def _biases(self) -> tuple[Tensor, ...]:
        return () if self.bias_k is None or self.bias_v is None else (self.bias_k, self.bias_v)

    def _with_extra_keys(self, p: Problem) -> Problem:
        """Extra keys at the end of the keys, with a column of zeros in each mask."""
        extra_k, extra_v = self._extra_keys(p)
        if extra_k is None or extra_v is None:
            return p
        dim, count = 1 - p.batch_dim, extra_k.shape[1]
        p.k = torch.cat([p.k, p.samples_first(extra_k)], dim)
        p.v = torch.cat([p.v, p.samples_first(extra_v)], dim)
        p.keys, p.pairs = (None if m is None else F.pad(m, (0, count)) for m in (p.keys, p.pairs))
        p.packed, p.causal = None, False  # the hint says nothing of these columns
        return p

    def _why_upstream(self, query: Tensor, key: Tensor, value: Tensor) -> str:
        return check.why_upstream(query, key, value)

    def _upstream(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None,
        need_weights: bool,
        attn_mask: Tensor | None,
        average_attn_weights: bool,
        is_causal: bool,
    ) -> tuple[Tensor, Tensor | None]:
        """torch's own computation, for calls that our kernels do not take."""
        if not torch.compiler.is_dynamo_compiling():
            check.warn_once(self._why_upstream(query, key, value))
        swap = self.batch_first and query.dim() == 3
        if swap:
            q = query.transpose(0, 1)
            k = q if key is query else key.transpose(0, 1)
            query, key, value = q, k, (q if value is query else k if value is key else value.transpose(0, 1))
        out, weights = F.multi_head_attention_forward(
            query,
            key,
            value,
            self.embed_dim,
            self.num_heads,
            self.in_proj_weight,
            self.in_proj_bias,
            self.bias_k,
            self.bias_v,
            self.add_zero_attn,
            self.dropout,
            self.out_proj.weight,
            self.out_proj.bias,
            training=self.training,
            key_padding_mask=key_padding_mask,
            need_weights=need_weights and self.weights != "never",
            attn_mask=attn_mask,
            use_separate_proj_weight=self.in_proj_weight is None,
            q_proj_weight=self.q_proj_weight,
            k_proj_weight=self.k_proj_weight,
            v_proj_weight=self.v_proj_weight,
            average_attn_weights=average_attn_weights,
            is_causal=is_causal,
        )
        return (out.transpose(0, 1) if swap else out), weights

    def explain(self, *args: Any, **kwargs: Any) -> _backends.Explanation:
        """Which kernel forward(*args, **kwargs) runs, and everything against the others."""
        names = ("query", "key", "value", "key_padding_mask", "need_weights", "attn_mask")
        given = dict(zip((*names, "average_attn_weights", "is_causal"), args)) | kwargs
        query, key, value = (given.pop(name) for name in names[:3])
        masks = (given.get("key_padding_mask"), given.get("attn_mask"), given.get("is_causal", False))
        reason = self._why_upstream(query, key, value)
        if reason:
            problem = _backends.Problem("multihead", query.device.type, query.dtype, *[self.head_dim] * 2)
            return _backends.Explanation(problem, "torch", {"vicinal": [reason], "torch": []})
        asked = check.request(query, key, value, *masks, self)
        average = given.get("average_attn_weights", True)
        with torch.no_grad():
            p = self._with_extra_keys(self._problem(asked, given.get("need_weights", True), average))
        kernel, found = explained(p)
        problem = _backends.Problem("multihead", p.q.device.type, p.q.dtype, *[self.head_dim] * 2)
        return _backends.Explanation(problem, kernel, found)
