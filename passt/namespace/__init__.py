"""Namespaces of others, pinned and watched (`pin`, `watch`), and the processes in a namespace that pasta starts, with
the terminal that it shares (`init`, `supervisor`, `terminal`). `pasta.py` is the face.
"""
