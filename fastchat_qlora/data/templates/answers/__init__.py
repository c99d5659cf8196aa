"""One answer in a chat template's text -> its prompt and its completion.

Start with completions.CompletionFinder.
"""
