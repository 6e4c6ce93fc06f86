"""Hostile input, made up by a machine that watches which code it reaches: fuzzing with atheris (libFuzzer).

    targets/NAME.py     an entry point. Its docstring states the invariants; `one(data)` is one execution, and raises if
                        they do not hold; `seeds()` are inputs to begin with
    table.py            the targets, the modules whose coverage guides each, and the length of its inputs
    corpus/NAME.hex     inputs that reach something that no other does, a line each, as earlier runs left them
    regressions/NAME/   inputs that found a bug, by a name that says which
    guided.py           runs one target under atheris
    run.py              runs many, one after the other, and records the figures: `python -m fuzz --help`

Without atheris, too, the corpus and the regressions are replayed by pytest (tests/security/test_fuzz.py).
"""
