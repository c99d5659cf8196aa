"""Flags and a base model's files -> its weights in 4 or 8 bits, or dequantized, and how many of them are.

Start with base_quantization.choose_base_quantization.
"""
