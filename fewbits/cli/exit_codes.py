"""The exit codes of `fewbits`, once for all commands."""

DONE, ERROR, USAGE, NOT_AS_ASKED, DIFFERS, INTERRUPTED = 0, 1, 2, 3, 4, 130
MEANING = {
    DONE: "done",
    ERROR: "an error, named in one message",
    USAGE: "wrong usage",
    NOT_AS_ASKED: "done, but a tensor did not get what a rule asks for; or a plan that does not fit",
    DIFFERS: "done, but the engine that the output is for computes something else",
    INTERRUPTED: "interrupted",
}
TEXT = "exit codes:\n" + "\n".join(f"  {code:<3} {meaning}" for code, meaning in MEANING.items())
