"""The training loop, its checkpoints, memory plan and tasks."""
