"""Published folders that several files of tests open."""

import pytest
from published import Published, write


@pytest.fixture(scope="session")
def jina(tmp_path_factory):
    """A folder as of jina-embeddings-v2, whose vectors are normalised as those of -es are."""
    return write(Published("jina"), tmp_path_factory.mktemp("published") / "jina", pooling=("mean", True))


@pytest.fixture(scope="session")
def dnabert(tmp_path_factory):
    """As of DNABERT-2: pytorch_model.bin, a prefix, a language model's head, no model_type."""
    published = Published("mosaic", prefix="bert.", head="lm")
    return write(published, tmp_path_factory.mktemp("published") / "dnabert", bin_file=True)


@pytest.fixture(scope="session")
def reranker(tmp_path_factory):
    """As of jina-reranker-v1."""
    architectures = {"architectures": ["JinaBertForSequenceClassification"]}
    published = Published("jina", prefix="bert.", head="classifier", extra=architectures)
    return write(published, tmp_path_factory.mktemp("published") / "reranker")
