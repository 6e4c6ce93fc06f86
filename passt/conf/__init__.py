"""The command line and the host's tables become a frozen configuration. Afterwards names alone change (`names.py`)."""
