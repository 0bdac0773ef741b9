"""A lower bound of each row's LSE, cheap to compute: what `reach` holds the far keys' upper bounds against.

The LSE over some of a row's visible keys is at most the LSE over all. Here they are the nearest visible key and, by a
weighted mean of them, the keys of earlier links (docs/reach.md, "Where the two bounds come from"). For few queries,
whose time is that of many small operations, they are the last keys outright.
"""

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from longreach.ops.visibility import Visibility

LINK = 16
"""Consecutive positions whose queries share one mean of the keys before, when their LSE is bounded from below."""

CHAIN = 32
"""Links that such a mean looks back on, a power of 2."""

LAST_KEYS = 128
"""Keys whose scores bound the LSE of few queries: more would cost more than they let be skipped."""

FEW_QUERIES = 16
"""Fewer queries than this count as decoding: it is the reading of keys that takes time, not products with them."""

ROUNDING = 2.0**-20
"""Relative slack of every other term of the bound: at least 8 roundings of float32."""


def lse_lower_bound(
    q: Tensor, k: Tensor, left: Tensor, right: Tensor, centre: Tensor | None, scale: float, visibility: Visibility
) -> tuple[Tensor, Tensor]:
    """Lower bound of each row's LSE over centred keys (B, H, Tq), and which rows see any key, (B or 1, 1, Tq) bool.

    It is the LSE of the nearest visible key's score and a bound on the LSE of keys in earlier links, or, for few
    queries, of the scores of the last keys.
    """
    query_length, key_length = q.shape[2], k.shape[2]
    positions = torch.arange(query_length, device=q.device) + (key_length - query_length)
    nearest = [_nearest_visible(positions, key_length, visibility.key_padding_mask, past=True)]
    if not visibility.causal:
        nearest.append(_nearest_visible(positions, key_length, visibility.key_padding_mask, past=False))
    found = (_hidden(positions, index, visibility, padding=False) for index in nearest)
    hidden = [x[0].transpose(0, 1) for x in found]  # each [B or 1, 1, Tq]
    sees = ~hidden[0] if visibility.causal else ~(hidden[0] & hidden[1])

    if query_length < FEW_QUERIES:
        return last_lse(q, k, left, right, centre, scale, visibility), sees
    left, right = raised(left), raised(right)
    earlier = _earlier_lse(q, k, left, centre, scale, visibility)
    if visibility.key_padding_mask is None and query_length <= key_length:
        score = _products(q, k[:, :, key_length - query_length :], centre) * scale  # each query with its own key
        return torch.logaddexp(earlier, score.masked_fill(~sees, float("-inf"))), sees
    for index, unseen in zip(nearest, hidden, strict=True):
        index = index.clamp(0, key_length - 1)
        where = index[:, None, :, None].expand(*k.shape[:2], -1, k.shape[3])
        distance = (positions - index)[:, None]  # [B or 1, 1, Tq]
        penalty = left[..., None] * distance.clamp(min=0) + right[..., None] * (-distance).clamp(min=0)
        score = _products(q, k.gather(2, where), centre) * scale - penalty
        # Not their sum, because with padding the nearest key may lie in an earlier link.
        earlier = torch.maximum(earlier, score.masked_fill(unseen, float("-inf")))
    return earlier, sees


def raised(slope: Tensor) -> Tensor:
    """A slope by which the LSE is surely smaller, whatever rounding does to its products."""
    return slope * (1 + 4 * ROUNDING)


def last_lse(
    q: Tensor, k: Tensor, left: Tensor, right: Tensor, centre: Tensor | None, scale: float, visibility: Visibility
) -> Tensor:
    """Lower bound of the LSE: that over the visible ones of the LAST_KEYS last keys, (B, H, Tq), -inf for none."""
    first = max(0, k.shape[2] - LAST_KEYS)
    keys = k[:, :, first:].to(left.dtype)
    keys = keys if centre is None else keys - centre
    by_group = (q.to(left.dtype) * scale).unflatten(1, (k.shape[1], -1)).flatten(2, 3)  # [B, Hkv, G Tq, D]
    scores = (by_group @ keys.transpose(2, 3)).view(*q.shape[:3], keys.shape[2])
    key_positions = torch.arange(first, k.shape[2], device=q.device)
    positions = torch.arange(q.shape[2], device=q.device)[:, None] + (k.shape[2] - q.shape[2])
    distance = positions - key_positions  # [Tq, keys]
    if visibility.causal:  # which hides keys at negative distances
        scores = scores - raised(left)[..., None, None] * distance
    else:
        left, right = raised(left)[..., None, None], raised(right)[..., None, None]
        scores = scores - left * distance.clamp(min=0) - right * (-distance).clamp(min=0)
    if q.shape[2] > 1 or not visibility.causal or visibility.hides_past:  # a single query stands at the last key
        scores = scores.masked_fill(_hidden(positions, key_positions[None], visibility), float("-inf"))
    return scores.logsumexp(dim=-1)


def _earlier_lse(
    q: Tensor, k: Tensor, slope: Tensor, centre: Tensor | None, scale: float, visibility: Visibility
) -> Tensor:
    """Lower bound of the LSE over the visible keys in the links before each query's own: (B, H, Tq), -inf for none.

    By Jensen log sum_j w_j e^(x_j) >= log W + sum_j w_j x_j / W with W = sum_j w_j, so that one mean of keys serves all
    queries of a link. w_j = e^(-m d_j) by the distance d_j to the end of the link before, the rest of it follows.
    """
    query_length, offset = q.shape[2], k.shape[2] - q.shape[2]
    first, past = offset // LINK, -(-k.shape[2] // LINK)  # the links that hold queries
    means, log_weights = _means_of_earlier_keys(k, slope, first, past, visibility)  # [B, H, links, D], [B, H, links]
    if centre is not None:
        means = means - per_query_head(centre, q.shape[1])
    front = offset - first * LINK
    parts = []
    for links in chunks(past - first, q.shape[0] * q.shape[1] * LINK * q.shape[3], q.device):
        rows = _padded(q, links.start * LINK - front, links.stop * LINK - front).to(means.dtype)
        parts.append((rows.unflatten(2, (-1, LINK)) * means[:, :, links, None]).sum(dim=-1))
    from_end = torch.arange(1, LINK + 1, device=q.device)
    lse = torch.cat(parts, dim=2) * scale + (log_weights[..., None] - slope[..., None, None] * from_end)
    lse = lse.flatten(2)[:, :, front : front + query_length]
    if visibility.document is not None:
        own_link = torch.arange(offset, k.shape[2], device=q.device) // LINK
        foreign = visibility.document[offset:] != visibility.document[(own_link * LINK - 1).clamp(min=0)]
        lse = lse.masked_fill(foreign, float("-inf"))
    return lse


def _means_of_earlier_keys(
    k: Tensor, slope: Tensor, first: int, past: int, visibility: Visibility
) -> tuple[Tensor, Tensor]:
    """For links [first, past) the mean (B, H, links, D), so weighted, of the visible keys before each, and log W.

    At most CHAIN links are looked back on. Padding has weight 0, and so have other documents than the last key's.
    """
    oldest = max(first - CHAIN, 0)
    keys = k[:, :, oldest * LINK : (past - 1) * LINK].unflatten(2, (-1, LINK))  # [B, Hkv, links, LINK, D]
    index = torch.arange(oldest * LINK, (past - 1) * LINK, device=k.device).unflatten(0, (-1, LINK))  # [links, LINK]
    visible = torch.ones_like(index, dtype=torch.bool)[None]  # [B or 1, links, LINK]
    steps = [2**n for n in range(CHAIN.bit_length() - 1)]
    if visibility.window_size is not None:
        visible = visible & (visibility.window_size >= 2 * LINK)
        steps = [step for step in steps if (2 * step + 1) * LINK <= visibility.window_size]
    if visibility.key_padding_mask is not None:
        visible = visible & ~visibility.key_padding_mask[:, index]
        keys = keys.masked_fill(visibility.key_padding_mask[:, index][:, None, ..., None], 0.0)
    if visibility.document is not None:
        last = visibility.document[index[:, -1]]  # [links]
        visible = visible & (visibility.document[index] == last[:, None])

    to_end = torch.arange(LINK - 1, -1, -1, device=k.device)
    weights = (-slope[..., None] * to_end).exp()[:, :, None] * visible[:, None]  # [B, H, links, LINK]
    by_group = weights.unflatten(1, (k.shape[1], -1)).transpose(2, 3)  # [B, Hkv, links, G, LINK]
    stretches = chunks(keys.shape[2], keys.shape[0] * keys.shape[1] * LINK * keys.shape[4], k.device)
    parts = [by_group[:, :, links] @ keys[:, :, links].to(slope.dtype) for links in stretches]
    sums = torch.cat([slope.new_empty(*by_group.shape[:2], 0, by_group.shape[3], k.shape[3]), *parts], dim=2)
    sums = torch.cat([sums.transpose(2, 3).flatten(1, 2), weights.sum(dim=-1, keepdim=True)], dim=-1)
    for step in steps:  # each doubles the number of links that a sum covers
        before = sums[:, :, :-step] * (-slope[..., None, None] * (LINK * step)).exp()
        if visibility.document is not None:
            before = before * (last[:-step] == last[step:])[:, None]
        sums[:, :, step:] = sums[:, :, step:] + before
    sums = _padded(sums, first - 1 - oldest, past - 1 - oldest)  # [B, H, past - first, D + 1], the last column being W
    total = sums[..., -1]
    return sums[..., :-1] / total.clamp(min=torch.finfo(slope.dtype).tiny)[..., None], total.log()


def _products(q: Tensor, k: Tensor, centre: Tensor | None) -> Tensor:
    """q . (k - centre) for each query (B, H, Tq, D) and its own key (B, Hkv, Tq, D): (B, H, Tq)."""
    dtype = torch.promote_types(q.dtype, torch.float32)
    parts = []
    for rows in chunks(q.shape[2], q.shape[0] * q.shape[1] * q.shape[3], q.device):
        keys = k[:, :, rows].to(dtype)
        keys = per_query_head(keys if centre is None else keys - centre, q.shape[1])
        parts.append((q[:, :, rows] * keys).sum(dim=-1))
    return torch.cat(parts, dim=2)


def _padded(x: Tensor, first: int, past: int) -> Tensor:
    """x[:, :, first:past], with zeros where that lies outside of x (B, H, T, D)."""
    length = x.shape[2]
    low, high = min(max(first, 0), length), min(max(past, 0), length)
    inside = x[:, :, low:high]
    if high - low == past - first:
        return inside
    before = min(max(-first, 0), past - first)
    return F.pad(inside, (0, 0, before, past - first - before - (high - low)))


def _nearest_visible(positions: Tensor, key_length: int, key_padding_mask: Tensor | None, *, past: bool) -> Tensor:
    """The nearest key that is no padding at or before each position (at or after it): (B or 1, Tq).

    Outside [0, Tk) where there is none.
    """
    if key_padding_mask is None:
        return positions.clamp(max=key_length - 1)[None] if past else positions.clamp(min=0)[None]
    index = torch.arange(key_length, device=positions.device)
    if past:
        nearest = torch.where(key_padding_mask, -1, index).cummax(dim=-1).values  # [B, Tk]
        found = nearest[:, positions.clamp(0, key_length - 1)]
        return torch.where(positions < 0, -1, found)
    nearest = torch.where(key_padding_mask, key_length, index).flip(-1).cummin(dim=-1).values.flip(-1)
    found = nearest[:, positions.clamp(0, key_length - 1)]
    return torch.where(positions >= key_length, key_length, found)


def _hidden(positions: Tensor, keys: Tensor, visibility: Visibility, *, padding: bool = True) -> Tensor:
    """Whether each key is hidden from each query, or is none: (B or 1, 1, ...) of broadcast positions."""
    index = keys.clamp(0, visibility.key_length - 1)
    hidden = keys != index
    near = visibility.near(positions, index)
    if near is not None:
        hidden = hidden | ~near
    hidden = hidden[None, None]
    if padding and visibility.key_padding_mask is not None:
        hidden = hidden | visibility.key_padding_mask[:, None, index]
    return hidden


def chunks(length: int, width: int, device: torch.device) -> Iterator[slice]:
    """Slices of `length` rows of `width` numbers each, so that memory stays bounded, and on the CPU in the cache."""
    budget = 2**17 if device.type == "cpu" else 2**26
    step = max(1, budget // max(width, 1))
    for start in range(0, length, step):
        yield slice(start, min(start + step, length))


def per_query_head(x: Tensor, num_heads: int) -> Tensor:
    """(B, Hkv, ...) to (B, H, ...)."""
    return x.repeat_interleave(num_heads // x.shape[1], dim=1) if x.shape[1] != num_heads else x
