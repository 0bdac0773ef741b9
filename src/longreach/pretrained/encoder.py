"""Symmetric ALiBi for encoders: what an attention module of one's own calls in place of its softmax.

JinaBERT v2, MosaicBERT and DNABERT-2 add -m_h |i - j| to the scaled scores of all keys, past and future. Their code is
remote code in many versions, so that nothing is swapped here; the one line that forms scores is replaced by hand:

    class Attention(JinaBertSelfAttention):
        def forward(self, hidden_states, attention_mask=None, **kwargs):
            q, k, v = (self.transpose_for_scores(f(hidden_states)) for f in (self.query, self.key, self.value))
            out = symmetric_attention(q, k, v, attention_mask=attention_mask, scaling=Scaling("linear", 512))
            return (out.transpose(1, 2).flatten(2),)
"""

from torch import Tensor

from longreach.ops.alibi import alibi_slopes
from longreach.ops.attention import attention
from longreach.positions.scaling import Scaling
from longreach.pretrained.masks import read_padding


def symmetric_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    attention_mask: Tensor | None = None,
    slopes: Tensor | None = None,
    scaling: Scaling | None = None,
    scale: float | None = None,
    dropout_p: float = 0.0,
    tolerance: float | None = None,
    impl: str = "auto",
) -> Tensor:
    """Bidirectional attention with ALiBi: softmax(scale q_i . k_j - m_h |i - j|) v over all keys j.

    Args:
        q: (B, H, T, D) floating point.
        k: (B, Hkv, T, D).
        v: (B, Hkv, T, D).
        attention_mask: (B, T), 0 where a key is padding, which stands at the ends.
        slopes: (H,) floating point; `longreach.alibi_slopes` when None.
        scaling: how slopes change with the length of each sequence, without its padding; not at all when None.
        scale: factor of q . k; D**-0.5 when None.
        dropout_p: probability with which attention weights are dropped; pass 0 outside training.
        tolerance: as in `longreach.attention`.
        impl: likewise.

    Returns:
        (B, H, T, D) in the dtype of q; 0 for a sequence that is all padding.

    Raises:
        ValueError: the mask has other axes, or padding between tokens; what `longreach.attention` refuses.
    """
    padding = read_padding(attention_mask)
    slopes = alibi_slopes(q.shape[1], device=q.device) if slopes is None else slopes
    if scaling is not None:
        length = k.shape[2] if padding is None else (~padding).sum(dim=1).clamp(min=1)  # one, or [B]
        slopes = scaling(slopes, length)
    return attention(
        q,
        k,
        v,
        slopes=slopes,
        causal=False,
        scale=scale,
        key_padding_mask=padding,
        dropout_p=dropout_p,
        tolerance=tolerance,
        impl=impl,
    )
