"""The processes in a namespace that pasta starts, and the terminal that it shares. `pasta.py` is the face."""
