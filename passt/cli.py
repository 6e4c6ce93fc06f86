"""The commands: `pasta`, also called `passt4netns`, or `python -m passt`; `passt`, or `python -m passt.vm`; and
`slirp4netns`, which is either of the two by another command line (`conf/slirp4netns.py`).

As in the original, the name of the program selects the mode. Any other name means pasta: a script that is executed by
its descriptor, as by nsjail, has the name /dev/fd/N.

This module imports only modules that parsing needs, so that --help, --version and errors are quick.
"""

from __future__ import annotations

import errno
import os
import sys
from collections.abc import Mapping, Sequence
from typing import NoReturn

from . import log, log_file
from .conf.argv import Done, Options, parse
from .lean.records import replace
from .linux import inherited, stdio
from .linux.proc import ephemeral_ports, inherited_fds, moved_from_stdio
from .log import Fatal
from .namespace import pin
from .policy.config import PASST, PASTA

HASH_SEED = "PYTHONHASHSEED"
SAVED_HASH_SEED = "PASST_SAVED_PYTHONHASHSEED"
NETNS_ALIAS, SLIRP4NETNS = "passt4netns", "slirp4netns"
PACKAGES = {"pyroute2": "pyroute2", "psutil": "psutil", "scapy": "scapy", "numpy": "numpy"}
DEBIAN_PACKAGES = {name: f"python3-{name}" for name in PACKAGES}


def main(argv: Sequence[str] | None = None) -> int:
    """Run, return the exit status. `argv` is sys.argv by default."""
    name, *arguments = [inherited.program_name(sys.argv[0]), *sys.argv[1:]] if argv is None else argv
    try:
        stdio.fill()
        _run(name, arguments)
    except Done as e:
        try:
            stdio.write_out(str(e))
        except stdio.ReaderGone:
            return 1
        except Fatal as failed:
            return _fail(*failed.args)
        return e.status
    except Fatal as e:
        return _fail(*e.args)
    except ImportError as e:
        return _fail(_missing(e))
    except OSError as e:
        return _fail(log.failure(e))
    except MemoryError:
        return _fail(log.failure(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))))


def _run(name: str, arguments: Sequence[str]) -> NoReturn:
    """Start the daemon of the mode. Raises Done, Fatal, ImportError, OSError."""
    log.step("parse the command line")
    options = _parse(name, arguments)
    if options.doctor:
        from .daemon import doctor

        found = doctor.report(options.mode)
        raise Done(found.text, found.status)
    if options.print_seccomp:
        from .daemon import seccomp_table

        raise Done("".join(f"{line}\n" for line in seccomp_table.lines(options.mode)))
    log.step("list the inherited descriptors")
    fds = [fd for fd in inherited_fds() if fd not in pin.held()]
    if options.fd is not None:
        options = _beside_stdio(options, options.fd, fds)
    log.step("start the interpreter again, without PYTHONHASHSEED")
    _want_random_hashes()
    log.step("take over signals and environment")
    caller = inherited.take()
    caller = replace(caller, env=_command_environment(caller.env))
    path, size, as_json = options.log_file, options.log_size, options.log_json
    file = None if path is None else log_file.opened(options.mode, path, size, as_json=as_json)
    log.step("open the system log")
    log.setup(options.mode, options.level, syslog=True, file=file, as_json=as_json)

    fds = [fd for fd in fds if fd not in (options.fd, options.ready_fd, options.exit_fd)]
    log.step("load the program")
    if options.mode == PASST:
        from .daemon import passt as daemon_passt

        pin.release()
        daemon_passt.run(options, fds)
    from .daemon import pasta as daemon_pasta

    daemon_pasta.run(options, caller, fds)


def mode(name: str) -> str:
    """The mode that the program's `name` selects, which may end like `.python`: PASST or PASTA."""
    base = os.path.basename(name)
    return PASST if "passt" in base and "pasta" not in base and base.partition(".")[0] != NETNS_ALIAS else PASTA


def _parse(name: str, arguments: Sequence[str]) -> Options:
    """The options, in the language of the command line that `name` selects. Raises Fatal, Done."""
    if os.path.basename(name).partition(".")[0] != SLIRP4NETNS:
        return parse(arguments, mode(name), ephemeral_ports())
    from .conf import slirp4netns

    options = slirp4netns.parse(arguments)
    try:
        stdio.write_out(slirp4netns.started(options))
    except (Fatal, stdio.ReaderGone):
        pass  # it has no reader
    return options


def _beside_stdio(options: Options, fd: int, fds: Sequence[int]) -> Options:
    """`options`, whose --fd is not that of a standard stream. Raises Fatal."""
    if fd < 3:
        return Options(**{**vars(options), "fd": moved_from_stdio(fd), "given_fd": fd})
    if fd not in fds:
        raise Fatal(f"Invalid --fd: {fd} (it is not open)")
    return options


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
    env = inherited.environment()
    env[SAVED_HASH_SEED] = env.pop(HASH_SEED)
    os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], env)


def _command_environment(env: Mapping[str, str]) -> dict[str, str]:
    """The environment for the command, without the change of `_want_random_hashes`."""
    env = dict(env)
    if SAVED_HASH_SEED in env:
        env[HASH_SEED] = env.pop(SAVED_HASH_SEED)
    return env


def _missing(e: ImportError) -> str:
    """The message about a module that cannot be imported."""
    module = (e.name or "").partition(".")[0]
    if module in PACKAGES:
        cure = f"install it for {sys.executable} (pip install {PACKAGES[module]}; Debian: {DEBIAN_PACKAGES[module]})"
    elif module == __package__:
        cure = "the installation is incomplete: install passt again"
    else:
        cure = f"it belongs to {sys.executable} or to a package that is installed for it"
    return f"Couldn't load the Python module {e.name or '?'}: {e}: {cure}"
