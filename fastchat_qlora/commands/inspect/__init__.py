"""Flags of a run -> its sequences with their supervised tokens, and counts.

Start with command.inspect."""
