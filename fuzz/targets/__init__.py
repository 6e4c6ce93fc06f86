"""One module for each entry point."""
