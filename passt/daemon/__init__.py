"""The composition root: the steps of a start, the wiring, the end. The commands alone import it."""
