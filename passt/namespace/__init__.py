"""What runs for the command in a namespace: its first process, its terminal. `pasta.py` is the face."""
