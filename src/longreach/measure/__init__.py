"""How well a model predicts text, at any length. A model is seen here only as `logits(tokens)`."""
