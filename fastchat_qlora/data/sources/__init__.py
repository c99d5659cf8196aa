"""Files and hub datasets -> raw records -> conversations.

Start with readers.read_file and formats.to_conversation.
"""
