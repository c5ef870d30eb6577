"""Learning tasks one after the other: task-gated networks, their rivals, and what measures both."""
