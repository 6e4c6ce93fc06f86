"""Parts of the standard library that cost a start less than those."""
