"""The exit codes of `fewbits`."""

DONE, ERROR, USAGE, NOT_AS_REQUESTED, DIFFERS, INTERRUPTED = 0, 1, 2, 3, 4, 130
MEANING = {
    DONE: "done",
    ERROR: "an error, described in one message",
    USAGE: "wrong usage",
    NOT_AS_REQUESTED: "done, but a tensor did not get the format of its rule, or the reference cannot "
    "be run; or a plan that does not fit",
    DIFFERS: "done, but the engine of the output or of the reference computes different results",
    INTERRUPTED: "interrupted",
}
TEXT = "exit codes:\n" + "\n".join(f"  {code:<3} {meaning}" for code, meaning in MEANING.items())
