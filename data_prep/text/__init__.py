"""Dialogues to text and tokens."""
