"""Sequences -> packed sequences -> batches of tensors.

Start with packing.PackingSampler and collator.Collator.
"""
