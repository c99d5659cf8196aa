"""A model without weights -> memory and floating-point operations of a run.

Start with memory.measure_model_cost.
"""
