"""The command line and the host's tables become a frozen configuration. Later only DNS settings change (`names.py`)."""
