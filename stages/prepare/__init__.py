"""Turns documents, chats and labelled rows into shards of packed tokens."""
