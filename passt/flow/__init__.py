"""What is common to all flows: the table, limits, what they share, statistics. No protocol is known here."""
