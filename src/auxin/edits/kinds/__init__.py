"""The kinds of edits, and what they are made of."""
