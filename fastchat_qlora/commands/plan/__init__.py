"""Flags of a run -> its steps, memory on each device, disk space and time.

Start with command.plan."""
