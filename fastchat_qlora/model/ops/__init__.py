"""Layers, experts and losses of a frozen base model that save memory, and forward passes without values.

Start with chunked_loss.LossHead and experts.compute_experts.
"""
