"""The command line and the host's tables become a frozen configuration.

The host's addresses and routes are read at the start (`daemon/*.build`), and again when they change: `follow.py` has
the policy of `daemon/following.py`. Resolvers are followed by `resolv_conf.py` and `names.py`. `policy/settings.py` has
all that may change at run time.
"""
