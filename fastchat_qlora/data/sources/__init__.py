"""Files and hub datasets -> raw records -> conversations.

Start with repository.find_data, readers.read_file and formats.to_conversation.
"""
