import pytest

from longreach.data.corpora import Corpus, Document
from longreach.data.tokenizer import Tokenizer, train_tokenizer

PROSE = (
    "It was the best of times, it was the worst of times; we don't know 12345 of them.\n\n"
    "def f(x):\n\treturn x  # naïve café, 日本語のテキスト、 Привет мир 🙂🙃\r\n"
)


@pytest.fixture(scope="session")
def tokenizer() -> Tokenizer:
    return train_tokenizer([PROSE] * 4, vocab_size=400)


@pytest.fixture(scope="session")
def corpus_of():
    """A corpus made from texts; each text is a document in one piece."""

    def make(*texts: str) -> Corpus:
        return Corpus("test", lambda: (Document(str(i), iter([text] if text else [])) for i, text in enumerate(texts)))

    return make
