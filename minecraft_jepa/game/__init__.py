"""Luanti, an open voxel game: processes, environment, scripted player, recorder."""

try:
    import gymnasium  # noqa: F401
    import Xlib  # noqa: F401
except ImportError as error:
    raise ImportError(
        f"{error.name or error} is needed to play Luanti: pip install 'minecraft_jepa[luanti]', "
        "in a clone pip install -e '.[luanti]'"
    ) from None
