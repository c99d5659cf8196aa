"""Command lines -> what inspect, plan, chat and merge show and write.

Start with the command.py of each; chat and merge share load_adapter.open_adapter."""
