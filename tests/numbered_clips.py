"""Clips without files whose frames and actions tell their tick."""

import numpy as np
import torch

from minecraft_jepa.data.clip_reader import ClipReader
from minecraft_jepa.data.clips import Clip, contiguous_runs


class NumberedClips(ClipReader):
    """Clip `a`: frame t and action t are all t. Clip `b`: 40 ticks, from 100 on.

    `teleports` are in `a`.
    """

    def __init__(self, *teleports, ticks=60):
        t = np.arange(ticks)
        frames = np.broadcast_to(t[:, None, None, None], (ticks, 3, 8, 8)).astype(np.uint8)
        actions = np.broadcast_to(t[:, None], (ticks, 28)).astype(np.float32)
        self.clips = {
            "a": Clip(frames, actions, np.isin(t, teleports), {}),
            "b": Clip(frames[:40] + 100, actions[:40] + 100, np.zeros(40, bool), {}),
        }
        metadata = {}
        for name, clip in self.clips.items():
            runs = contiguous_runs(clip.teleported)
            metadata[name] = {"ticks": len(clip.actions), "runs": runs, "height": 8, "width": 8}
        super().__init__(dict.fromkeys(self.clips), metadata)

    def __getitem__(self, name):
        return self.clips[name]

    def read_windows(self, windows, ticks=25, rollout=1, far=0):
        frames = [self.clips[name].frames[t : t + rollout + 1] for name, t in windows]
        actions = [self.clips[name].actions[t - ticks + 1 : t + rollout] for name, t in windows]
        return torch.from_numpy(np.stack(frames)), torch.from_numpy(np.stack(actions))
