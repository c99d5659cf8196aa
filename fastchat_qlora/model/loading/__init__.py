"""A model path -> configuration, tokenizer, base model, and which of its parts text passes.

Start with base_model.load_model.
"""
