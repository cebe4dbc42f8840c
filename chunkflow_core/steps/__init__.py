"""What a run does: prepare, the two stages, cleanup, and a whole plan on this machine."""
