"""Conversations -> segments of text that know whether they are supervised.

Start with chat_template.ChatTemplate and named_templates.ConversationTemplate.
"""
