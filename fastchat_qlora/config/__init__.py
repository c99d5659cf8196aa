"""Command line or configuration file -> checked RunArguments.

Start with parser.parse_args.
"""
