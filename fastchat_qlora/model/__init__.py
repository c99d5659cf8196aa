"""A model path and adapter settings -> a trainable model, its cost, merged weights.

Start with loading.base_model.load_model and adapter.lora.attach_adapter.
"""
