"""Landlock: the Linux kernel's own limits on what a process may read, write and reach.

A process gives up rights for good, without being root: on Linux 5.13 or newer, and nowhere else. It
holds for code in C too, which Python's audit events do not see. See the manual page landlock(7).
"""

import ctypes
import os
import struct
import sys
from collections.abc import Iterable

CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # system calls, the same on all processors
VERSION = 1  # a flag: tell the version, make nothing
PATH_BENEATH = 1  # the kind of a rule
NO_NEW_PRIVILEGES = 38  # of prctl

EXECUTE, READ_FILE, READ_DIR = 1 << 0, 1 << 2, 1 << 3
FILE_ACCESS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1}  # all, by version
TCP = 0b11  # to bind, to connect; from version 4
SCOPES = 0b11  # other processes' abstract sockets, and signals to them; from version 6


def version() -> int:
    """Of Landlock here; 0 if there is none."""
    if sys.platform != "linux":
        return 0
    return max(0, ctypes.CDLL(None).syscall(CREATE_RULESET, None, ctypes.c_size_t(0), VERSION))


def confine(readable: Iterable[str]) -> bool:
    """From now on this process reads no file but those in or below `readable`, writes none, has no
    TCP, and signals no process but those that it starts. Returns whether the kernel does that."""
    known = version()
    if not known:
        return False
    call = ctypes.CDLL(None).syscall
    tcp, scopes = TCP if known >= 4 else 0, SCOPES if known >= 6 else 0
    rules = struct.pack("=QQQ", FILE_ACCESS[min(known, 3)], tcp, scopes)
    size = 8 if known < 4 else 16 if known < 6 else 24  # what this version knows
    ruleset = call(CREATE_RULESET, rules, ctypes.c_size_t(size), 0)
    for path in readable:
        if not os.path.exists(path):
            continue
        access = READ_FILE | EXECUTE | (READ_DIR if os.path.isdir(path) else 0)
        file = os.open(path, os.O_PATH | os.O_CLOEXEC)
        call(ADD_RULE, ruleset, PATH_BENEATH, struct.pack("=Qi", access, file), 0)
        os.close(file)
    ctypes.CDLL(None).prctl(NO_NEW_PRIVILEGES, 1, 0, 0, 0)
    done = call(RESTRICT_SELF, ruleset, 0) == 0
    os.close(ruleset)
    return done
