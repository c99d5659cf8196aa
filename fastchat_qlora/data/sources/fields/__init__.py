"""Fields of a record under the names people use -> messages, tool calls, tools and weights.

Start with turns.read_messages."""
