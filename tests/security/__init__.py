"""Hostile guests: what the sandbox closes, what a flood may cost, what arbitrary input may do."""
