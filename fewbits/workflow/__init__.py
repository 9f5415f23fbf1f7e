"""From a checkpoint and a request to a finished output."""
