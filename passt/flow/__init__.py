"""Parts that flows of all protocols share: the table, limits, errors, statistics. They import no protocol."""
