"""Pretrained ALiBi models of Hugging Face made exact, fast and longer: `longreach.extend`, `longreach.restore`.

The folder is named after what `extend` attaches to a model: a module `longreach.extend` would take the place of the
function `longreach.extend` as soon as anything imported it. Supported is transformers from 5.4 on; nothing here
imports it before a model is there.
"""
