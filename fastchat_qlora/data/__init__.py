"""Files and hub datasets -> datasets of input_ids and labels.

Start with dataset.load_dataset.
"""
