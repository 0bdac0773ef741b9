# %% [markdown]
# # Does my model use its context?
#
# A model was trained on short sequences, reads long ones, and its perplexity falls. Has it read the long context? Not
# necessarily: longer windows also leave fewer tokens near the start of a window, where there is little to see, and
# those are the hard ones (the *early token curse*). Here are four looks at the same models, each harder to be fooled
# by than the last.
#
# This page is a notebook, `docs/context.py`, and what `python docs/notebook.py` made of it, run on what `make demo`
# leaves in `runs/demo`. Any folder of `longreach compare`, and of `longreach evaluate --task perplexity,positions`,
# does.

# %%
import math
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from longreach.data.tokenizer import load_tokenizer
from longreach.models.files import load_model
from longreach.results import Results, over_seeds

FOLDER = Path("runs/demo")
results = Results.read(FOLDER / "results.json")
train_length = min(results.train_lengths())
lengths = results.valid_lengths(train_length)
methods = results.methods(train_length)
print(f"trained at {train_length} tokens, tested at {', '.join(map(str, lengths))}: {', '.join(methods)}")
for training in results.training:
    size, tokens = training.parameters, training.tokens
    print(f"{training.method:>12}: {size:,} parameters, {tokens:,} tokens in {training.steps} steps")

# %% [markdown]
# ## 1. Perplexity against length: needed, and not enough
#
# Every length scores the same tokens. A method whose perplexity rises does not even bear the longer input. One whose
# perplexity falls may or may not have used it.

# %%
print("".join(f"{word:>12}" for word in ("", *lengths)))
for method in methods:
    figures = []
    for length in lengths:
        wanted = (method, train_length, length, "nonoverlapping")
        losses = [r.loss for r in results.records if (r.method, r.train_length, r.valid_length, r.protocol) == wanted]
        figures.append(f"{over_seeds(losses).exponentiated().mean:12.2f}" if losses else f"{'-':>12}")
    print(f"{method:>12}" + "".join(figures))

# %% [markdown]
# ## 2. The gain, split in two
#
# Give each token the context of the long window, but never more than the training length of it: what is gained by
# that is **relief** from the early token curse. What the rest of the window adds is **beyond**. The two sum to the
# gain, in nats per token ([the algebra](evaluation.md)). A model uses long context where *beyond* is above 0,
# interval and all.

# %%
longest = max(lengths)
for method in methods:
    splits = [s for s in results.decompositions if (s.method, s.valid_length) == (method, longest)]
    if splits:
        gain, relief, beyond = (
            over_seeds([getattr(s, part) for s in splits]).mean for part in ("gain", "relief", "beyond")
        )
        low, high = splits[0].beyond_low, splits[0].beyond_high
        interval = "" if low is None else f", 95% interval at its first seed {low:+.3f} to {high:+.3f}"
        print(f"{method:>12}: gain {gain:+.3f} = relief {relief:+.3f} + beyond {beyond:+.3f}{interval}")

# %% [markdown]
# ## 3. Loss by context
#
# The same scores by how many tokens a token could see. Up to the training length (dotted) all models learn from more
# context. To the right of it the line of a model that uses long context goes on falling, that of one that merely
# bears it lies flat, and that of one that does not rises.

# %%
figure, axes = plt.subplots(figsize=(7.5, 3.6), layout="constrained")
for method in methods:
    bins = [r for r in results.contexts if (r.method, r.valid_length) == (method, longest)]
    starts = sorted({r.first_context for r in bins})
    losses = [over_seeds([r.loss for r in bins if r.first_context == start]).mean for start in starts]
    axes.plot(starts, losses, marker="o", markersize=3, label=method)
axes.axvline(train_length, color="gray", linestyle=":")
axes.set(xscale="log", xlabel="tokens of context", ylabel="loss, nats per token")
axes.legend(frameon=False)

# %% [markdown]
# ## 4. By hand
#
# No record needed: take tokens far into a text, let the model predict each of them from its last 16, 32, 64, ...
# tokens, and look at the same tokens every time. The text is that of PyTorch's modules, which no model of the demo has
# seen.

# %%
paths = sorted(Path(torch.nn.__file__).with_name("modules").glob("*.py"))
text = "".join(path.read_text(encoding="utf-8") for path in paths)
TARGETS = 96


@torch.no_grad()
def losses_by_context(folder: Path, contexts: list[int]) -> torch.Tensor:
    """Loss of TARGETS tokens of the text, each predicted from that many tokens before it: (contexts, TARGETS)."""
    model, tokenizer = load_model(folder), load_tokenizer(folder / "tokenizer.json")
    tokens = torch.tensor(tokenizer.encode(text))
    ends = torch.linspace(max(contexts), len(tokens) - 1, TARGETS).long()
    rows = []
    for context in contexts:
        windows = torch.stack([tokens[end - context : end] for end in ends])
        logits = torch.cat([last for part in windows.split(4) for last in model.logits(part, last=1)])[:, -1]
        rows.append(torch.nn.functional.cross_entropy(logits, tokens[ends], reduction="none"))
    return torch.stack(rows)


contexts = sorted({max(1, train_length >> 3), train_length, *lengths})
print(f"{'context':>42}" + "".join(f"{context:>9}" for context in contexts))
folders = sorted(path.parent for path in FOLDER.glob("*/model.safetensors"))
for method in methods:
    folder = next(folder for folder in folders if load_model(folder).config.method == method)
    try:
        losses = losses_by_context(folder, contexts)
    except ValueError as error:
        print(f"{method:>12}: {error}")
        continue
    difference = losses - losses[contexts.index(train_length)]
    error = difference.std(dim=1) / math.sqrt(TARGETS)
    print(f"{method:>12} {'loss, nats per token':<29}" + "".join(f"{loss:9.3f}" for loss in losses.mean(dim=1)))
    print(
        f"{'':>12} {'minus that at training length':<29}" + "".join(f"{mean:+9.3f}" for mean in difference.mean(dim=1))
    )
    print(f"{'':>12} {'its standard error':<29}" + "".join(f"{value:9.3f}" for value in error))

# %% [markdown]
# ## And yours
#
# ```sh
# longreach evaluate MODEL --task perplexity,positions --data "books/*.txt" --lengths 2048,4096,8192 --output runs/mine
# ```
#
# MODEL is a run of longreach or a Hugging Face model, on disk or by name. The report says what sections 2 and 3 say
# here, with intervals; `--task retrieval` asks more directly still, for one fact far back ([every figure
# defined](evaluation.md)). Where *beyond* is not above 0, a window of the training length with its cache bounded
# gives the same quality for less.
