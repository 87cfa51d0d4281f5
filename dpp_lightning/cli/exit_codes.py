"""Exit codes of ``dpp``: what each says to the shell or script that called it. ``dpp --help`` shows this table."""

DONE = 0
FAILED = 1
USAGE_ERROR = 2
INTERRUPTED = 130
TERMINATED = 143

MEANINGS = {
    DONE: "done",
    FAILED: "failed: a disk is full, memory ran out, the hub does not answer, another rank was lost",
    USAGE_ERROR: "wrong use: the command line, a setting or a file that was given; one line says which and the cure",
    INTERRUPTED: "stopped by Ctrl-C",
    TERMINATED: "stopped by SIGTERM",
}

SHOW_TRACEBACK = "DPP_TRACEBACK"  # environment variable: an error is shown with the place in the code that raised it
