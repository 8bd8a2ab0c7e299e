"""Ranks and what passes between them: groups, channels, and how a job starts, fails and ends."""
