"""One page on a pretrained ALiBi encoder: what stock loading makes of its files, how far its heads see: `doctor`."""

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from rich.console import Console
from rich.text import Text
from torch import Tensor

from longreach.data.corpora import Corpus
from longreach.data.prepare import naming
from longreach.encoders.config import LAYOUT
from longreach.encoders.encode import tokenize
from longreach.encoders.load import load_encoder
from longreach.encoders.loading import HEADS
from longreach.encoders.packing import Heads, Packed, split_heads
from longreach.encoders.source import Source
from longreach.foreign import first_line
from longreach.ops.alibi import alibi_slopes
from longreach.ops.reach import default_tolerance, reach
from longreach.pretrained.diagnosis import BLOCK, HeadReach, Progress
from longreach.pretrained.quiet import quiet_transformers
from longreach.report.grid import format_memory, format_percent
from longreach.train.loop import resolve_device
from longreach.verbs.doctor import SEED, DoctorConfig, reach_grid, show
from longreach.verbs.embed import beginning, check_length_is_heeded
from longreach.verbs.open import named_dtype


@dataclass(frozen=True)
class StockLoading:
    """What transformers makes of the files without the code that came with them."""

    refusal: str = ""
    """What it raises, if it does."""
    left_random: tuple[str, ...] = ()
    """Weights of its BERT that no file has: random from load to load. Layers are counted once, as `*`."""
    unread: tuple[str, ...] = ()
    """Weights of the files that it has no place for, likewise."""
    random_share: float = 0.0
    """Numbers that are random, as a share of all in its model."""


@dataclass(frozen=True)
class EncoderCheckup:
    """All that the page says."""

    model: str
    summary: str
    """Layout, size and kind in one line."""
    stock: StockLoading
    heads: tuple[HeadReach, ...]
    """How far its heads see, either way."""
    length: int
    """Of the text that this was measured on, in tokens."""
    tolerance: float
    """Probability mass per token that the reach may leave out."""
    source: str
    """The text, in words."""


def examine(config: DoctorConfig, progress: Progress = lambda stage, done, total: None) -> EncoderCheckup:
    """Load an encoder and find out what the page says.

    Raises:
        ValueError: its files are not whole, or the text is shorter than the longest length.
    """
    for name, default in (("max_memory", DoctorConfig.max_memory), ("trust_remote_code", False)):
        if (value := getattr(config, name)) != default:
            raise ValueError(
                f"{name}={value}: it is for decoders, whose own code is run, not for encoders; leave it out"
            )
    if len(config.valid_lengths) > 1:
        lengths = ",".join(map(str, config.valid_lengths))
        raise ValueError(f"valid_lengths={lengths}: an encoder is examined at one length; give the longest alone")
    dtype = named_dtype(config.dtype)
    device = resolve_device(config.device)
    progress("loading", 0, None)
    model = load_encoder(config.model, train_length=config.train_length, dtype=dtype, device=device)
    check_length_is_heeded(config.train_length, model.sizes.scaling)
    sizes = model.sizes
    longest = max(config.valid_lengths or (sizes.longest,))
    with naming("text"):
        ids = _tokens(model, None if config.text is None else config.corpus(), longest)
    progress("measuring reach", 0, None)
    table = format_memory(4 * sizes.num_attention_heads * longest**2)
    summary = (
        f"{getattr(model.config, LAYOUT)} layout, {sizes.num_attention_heads} heads, {sizes.num_hidden_layers} layers, "
        f"{str(model.dtype).removeprefix('torch.')}; its own code keeps {table} of biases for "
        f"{longest:,} tokens"
    )
    return EncoderCheckup(
        model=config.model,
        summary=summary,
        stock=_stock_loading(model.source),
        heads=_head_reach(model, ids.to(device)),
        length=longest,
        tolerance=default_tolerance(model.dtype),
        source="random tokens" if config.text is None else config.text,
    )


def _tokens(model: Any, corpus: Corpus | None, count: int) -> Tensor:
    """Ids (count,) of a text, or at random."""
    if corpus is None:
        return torch.randint(model.sizes.vocab_size, (count,), generator=torch.Generator().manual_seed(SEED))
    ids: list[int] = []
    for document in corpus:
        text = beginning(model, document, count, special=False)
        ids += tokenize(model, [text], length=count, special=False)[0]
        if len(ids) >= count:
            return torch.tensor(ids[:count])
    raise ValueError(f"{corpus.name!r} has {len(ids):,} tokens, the lengths need {count:,}: give more, or shorter ones")


def _stock_loading(source: Source) -> StockLoading:
    """Compare the weights of the files with those of the model that transformers makes of their configuration."""
    from transformers import AutoConfig, AutoModel

    try:
        with quiet_transformers():
            config = AutoConfig.from_pretrained(source.name, trust_remote_code=False)
            with torch.device("meta"):
                stock = AutoModel.from_config(config, trust_remote_code=False)
    except Exception as error:  # whatever it makes of a stranger's file
        return StockLoading(refusal=first_line(error))
    files, shapes = source.weights(), {name: x.shape for name, x in stock.state_dict().items()}
    lost = [name for name, shape in shapes.items() if name not in files or files[name].shape != shape]
    total = sum(shape.numel() for shape in shapes.values())
    return StockLoading(
        left_random=_by_layer(lost),
        unread=_by_layer(name for name in files if name not in shapes and not name.startswith(HEADS)),
        random_share=sum(shapes[name].numel() for name in lost) / total,
    )


def _by_layer(names: Iterable[str]) -> tuple[str, ...]:
    """Names with `*` for the number of a layer, each once, in their order."""
    return tuple(dict.fromkeys(".".join("*" if part.isdigit() else part for part in name.split(".")) for name in names))


class _Heard(Packed):
    """One text, whose queries and keys are heard in each layer."""

    def __init__(self, length: int) -> None:
        super().__init__((length,))
        self.layers: list[tuple[list[int], list[float]]] = []

    def attend(self, q: Tensor, k: Tensor, v: Tensor, heads: Heads) -> Tensor:
        """As any text."""
        slopes = heads.scaling(alibi_slopes(heads.num_heads, device=q.device), len(q))
        rows, keys = (split_heads(x, 1, heads.num_heads) for x in (q, k))
        found = reach(rows, keys, slopes, causal=False, block_m=BLOCK, block_n=BLOCK)
        first = torch.arange(0, len(q), BLOCK, device=q.device)  # [NQ]
        past = (first + BLOCK).clamp(max=len(q))
        back, ahead = past - found.starts[0] * BLOCK, (found.ends[0] * BLOCK).clamp(max=len(q)) - first
        self.layers.append((torch.maximum(back, ahead).amax(dim=-1).tolist(), found.kept[0].tolist()))
        return super().attend(q, k, v, heads)


@torch.inference_mode()
def _head_reach(model: Any, ids: Tensor) -> tuple[HeadReach, ...]:
    """The reach of every head in every layer, on ids (T,)."""
    heard = _Heard(len(ids))
    if not model.encode_packed(ids, heard).isfinite().all():
        raise ValueError(f"its outputs in {model.dtype} are not all finite: mend its weights, or give another dtype")
    furthest, kept = (zip(*layers, strict=True) for layers in zip(*heard.layers, strict=True))
    slopes = alibi_slopes(model.sizes.num_attention_heads).tolist()
    return tuple(HeadReach(*head) for head in zip(slopes, furthest, kept, strict=True))


def print_checkup(checkup: EncoderCheckup, console: Console) -> None:
    """Print the page."""
    import transformers

    console.print(Text(checkup.model, style="bold"))
    console.print(Text(checkup.summary))
    console.print(Text(f"\nStock transformers {transformers.__version__}, without its code", style="bold"))
    console.print(Text("\n".join(_of_stock(checkup.stock))))
    show(console, reach_grid(checkup.heads, checkup.length, checkup.tolerance, checkup.source))
    console.print(Text(f'\nUse longreach.load_encoder("{checkup.model}"), or longreach.register_encoders() first.'))


def _of_stock(stock: StockLoading) -> list[str]:
    if stock.refusal:
        return [f"refuses it: {stock.refusal}"]
    if not stock.left_random:
        return ["has all weights"]
    lines = [f"loads a BERT without a word of which {format_percent(stock.random_share)} is random:"]
    for what, names in (("random", stock.left_random), ("unread", stock.unread)):
        more = f" and {len(names) - 4} more" if len(names) > 4 else ""
        lines += [f"  {what}: {', '.join(islice(names, 4))}{more}"] if names else []
    return lines
