"""Declarations of system calls: what a module says of its own."""

from __future__ import annotations

from passt.calls import ALL_BITS, Call, Condition, calls, one_of


def test_names_alone_allow_any_arguments() -> None:
    assert calls("read", "write") == (Call("read"), Call("write"))
    assert calls("splice", mode="pasta") == (Call("splice", (), "pasta"),)
    assert calls() == ()


def test_an_argument_that_is_one_of_several() -> None:
    assert one_of("ioctl", 1, 7, 9) == (Call("ioctl", (Condition(1, 7),)), Call("ioctl", (Condition(1, 9),)))
    assert {call.mode for call in one_of("kill", 1, 0, mode="pasta")} == {"pasta"}


def test_all_of_an_int_is_tested() -> None:
    assert Condition(0, 1).mask == ALL_BITS == 0xFFFFFFFF
