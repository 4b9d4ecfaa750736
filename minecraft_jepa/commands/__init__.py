"""The commands of `minecraft-jepa`: a dataclass for each, in groups."""
