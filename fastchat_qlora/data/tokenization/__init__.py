"""Raw records -> tokenized sequences in a cache.

Start with build.build_sequences and preprocess.Preprocessor.
"""
