"""Moves what is imported out of the garbage collector's sight: it would look at half a million objects in each run."""

import gc

gc.collect()
gc.freeze()
