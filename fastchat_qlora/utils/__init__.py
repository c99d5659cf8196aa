"""Untrusted text, files, pages and signals -> safe output and orderly stops.

Start with text.escape_control.
"""
