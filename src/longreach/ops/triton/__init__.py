"""Attention on the GPU in Triton."""
