"""What is due: a pure planner, what storage says is there, what has changed, and what it costs."""
