"""Attention within conversations, and layers and losses that save memory.

Start with attention.choose_attention and chunked_loss.LossHead.
"""
