"""Launcher's environment and flags -> topology, process group, settings of DeepSpeed and FSDP.

Start with topology.get_topology.
"""
