"""The decoder that every position method is trained in, its cache and files."""
