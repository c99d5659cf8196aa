"""RunArguments -> a trained adapter in its folder, with checkpoints and a report.

Start with run.train.
"""
