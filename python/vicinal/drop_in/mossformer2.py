"""vicinal's own reference MossFormer2."""

from __future__ import annotations

from torch import Tensor

from vicinal.drop_in.adapter import Adapter
from vicinal.joint import joint_attention
from vicinal.models.mossformer2 import JointAttentionLayer


class FusedJointAttentionLayer(JointAttentionLayer):
    """The layer of the reference model with its attention and gate in one operation."""

    def attention(
        self,
        quad_q: Tensor,
        quad_k: Tensor,
        lin_q: Tensor,
        lin_k: Tensor,
        v: Tensor,
        u: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """The gated result [B, N, 2C]."""
        out = joint_attention(
            *(quad_q, quad_k, lin_q, lin_k, v, u),
            group_size=self.group_size,
            is_causal=self.causal,
            key_padding_mask=None if mask is None else ~mask,
            dropout_p=self.dropout.p if self.training else 0.0,
            gate=True,
        )
        assert isinstance(out, Tensor)
        return out


ADAPTERS = (Adapter("linear", JointAttentionLayer, FusedJointAttentionLayer, "joint_attention, gated"),)
