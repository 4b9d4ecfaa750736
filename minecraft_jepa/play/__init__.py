"""The dream to play in: its page in the browser and its widget."""
