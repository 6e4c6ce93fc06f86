"""passt and pasta in pure Python: user-mode networking by kernel offloads."""

__version__ = "0.1.0"
