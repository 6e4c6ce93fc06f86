"""What flows of all protocols share: the table, limits, errors, statistics. It imports no protocol."""
