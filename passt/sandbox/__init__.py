"""Rights that the process gives up before it reads the first byte of the guest. `seccomp.py` is the last step."""
