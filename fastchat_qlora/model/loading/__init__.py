"""A model path -> configuration, tokenizer, base model with plain or quantized weights.

Start with base_model.load_model.
"""
