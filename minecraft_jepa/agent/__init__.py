"""What acts: the dream to play in, its page and its widget."""
