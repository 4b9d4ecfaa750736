"""Starts display and game, and ends them when the parent ends, however that happens.

Run by path as a program of its own, with the standard library alone:
`python -I -S guard.py HOME XVFB SIZE GAME PORT`. It prints one line, `processes DISPLAY XVFB_PID
GAME_PID`, and then the game's output. It reads a pipe from the parent: when the pipe ends, it kills
both processes and deletes the folder HOME. Should it be killed itself, the kernel kills them.
"""

import ctypes
import os
import shutil
import signal
import subprocess
import sys
import threading

PR_SET_PDEATHSIG = 1  # of prctl(2)

children = []


def kill_with_parent():
    """Ask the kernel to kill this process when its parent dies."""
    ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)


def end(home):
    """Kill the children, delete the folder and exit."""
    for child in children:
        child.kill()
    for child in children:
        child.wait()
    shutil.rmtree(home, ignore_errors=True)
    os._exit(0)


def start(command, **options):
    """Start a process that ends with this one."""
    child = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, preexec_fn=kill_with_parent, **options
    )
    children.append(child)
    return child


def start_display(xvfb, size):
    """Start the X server; gives its process and its display number, '' where it did not start."""
    read, write = os.pipe()
    command = [xvfb, "-displayfd", str(write), "-screen", "0", size]
    command += ["-nolisten", "tcp", "-noreset", "-dpi", "48", "+extension", "GLX"]
    process = start(command, pass_fds=[write], stdout=subprocess.DEVNULL)
    os.close(write)
    return process, os.read(read, 20).decode().strip()


def start_game(game, home, port, display):
    """Start the game on the display, with `home` as its home folder."""
    user = home + "/.minetest"
    # the user's folder is set by name too: a variable of the user's, or a later version, would
    # lead elsewhere
    folders = {"HOME": home, "MINETEST_USER_PATH": user, "LUANTI_USER_PATH": user}
    drawing = {"DISPLAY": ":" + display, "LIBGL_ALWAYS_SOFTWARE": "1", "LP_NUM_THREADS": "1"}
    drawing["SDL_VIDEODRIVER"] = "x11"  # on the user's Wayland desktop nobody would take pictures
    env = {**os.environ, **folders, **drawing, "XDG_CACHE_HOME": home + "/.cache"}
    env.pop("WAYLAND_DISPLAY", None)
    command = [game, "--config", user + "/minetest.conf", "--go", "--gameid", "minetest"]
    command += ["--worldname", "world", "--name", "player", "--port", port]
    return start(command, cwd=home, env=env, stderr=subprocess.STDOUT)


def main(home, xvfb, size, game, port):
    """Start both and wait until the parent, or one of them, ends."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    display_process, display = start_display(xvfb, size)
    if not display:
        print("Xvfb did not start", flush=True)
        end(home)
    game_process = start_game(game, home, port, display)
    print("processes", display, display_process.pid, game_process.pid, flush=True)

    def watch(child):
        child.wait()
        end(home)

    for child in (display_process, game_process):
        threading.Thread(target=watch, args=[child], daemon=True).start()
    sys.stdin.buffer.read()  # returns when the parent closes the pipe or ends
    end(home)


if __name__ == "__main__":
    main(*sys.argv[1:])
