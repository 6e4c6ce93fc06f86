"""What is given up before the first byte of the guest is read; `seccomp.py` is the last step of it."""
