"""Gradients where checkpointing computes layers anew in the backward pass."""

import threading
from contextlib import nullcontext

import pytest
import torch
from family_models import FAMILIES, bloom, tokens
from torch.utils.checkpoint import checkpoint

import longreach
from longreach.pretrained.attend import extension_of, fixed_length

pytestmark = pytest.mark.filterwarnings("ignore:.*will be removed in v6:FutureWarning")

IDS = tokens(2, 20)
MASK = torch.ones_like(IDS)
MASK[0, :5] = 0


def gradients(model, length, *, begin_backward=lambda backward: backward(), **options):
    """Of a loss that was computed under an L', or under the input's own where it is None."""
    model.zero_grad()
    with nullcontext() if length is None else fixed_length(model, length):
        loss = model(IDS, labels=IDS, use_cache=False, **{"attention_mask": MASK, **options}).loss
    begin_backward(loss.backward)
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def require_equal(model, found, expected):
    assert extension_of(model).calls == {}
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=0, atol=1e-12)


def checkpointed(model, reentrant):
    model.train()  # no dropout in these configurations
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": reentrant})
    if reentrant:
        model.enable_input_require_grads()
    return model


def in_a_thread(backward):
    """As on a GPU, where the backward pass runs in a thread of autograd's own."""
    thread = threading.Thread(target=backward)
    thread.start()
    thread.join()


@pytest.mark.parametrize("scaling", ["linear", "ntk", "none+logn"])
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_length_of_the_forward_pass_holds_wherever_backward_runs(model, scaling, reentrant):
    model = longreach.extend(model.double(), scaling=scaling, train_length=16)
    expected = {length: gradients(model, length) for length in (None, 64)}
    checkpointed(model, reentrant)

    def under_another_length(backward):
        with fixed_length(model, 256):
            backward()

    for length in (None, 64):
        for begin in (lambda backward: backward(), under_another_length, in_a_thread):
            require_equal(model, gradients(model, length, begin_backward=begin), expected[length])


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("reentrant", [True, False])
def test_the_padding_and_the_documents_are_seen_again(model, packed, reentrant):
    """After other inputs went through the model."""
    model = longreach.extend(model.double(), scaling="linear", train_length=8)
    positions = torch.cat([torch.arange(13), torch.arange(7)]).expand(2, -1)
    options = {"attention_mask": None, "position_ids": positions} if packed else {}
    expected = gradients(model, None, **options)
    checkpointed(model, reentrant)

    def after_another_input(backward):
        model(tokens(1, 25, seed=3), use_cache=False)
        backward()

    require_equal(model, gradients(model, None, begin_backward=after_another_input, **options), expected)


@pytest.mark.parametrize("reentrant", [True, False])
def test_what_begins_at_the_whole_model_is_right_or_raises(reentrant):
    """A checkpoint around all of it says nothing of the forward pass that it stands for."""
    model = longreach.extend(bloom().double(), scaling="linear", train_length=8)
    table = model.get_input_embeddings().weight
    embeddings = table[IDS].detach().requires_grad_()

    def loss(**options):
        return checkpoint(lambda x: model(inputs_embeds=x).logits.square().mean(), embeddings, **options)

    (expected,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.square().mean(), embeddings)
    loss(use_reentrant=reentrant).backward()
    torch.testing.assert_close(embeddings.grad, expected, rtol=0, atol=1e-12)
    with fixed_length(model, 64):
        under_64 = loss(use_reentrant=reentrant)
    with pytest.raises(ValueError, match=r"backward\(\) computes layers anew, whose length L' is not known"):
        under_64.backward()
    longreach.extend(model, scaling="linear", train_length=8, length=64)
    embeddings.grad = None
    loss(use_reentrant=reentrant).backward()
    (expected,) = torch.autograd.grad(model(inputs_embeds=embeddings).logits.square().mean(), embeddings)
    torch.testing.assert_close(embeddings.grad, expected, rtol=0, atol=1e-12)


def test_a_forward_pass_within_a_backward_pass_has_the_length_stated_there():
    model = longreach.extend(bloom().double(), scaling="linear", train_length=8)
    with torch.no_grad(), fixed_length(model, 64):
        expected = model(IDS).logits
    found = []

    class Within(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, gradient):
            with fixed_length(model, 64), torch.no_grad():
                found.append(model(IDS).logits)
            return gradient

    Within.apply(torch.ones(1, requires_grad=True)).sum().backward()
    assert torch.equal(found[0], expected)


@pytest.mark.parametrize("family", FAMILIES)
def test_restore_leaves_the_blocks_as_they_were(family):
    model = FAMILIES[family]()
    before = [type(module) for module in model.modules()]
    longreach.restore(longreach.extend(model, scaling="linear", train_length=8))
    assert [type(module) for module in model.modules()] == before
