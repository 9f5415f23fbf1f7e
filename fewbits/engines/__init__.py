"""What runs inside an engine's own process: one script an engine, which knows nothing of fewbits.

    python run_<engine>.py MODEL TASK.json RESULT.npz

    TASK      {"tokens": [ids], "new": 8, "threads": 2}
    RESULT    logits f32 (t, vocabulary) of the tokens, and `new` greedy ids after them
    stdout    last line: {"engine": name, "version": ...}

Each is run by its path, so that an engine whose packages cannot share our environment has one of its own.
"""
