"""The commands: `pasta`, also called `passt4netns`, or `python -m passt`; and `passt`, or `python -m passt.vm`.

As in the original, the name of the program selects the mode. Any other name means pasta: a script that is executed by
its descriptor, as by nsjail, has the name /dev/fd/N.

This module imports only modules that parsing needs, so that --help, --version and errors are quick.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence

from . import log, log_file
from .conf.argv import Done, parse
from .linux.proc import ephemeral_ports, inherited_fds
from .log import Fatal
from .policy.config import PASST, PASTA

HASH_SEED = "PYTHONHASHSEED"
SAVED_HASH_SEED = "PASST_SAVED_PYTHONHASHSEED"
NETNS_ALIAS = "passt4netns"


def main(argv: Sequence[str] | None = None) -> int:
    """Run, return the exit status. `argv` is sys.argv by default."""
    name, *arguments = sys.argv if argv is None else argv
    _fill_stdio()
    inherited = inherited_fds()
    try:
        options = parse(arguments, mode(name), ephemeral_ports())
        if options.print_seccomp:
            from .daemon import seccomp_table

            raise Done("".join(f"{line}\n" for line in seccomp_table.lines(options.mode)))
        if options.fd is not None and options.fd not in inherited:
            raise Fatal(f"Invalid --fd: {options.fd} (it is not open)")
        _want_random_hashes()
        env = _command_environment()
        path, size = options.log_file, options.log_size
        file = None if path is None else log_file.opened(options.mode, path, size)
        log.setup(options.mode, options.level, syslog=True, file=file)

        inherited = [fd for fd in inherited if fd != options.fd]
        if options.mode == PASST:
            from .daemon import passt as daemon_passt

            daemon_passt.run(options, inherited)
        from .daemon import pasta as daemon_pasta

        daemon_pasta.run(options, env, inherited)
    except Done as e:
        sys.stdout.write(str(e))
        sys.stdout.flush()
        return 0
    except Fatal as e:
        return _fail(*e.args)
    except OSError as e:
        return _fail(e.strerror or str(e))


def mode(name: str) -> str:
    """The mode that the program's `name` selects: PASST or PASTA."""
    base = os.path.basename(name)
    return PASST if "passt" in base and "pasta" not in base and base != NETNS_ALIAS else PASTA


def _fill_stdio() -> None:
    """Open /dev/null for closed standard streams, so that no other file gets the number of one."""
    while (fd := os.open(os.devnull, os.O_RDWR)) < 3:
        os.set_inheritable(fd, True)
    os.close(fd)


def _fail(*lines: str) -> int:
    """Log errors, in any case on standard error; returns the exit status."""
    log.start_stderr()
    for line in lines:
        log.err(" ".join(line.splitlines()))
    return 1


def _want_random_hashes() -> None:
    """Re-execute without PYTHONHASHSEED: with a known hash key, a guest could slow down the flow table."""
    if os.environ.get(HASH_SEED, "random") == "random" or sys.flags.ignore_environment:
        return
    env = dict(os.environ)
    env[SAVED_HASH_SEED] = env.pop(HASH_SEED)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)


def _command_environment() -> dict[str, str]:
    """The environment for the command, without the change of `_want_random_hashes`."""
    env = dict(os.environ)
    if SAVED_HASH_SEED in env:
        env[HASH_SEED] = env.pop(SAVED_HASH_SEED)
    return env
