"""The command line and the host's tables become a frozen configuration.

The host's addresses and routes are read once, at the start (`daemon/*.build`); later changes of them are not noticed.
Resolvers are followed (`resolv_conf.py`, `names.py`). `policy/settings.py` has all that may change at run time.
"""
