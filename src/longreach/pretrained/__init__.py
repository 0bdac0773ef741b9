"""Pretrained ALiBi models of Hugging Face made exact, fast and longer: `longreach.extend`, `longreach.restore`.

Supported is transformers from 5.4 on; nothing here imports it before a model is there.
"""
