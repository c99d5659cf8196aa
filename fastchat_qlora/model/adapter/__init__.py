"""LoRA arguments or an adapter's folder -> an adapter on a base model.

Start with lora.attach_adapter.
"""
