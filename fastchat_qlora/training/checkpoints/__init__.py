"""The state of a run -> complete checkpoints, and back to the one to resume from.

Start with checkpoint.choose_checkpoint and checkpoint_writer.publish.
"""
