"""Text in, memory-mapped tokens out: corpora, tokenizers, token stores and training batches."""
