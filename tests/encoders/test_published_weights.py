"""Published weights, where the hub can be reached: they give what text-embeddings-inference prints of a question."""

import socket
from urllib.parse import urlsplit

import huggingface_hub.constants
import pytest
import torch

import longreach
from longreach.encoders.encode import texts_of

QUESTION = "What is Deep Learning?"

PRINTED = {
    "jinaai/jina-embeddings-v2-small-en": (-0.7366036, -0.34022003),
    "jinaai/jina-embeddings-v2-base-code": (-0.15109017, -0.021903912),
}
"""How the mean vector begins, by backends/candle/tests/snapshots of huggingface/text-embeddings-inference."""

SCORES = {"jinaai/jina-reranker-v1-tiny-en": (-0.6045344, -0.9144413)}
"""The logit of the question alone: one of two, for that snapshot was written anew once."""

ALLOWED = 1e-3
"""Both sides compute in float32 from weights of half precision, through up to 12 layers."""


@pytest.fixture(scope="module")
def load():
    """`load_encoder` as outside of tests, which are kept from the hub; skips where none gives the files."""
    endpoint = urlsplit(huggingface_hub.constants.ENDPOINT)
    try:
        socket.create_connection((endpoint.hostname, endpoint.port or 443), timeout=2).close()
    except OSError as error:
        pytest.skip(f"the hub at {endpoint.hostname} cannot be reached: {error}")

    def load(name, **options):
        try:
            return longreach.load_encoder(name, **options)
        except ValueError as error:
            if "to be had from the Hugging Face hub" not in str(error):
                raise
            pytest.skip(str(error))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
        yield load


@pytest.mark.parametrize("name", PRINTED)
def test_vectors_are_those_that_others_print(load, name):
    vector = load(name).encode([QUESTION])[0]
    torch.testing.assert_close(vector[:2], torch.tensor(PRINTED[name]), rtol=0, atol=ALLOWED)


@pytest.mark.parametrize("name", SCORES)
def test_scores_are_those_that_others_print(load, name):
    model = load(name, head="classification")
    ids = texts_of(model.base_model).tokenizer.encode(QUESTION).ids
    with torch.no_grad():
        score = model(torch.tensor([ids])).logits.item()
    assert min(abs(score - printed) for printed in SCORES[name]) < ALLOWED
