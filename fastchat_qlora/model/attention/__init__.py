"""A packed sequence -> attention and recurrent layers that keep its conversations apart, and the check that they do.

Start with attention.choose_attention.
"""
