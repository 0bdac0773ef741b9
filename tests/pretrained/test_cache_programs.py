"""Random programs over a cache: whatever is done to it, logits are those of the stock code, or of recomputation."""

import copy
import pickle
from contextlib import nullcontext
from dataclasses import dataclass, replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from family_models import in_float64
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache

import longreach
from longreach.pretrained.attend import fixed_length
from longreach.pretrained.caches import growing_cache

VOCABULARY = 97
LONGEST = 160  # no program gets there
# Falcon rounds slopes and positions to bfloat16, and divides both by sqrt(D): of 4 heads of 16 channels all are exact.
SHAPES = {
    "bloom": {"hidden_size": 64, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 64, "n_layers": 2, "n_heads": 4, "max_seq_len": LONGEST},
    "falcon": {
        "hidden_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "alibi": True,
        "multi_query": False,
        "new_decoder_architecture": False,
    },
    "llama": {
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
    },
}


def stock_model(family):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(family, vocab_size=VOCABULARY, initializer_range=0.3, **SHAPES[family])
    return transformers.AutoModelForCausalLM.from_config(config).double().eval()


MODES = {"gradients": torch.enable_grad, "no gradients": torch.no_grad, "inference": torch.inference_mode}
ROWS = st.lists(st.integers(0, 3), min_size=1, max_size=4)
STEP = st.one_of(
    st.tuples(st.just("read"), st.integers(1, 9)),
    st.tuples(st.just("hold"), st.integers(1, 9)),  # and read on
    st.tuples(st.just("hold"), st.just(1)),
    st.tuples(st.just("crop"), st.integers(1, 6)),
    st.tuples(st.just("reorder"), ROWS),  # a beam may go on in several, and others end
    st.tuples(st.just("select"), ROWS),
    st.tuples(st.just("repeat"), st.integers(2, 3)),
    st.tuples(st.just("branch"), st.booleans()),
    st.tuples(st.just("pickle"), st.none()),
    st.tuples(st.just("switch"), st.integers(0, 3)),
    st.tuples(st.just("mode"), st.sampled_from(sorted(MODES))),
)
PROGRAMS = {
    "padding": st.tuples(st.integers(0, 3), st.integers(0, 3)),
    "steps": st.lists(STEP, min_size=6, max_size=14),
}


@dataclass
class Branch:
    """Caches that were filled alike, and what is in them."""

    caches: list
    ids: torch.Tensor
    mask: torch.Tensor


class Machine:
    """Runs a program with several readers, each (model, makes a cache, context that it runs in)."""

    def __init__(self, readers, padding):
        self.readers = readers
        mask = torch.ones(2, 4, dtype=torch.long)
        for row, count in enumerate(padding):
            mask[row, :count] = 0
        self.generator = torch.Generator().manual_seed(1)
        self.modes, self.held, self.losses = torch.no_grad, [], []
        self.branches = [Branch([cache() for _, cache, _ in readers], torch.empty(2, 0, dtype=torch.long), mask)]
        self.read(4)

    @property
    def here(self):
        return self.branches[0]

    def run(self, steps):
        for name, argument in [*steps, ("read", 3)]:
            with self.modes():
                getattr(self, name)(argument)
            for tensors, before in self.held:
                assert all(torch.equal(x, y) for x, y in zip(tensors, before, strict=True))

    def gradients(self):
        """Of the embeddings, for each reader, of all that was read with gradients."""
        for (model, _, context), losses in zip(self.readers, zip(*self.losses, strict=True), strict=True):
            with context():
                yield torch.autograd.grad(sum(losses), model.get_input_embeddings().weight)[0]

    def read(self, count):
        new = torch.randint(1, VOCABULARY, (len(self.here.mask), count), generator=self.generator)
        self.here.ids = torch.cat((self.here.ids, new), dim=1)
        more = self.here.ids.shape[1] - self.here.mask.shape[1]
        self.here.mask = F.pad(self.here.mask, (0, more), value=1)
        told = self.here.mask if not self.here.mask.all() else None
        seen = self.here.mask[:, -count:].bool()
        logits = []
        for (model, _, context), cache in zip(self.readers, self.here.caches, strict=True):
            with context():
                read = self.here.ids if cache is None else new
                out = model(read, attention_mask=told, past_key_values=cache, use_cache=cache is not None).logits
            logits.append(out[:, -count:][seen])
        if logits[0].requires_grad:
            self.losses.append([x.square().mean() for x in logits])
        for other in logits[1:]:
            torch.testing.assert_close(other, logits[0], rtol=0, atol=1e-10)
            assert other.requires_grad == logits[0].requires_grad

    def change(self, method, *arguments):
        for cache in self.here.caches:
            if cache is not None:
                getattr(cache, method)(*arguments)

    def crop(self, count):
        count = min(count, self.here.ids.shape[1] - 4)  # 4 of which some are padding
        if count:  # by 0, older versions of transformers crop all
            self.change("crop", -count)
            self.here.ids, self.here.mask = (x[:, : x.shape[1] - count] for x in (self.here.ids, self.here.mask))

    def pick(self, method, rows):
        rows = torch.tensor([row % len(self.here.ids) for row in rows])
        self.change(method, rows)
        self.here.ids, self.here.mask = self.here.ids[rows], self.here.mask[rows]

    def reorder(self, rows):
        self.pick("reorder_cache", rows)

    def select(self, rows):
        self.pick("batch_select_indices", rows)

    def repeat(self, count):
        if len(self.here.ids) * count <= 6:
            self.change("batch_repeat_interleave", count)
            self.here.ids, self.here.mask = (x.repeat_interleave(count, dim=0) for x in (self.here.ids, self.here.mask))

    def hold(self, count):
        for cache in self.here.caches:
            tensors = [x for layer in (() if cache is None else cache.layers) for x in (layer.keys, layer.values)]
            self.held.append((tensors, [x.detach().clone() for x in tensors]))
        self.read(count)

    def branch(self, from_tensors):
        def taken(cache):
            if cache is None or not from_tensors:
                return pickle.loads(pickle.dumps(cache))
            return DynamicCache([(layer.keys, layer.values) for layer in cache.layers])

        self.branches.insert(0, replace(self.here, caches=[taken(cache) for cache in self.here.caches]))

    def pickle(self, _):
        self.here.caches = pickle.loads(pickle.dumps(self.here.caches))

    def switch(self, number):
        self.branches.insert(0, self.branches.pop(number % len(self.branches)))

    def mode(self, name):
        self.modes = MODES[name]


@pytest.mark.parametrize("family", SHAPES)
def test_it_reads_as_the_stock_code_does(family):
    """A converted model has no stock code: there its cache is beside the stock one."""
    model = stock_model(family)
    if family == "llama":
        longreach.convert(model)
        readers = [(model, DynamicCache, nullcontext), (model, growing_cache, nullcontext)]
    else:
        extended = longreach.extend(copy.deepcopy(model), scaling="none")
        readers = [(model, DynamicCache, in_float64), (extended, growing_cache, nullcontext)]

    @settings(max_examples=40)
    @given(**PROGRAMS)
    def check(padding, steps):
        machine = Machine(readers, padding)
        machine.run(steps)
        torch.testing.assert_close(*machine.gradients(), rtol=0, atol=1e-10)

    check()


@pytest.mark.parametrize("scaling", ["linear", "ntk+logn"])
@pytest.mark.parametrize("family", SHAPES)
def test_under_a_stated_length_it_reads_as_recomputation_does(family, scaling):
    change = longreach.convert if family == "llama" else longreach.extend
    model = change(stock_model(family), scaling=scaling, train_length=8)
    readers = [(model, lambda: None, nullcontext), (model, growing_cache, nullcontext)]

    @settings(max_examples=20)
    @given(**PROGRAMS)
    def check(padding, steps):
        with fixed_length(model, LONGEST):
            Machine(readers, padding).run(steps)

    check()
