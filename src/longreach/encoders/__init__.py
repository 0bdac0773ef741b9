"""ALiBi encoders of our own, loaded from published files without the code that came with them.

JinaBERT v2, MosaicBERT, DNABERT-2 and what was trained from them: `longreach.load_encoder`, and
`longreach.register_encoders` for the Auto classes of transformers and for sentence-transformers.
"""
