"""Parsed flags -> errors, before anything is loaded.

Start with flags.find_flag_errors.
"""
