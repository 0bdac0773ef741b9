"""Attention as functions of tensors. Imports torch alone."""
