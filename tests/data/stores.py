"""Tokens in memory as training reads them."""

import numpy as np

from longreach.data.tokens import TokenStore, TokenStream


def store_of(*documents: list[int]) -> TokenStore:
    offsets = np.cumsum([0, *map(len, documents)])
    return TokenStore(np.concatenate([np.array(document, dtype=np.uint16) for document in documents]), offsets)


def stream_of(*documents: list[int]) -> TokenStream:
    return TokenStream(store_of(*documents), range(len(documents)))
