"""A base model's files and an adapter -> the tensors and files of a merged model.

Start with layerwise.LayerwiseMerge.
"""
